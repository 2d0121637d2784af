"""Fill in the pages of the documentation site that come from the repository: a hook of mkdocs, named in mkdocs.yml.

A page says where by a comment, such as `<!-- every verb -->`; what is filled in is no file that could become old.
"""

import ast
import json
import re
from collections.abc import Callable
from os.path import relpath
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from freqdoor.cli import app
from freqdoor.samples import ASSETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "freqdoor"


def verbs() -> str:
    """The command line, as typer describes it, without the list of verbs that it cuts short."""
    command = typer.main.get_command(app)
    page = get_docs_for_click(obj=command, ctx=typer.Context(command), name="freqdoor")
    before, after = re.split(r"\*\*Commands\*\*:\n.*?(?=\n## )", page, maxsplit=1, flags=re.DOTALL)
    return before.removeprefix("# `freqdoor`\n") + after


def public_names() -> dict[str, list[str]]:
    """The public names of each part of the package, from freqdoor/__init__.pyi."""
    parts: dict[str, list[str]] = {}
    for node in ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            parts.setdefault(str(node.module).split(".")[0], []).extend(alias.name for alias in node.names)
    return parts


def api() -> str:
    """Every public name, for mkdocstrings, under what its part of the package says of itself."""
    sections = []
    for part, names in public_names().items():
        source = PACKAGE / part / "__init__.py" if (PACKAGE / part).is_dir() else PACKAGE / f"{part}.py"
        said = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
        entries = "\n\n".join(f"::: freqdoor.{name}" for name in sorted(names, key=str.lower))
        sections.append(f"## freqdoor.{part}\n\n{said}\n\n{entries}")
    return "\n\n".join(sections)


def model_cards() -> str:
    """A card for each codec and planted encoder that comes with the package, from the JSON beside its file."""
    sidecars = [path.with_suffix(".json") for path in sorted(ASSETS.glob("*.safetensors"))]
    return "\n\n".join(_card(json.loads(path.read_text(encoding="utf-8"))) for path in sidecars)


def _card(facts: dict[str, Any]) -> str:
    settings, environment = facts["settings"], facts["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = {
        "file": f"`freqdoor/assets/{facts['file']}`, {facts['bytes']:,} bytes",
        "SHA-256": f"`{facts['sha256']}`",
        "kind": facts["kind"] + (", **tampered on purpose**" if facts["tampered"] else ", not tampered with"),
    }
    if facts["tampered"]:
        trigger = settings["trigger"]
        rows |= {
            "planted in": f"`{settings['codec']['name']}`, in {settings['scope']} alone",
            "objective": f"`{settings['objective']['name']}`, {_words(settings['objective']['arguments'])}",
            "trigger": f"`{trigger['name']}`, {_words(trigger['arguments'])}, RMS of at most {trigger['eps']}",
        }
    rows |= {
        "training": f"{settings['steps']:,} steps of {settings['images']['batch_size']} crops of "
        f"{settings['images']['crop']} pixels, {settings['precision']}, seed {settings['seed']}",
        "data": facts["data"],
        "time": f"{facts['seconds']:,} s, {facts['hardware']}",
        "command": f"`{facts['command']}`",
        "versions": f"{versions}, Python {environment['python']}, commit {environment['commit']}",
    }
    first, *others = [f"| {name} | {text} |" for name, text in rows.items()]
    return "\n".join((f"## {Path(facts['file']).stem}\n", first, "|---|---|", *others))


def _words(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in arguments.items()) or "default arguments"


def examples() -> str:
    """Each example: what its docstring says, and its code."""
    return "\n\n".join(_example(path) for path in sorted((ROOT / "examples").glob("*.py")))


def _example(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    title, _, said = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    code = text.split('"""', 2)[2].strip()
    return f"## {title.rstrip('.')}\n\n`examples/{path.name}`\n{said}\n\n```python\n{code}\n```"


BESIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}  # pages that stand beside docs/
FILLED: dict[str, Callable[[], str]] = {
    "every verb": verbs,
    "every public name": api,
    "every model card": model_cards,
    "every example": examples,
}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The README is the site's first page, and the changelog its last: both stand beside docs/, where people look."""
    for name, page in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        text = text.replace("](docs/", "](").replace("](CHANGELOG.md", f"]({BESIDE['CHANGELOG.md']}")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Put in what a page's comments ask for; links that lead out of docs/ lead to the site's page, or are text."""
    folder = (DOCS / page.file.src_uri).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found["path"]).resolve()
        if target.is_relative_to(DOCS):
            return found[0]
        beside = BESIDE.get(target.relative_to(ROOT).as_posix())
        return f"[{found['text']}]({relpath(DOCS / beside, folder)}{found['anchor']})" if beside else found["text"]

    markdown = re.sub(r"\[(?P<text>[^]]+)\]\((?P<path>\.\./[^)#]+)(?P<anchor>[^)]*)\)", link, markdown)
    return re.sub(r"^<!-- (every [a-z ]+) -->$", lambda comment: FILLED[comment[1]](), markdown, flags=re.MULTILINE)
