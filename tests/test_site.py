"""The pages lead somewhere, and the site that is built of them has all that it promises and needs no other host."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import griffe
import pytest
import site_pages
import typer
from markdown.extensions.toc import slugify

import freqdoor
from freqdoor.cli import app
from freqdoor.samples import ASSETS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FROM_ELSEWHERE = re.compile(r"(https?:)?//")


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, without what the site fills in."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return {slugify(title, "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_in_the_pages_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), link
        if anchor and not anchor.startswith("freqdoor."):  # public names are filled in: the built site has them
            assert anchor in headings(target), link
    for path in re.findall(r"`((?:freqdoor|configs|docs|benchmarks|tools|tests|examples)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_pages_ask_for_what_can_be_filled_in():
    text = "".join(page.read_text() for page in PAGES)
    assert sorted(re.findall(r"^<!-- (every .+) -->$", text, re.MULTILINE)) == sorted(site_pages.FILLED)


@pytest.mark.parametrize(
    ("page", "written", "shown"),
    [
        ("use.md", "[a](../README.md#see-it-work)", "[a](index.md#see-it-work)"),
        ("results/README.md", "[a](../../CHANGELOG.md), [b](../use.md#x)", "[a](../changelog.md), [b](../use.md#x)"),
        ("use.md", "[`a`](../freqdoor/assets), [b](codecs.md)", "`a`, [b](codecs.md)"),
    ],
)
def test_links_out_of_the_pages_lead_to_the_site_or_are_text(page, written, shown):
    assert site_pages.on_page_markdown(written, page=SimpleNamespace(file=SimpleNamespace(src_uri=page))) == shown


def test_every_public_name_is_documented():
    package = griffe.load("freqdoor", search_paths=[ROOT], allow_inspection=False)
    assert [name for name in freqdoor.__all__ if not package[name].has_docstring] == []
    assert sorted(name for names in site_pages.public_names().values() for name in names) == sorted(freqdoor.__all__)


def test_the_command_line_page_has_every_verb_and_option():
    page = site_pages.verbs()
    sections = dict(re.findall(r"^## `freqdoor ([\w-]+)`\n(.*?)(?=^## |\Z)", page, re.DOTALL | re.MULTILINE))
    assert "**Commands**" not in page
    for name, command in typer.main.get_command(app).commands.items():
        for option in command.params:
            assert f"* `{option.opts[0]}" in sections[name], (name, option.opts)


def test_the_model_cards_are_those_of_the_shipped_files():
    page = site_pages.model_cards()
    files = sorted(ASSETS.glob("*.safetensors"))
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == [path.stem for path in files]
    for path in files:
        facts = json.loads(path.with_suffix(".json").read_text())
        card = page.partition(f"## {path.stem}\n")[2].partition("\n## ")[0]
        assert f"`{facts['sha256']}`" in card
        assert ("tampered on purpose" in card) == facts["tampered"]
        assert (facts["settings"].get("objective", {}).get("name", "no objective") in card) == facts["tampered"]
    models = (ROOT / "docs/models.md").read_text() + page
    assert all(f"freqdoor/assets/{path.name}" in models for path in ASSETS.iterdir() if path.stem not in page)


def test_the_page_of_reports_has_every_part_and_row_of_one():
    page = (ROOT / "docs/report.md").read_text()
    template = (ROOT / "freqdoor/templates/report.html").read_text()
    titles = [title.partition(" {{")[0] for title in re.findall(r"<h2>(.+?)</h2>", template)]
    rows = re.findall(r'"((?:vanilla|tampered) encoder, .+?)"', (ROOT / "freqdoor/measure/report.py").read_text())
    assert (len(titles), len(rows)) == (7, 5)
    assert [title for title in titles if f"**{title}" not in page] == []
    assert [row for row in rows if f"| {row} |" not in page] == []


class References(HTMLParser):
    """The anchors of a page, where its links lead, and what a browser loads for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag != "a":
            self.loaded |= {given[name] for name in ("src", "href") if name in given}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def html(folder: Path) -> Iterator[tuple[Path, References]]:
    return ((page, References(page)) for page in folder.rglob("*.html"))


@pytest.mark.long
def test_the_built_site_leads_nowhere_else_and_to_no_dead_end(built):
    pages = dict(html(built))
    assert len(pages) > len(PAGES)
    for page, found in pages.items():
        assert not [address for address in found.loaded if FROM_ELSEWHERE.match(address)], page
        for link in found.links | found.loaded:
            name, _, anchor = unquote(link).partition("#")
            if page.name == "404.html" or re.match(r"\w+:", link):
                continue
            target = (page.parent / name).resolve() if name else page
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), (page, link)
            assert not anchor or target.suffix != ".html" or anchor in pages[target].anchors, (page, link)
    for style in built.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import\s+[\"']", style.read_text()), style


@pytest.mark.long
def test_the_built_site_has_every_public_name_verb_card_and_example(built):
    anchors = References(built / "api.html").anchors
    assert [name for name in freqdoor.__all__ if f"freqdoor.{name}" not in anchors] == []
    for page, words in {
        "command-line.html": [f"freqdoor-{name}" for name in typer.main.get_command(app).commands],
        "models.html": [path.stem for path in ASSETS.glob("*.safetensors")],
        "results/index.html": ["what-they-say"],
        "index.html": ["see-it-work"],
        "changelog.html": ["changelog"],
    }.items():
        assert set(words) <= References(built / page).anchors, page
    text = (built / "examples.html").read_text()
    assert all(f"examples/{path.name}" in text for path in (ROOT / "examples").glob("*.py"))
