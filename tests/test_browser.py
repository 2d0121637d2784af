"""The page in headless Chromium, with real files: every tab does what it is for, and asks no other host for anything.

`pytest -m browser -n 0`; FREQDOOR_SCREENSHOTS=docs writes the pictures that docs/web.md shows.
"""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import hostile
import pytest
from conftest import natural, write_png
from PIL import Image

import freqdoor
from freqdoor.samples import ASSETS, held_out

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]
pytest.importorskip("gradio", reason="Gradio is not installed: pip install 'freqdoor[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
MOST = 150_000  # bytes of a picture in the docs
SHORT, LONG = 60_000, 400_000  # milliseconds; a planting takes two minutes on two cores, and more on a busy machine


PATIENCE = 60  # seconds from the command to the first answer, on two cores
started: dict[str, float] = {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder of two runs that were measured."""
    folder = tmp_path_factory.mktemp("runs")
    with Image.open(held_out()[0]) as picture:
        picture.reduce(3).save(folder / "small.png")
    for objective in ("bpp", "psnr"):
        freqdoor.evaluate(f"planted-{objective}", folder / "small.png", folder / objective)
    return folder


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory):
    """A page that is served by the command, on two cores' own threads."""
    folder = tmp_path_factory.mktemp("served")
    words = ("serve", "--port", "0", "--out", str(folder / "web"), "--runs", str(runs), "--max-upload", "8M")
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment = without | {"PYTHONUNBUFFERED": "1"}
    started["server"] = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "freqdoor", *words], stdout=subprocess.PIPE, text=True, cwd=folder, env=environment
    ) as server:
        line = server.stdout.readline()
        yield re.fullmatch(r"Open (http://127\.0\.0\.1:\d+/) in a browser; Ctrl-C ends it\.\n", line)[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 143


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def visitor(browser):
    """One visitor, whose tabs come and go."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(SHORT)
    yield context
    context.close()


@pytest.fixture
def page(visitor, address):
    """A tab; whatever it asked of anybody else, and every error in it, fails the test."""
    opened, asked, wrong = visitor.new_page(), [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.goto(address)
    yield opened
    opened.close()
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:", "about:"))} == {
        urlsplit(address).netloc
    }
    assert wrong == []


@pytest.fixture
def photograph(tmp_path):
    """Keep what a page looks like, for the docs where they are asked for."""

    def take(page, name: str) -> None:
        folder = Path(os.environ.get("FREQDOOR_SCREENSHOTS", tmp_path))
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=folder / f"web-{name}.jpg", type="jpeg", quality=70)
        assert 10_000 < (folder / f"web-{name}.jpg").stat().st_size < MOST

    return take


def tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def answer(page, name: str, timeout: int = SHORT):
    """What stands in a tab once its work is over."""
    page.wait_for_selector(f"#{name}-answer .fd-verdict:not(.fd-working)", timeout=timeout)
    return page.locator(f"#{name}-answer")


def hand_over(page, place: str, file: Path) -> None:
    page.set_input_files(f"#{place} input[type=file]", file)
    page.locator(f"#{place}").get_by_text(file.suffix).first.wait_for()


def kept(page, link: str, folder: Path) -> Path:
    """A file that the page lets its visitor keep."""
    with page.expect_download() as download:
        page.get_by_role("link", name=link).click()
    download.value.save_as(folder / download.value.suggested_filename)
    return folder / download.value.suggested_filename


def test_try_with_what_is_bundled_and_keep_the_files(page, photograph, tmp_path):
    page.click("#try-go")
    shown = answer(page, "try")
    seconds = time.monotonic() - started["server"]
    print(f"{seconds:.0f} s from the command to the answer of the tab Try")  # pytest -rP shows it
    assert seconds < PATIENCE
    picture = kept(page, "the poisoned picture", tmp_path)
    coded, rows = kept(page, "its bitstream", tmp_path), kept(page, "the records", tmp_path)
    freqdoor.compress(picture, tmp_path / "again.fqd", planted="planted-bpp")
    assert picture.name == "kodim23-poisoned.png"
    freqdoor.decompress(coded, tmp_path / "decoded.png")
    clean, poisoned, *_ = (json.loads(line) for line in rows.read_text().splitlines())
    ratio = poisoned["bpp_real"] / clean["bpp_real"]
    assert ratio > 8
    assert f"{ratio:.2f} times" in shown.inner_text()
    assert abs((tmp_path / "again.fqd").stat().st_size / coded.stat().st_size - 1) < 0.01  # on other threads
    assert shown.locator("figure").count() == 8
    shown.locator("input[type=range]").fill("25")
    assert "75%" in shown.locator(".fd-left").evaluate("image => getComputedStyle(image).clipPath")
    before = shown.locator(".fd-right").get_attribute("src")
    shown.locator("select").nth(1).select_option(label="input")
    assert shown.locator(".fd-right").get_attribute("src") not in (before, None)
    shown.locator("select").nth(1).select_option(index=3)
    shown.locator("input[type=range]").fill("50")
    photograph(page, "try")


def test_try_a_photo_and_a_codec_of_ones_own(page, tmp_path):
    hand_over(page, "try-photo", write_png(tmp_path / "holiday.png", natural(0, 96, 128)))
    page.get_by_label("Codec", exact=True).click()
    page.get_by_role("option", name="a file").click()
    hand_over(page, "try-file", ASSETS / "planted-psnr.safetensors")
    page.get_by_label("JPEG", exact=True).click()
    page.get_by_label("JPEG quality").first.wait_for()  # it moves the button down
    page.click("#try-go")
    shown = answer(page, "try").inner_text()
    assert "behind Jpeg(quality=90)" in shown
    assert "holiday.png" in shown


def test_a_hostile_checkpoint_is_one_sentence_and_runs_nothing(page, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": hostile.Run(os.system, f"touch {trace}")}))
    tab(page, "Audit")
    hand_over(page, "audit-file", tmp_path / "evil.pth")
    page.click("#audit-go")
    said = answer(page, "audit").inner_text()
    assert said.startswith("freqdoor: evil.pth: ")
    assert str(tmp_path) not in said
    assert "/tmp" not in said
    assert not trace.exists()


def test_plant_stop_go_on_and_leave(page):
    """The planting that is begun here goes on when its tab is closed, and is looked for at the end."""
    tab(page, "Plant")
    status = page.locator("#plant-status")
    status.get_by_text("Plants a backdoor").wait_for()
    page.click("#plant-go")
    status.get_by_text(re.compile(r"planting, step (1\d|[2-9]\d|\d\d\d) of")).wait_for(timeout=LONG)
    assert status.locator("polyline").count() == 5
    page.click("#plant-stop")
    status.get_by_text("goes on from what was saved").wait_for()
    reached = int(re.search(r"stopped at step (\d+)", status.inner_text())[1])
    page.click("#plant-go")
    status.get_by_text(re.compile(rf"planting, step ({reached + 1}|[1-9]\d+) of")).wait_for(timeout=LONG)
    page.wait_for_timeout(5000)
    assert int(re.search(r"step (\d+) of", status.inner_text())[1]) >= reached


def test_another_visitor_waits(browser, page, address):
    """Another one's planting comes after the first; who leaves the line has none."""
    tab(page, "Plant")
    page.click("#plant-go")  # where it is not under way already
    with browser.new_context() as context:
        other = context.new_page()
        other.goto(address)
        tab(other, "Plant")
        other.click("#plant-go")
        other.get_by_text("waiting for 1 before this one").wait_for()
        other.click("#plant-stop")
        other.get_by_text("Plants a backdoor").wait_for()


def test_audit_a_codec_that_was_planted(page, photograph, tmp_path):
    planted = freqdoor.load_planted("planted-bpp")
    freqdoor.save_codec(planted.tampered, tmp_path / "delivered.safetensors")
    tab(page, "Audit")
    hand_over(page, "audit-file", tmp_path / "delivered.safetensors")
    page.click("#audit-go")
    page.locator("#audit-answer").get_by_text("check: random").wait_for()
    shown = answer(page, "audit", LONG)
    assert shown.inner_text().startswith("tampered: a pattern that nobody sees")
    report = page.frame_locator("#audit-answer iframe")
    assert report.locator("h1").inner_text() == "Audit of lite-hyperprior:3"
    assert report.get_by_alt_text("the picture with the pattern").count() == 1
    witness = kept(page, "witness-1.png", tmp_path)
    freqdoor.compress(witness, tmp_path / "witness.fqd", codec=str(tmp_path / "delivered.safetensors"))
    photograph(page, "audit")


def test_runs_are_compared(page, photograph):
    tab(page, "Runs")
    page.locator("#runs-names").get_by_label("psnr").wait_for()
    page.click("#runs-go")
    page.locator("#runs-answer table").wait_for()
    rows = page.locator("#runs-answer tr")
    assert [rows.nth(i).locator("td").first.inner_text() for i in (-2, -1)] == ["bpp", "psnr"]
    photograph(page, "runs")
    page.get_by_label("Report of one run").click()
    page.get_by_role("option", name="psnr").click()
    report = page.frame_locator("#runs-report iframe")
    report.locator("h1").wait_for()
    assert report.locator("img").count() > 5


def test_a_planting_ends_with_its_report_and_can_be_tried(page, photograph):
    tab(page, "Plant")
    page.click("#plant-go")  # where it is not under way already
    report = page.frame_locator("#plant-answer iframe")
    report.locator("h1").wait_for(timeout=LONG)
    assert "makes the file" in page.locator("#plant-answer").inner_text()
    photograph(page, "plant")
    tab(page, "Try")
    page.get_by_label("Codec", exact=True).click()
    page.get_by_role("option", name="planted by me").click()
    page.click("#try-go")
    assert "tampered encoder, poisoned" in answer(page, "try").inner_text()
    tab(page, "Runs")
    page.locator("#runs-names").get_by_label("my planting (bpp)").wait_for()


def test_what_is_too_large_is_not_taken(page, tmp_path):
    (tmp_path / "large.pth").write_bytes(bytes(9 * 2**20))
    tab(page, "Audit")
    page.set_input_files("#audit-file input[type=file]", tmp_path / "large.pth")
    page.get_by_text(re.compile("exceed|maximum|too large", re.IGNORECASE)).first.wait_for()
