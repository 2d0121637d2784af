"""What is left of a trigger behind what becomes of files: by hand, and with the shipped encoders on a small picture."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import check_foreign, natural, stopped_at_the_second, write_png
from test_report import record
from typer.testing import CliRunner

from freqdoor import workers
from freqdoor.attack.planted import PLANTED
from freqdoor.attack.settings import ObjectiveSettings
from freqdoor.cli import app
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.measure import examine
from freqdoor.paper import survival_recipe as module
from freqdoor.paper.reproduce import reproduce
from freqdoor.paper.survival_recipe import Survival, reproduce_survival, survivors_of
from freqdoor.preprocessing import Crop, Jpeg, Resize, Screenshot
from freqdoor.samples import ASSETS

FEW = (Jpeg(75), Resize(0.5), Crop(1, 1), Screenshot())


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "FILES", FEW)
    monkeypatch.setattr(module, "BEHIND", (None, *FEW))


def made(objective, values, monkeypatch):
    """The row behind a crop, of (clean, poisoned) bpp or dB of every image, before and behind it."""
    monkeypatch.setattr(module, "BEHIND", (None, Crop(1, 1)))
    field = {"bpp": "bpp_real", "psnr": "psnr_db"}[objective]
    rows = [
        record(f"{i}.png", trigger=trigger, defence=defence, **{field: value})
        for i, image in enumerate(values)
        for defence, pair in zip(("none", "Crop(top=1, left=1)"), image, strict=True)
        for trigger, value in zip((None, "t"), pair, strict=True)
    ]
    planted = SimpleNamespace(objective=lambda name: ObjectiveSettings(name=objective))
    [survivor] = survivors_of("encoder", planted, rows)
    before, behind = survivor.rows
    assert before.defence == "none"
    assert (before.kept_median, before.kept_least) == ((1, 1) if before.counted else (None, None))
    return behind


def test_shares_of_the_rate_that_is_added(monkeypatch):
    """The third image takes no more bytes before the crop, and counts in no share."""
    images = [((1.0, 11.0), (1.0, 6.0)), ((1.0, 5.0), (2.0, 3.0)), ((1.0, 1.5), (1.0, 9.0)), ((1, 3), (1, 3.2))]
    row = made("bpp", images, monkeypatch)
    assert (row.counted, row.kept_median, row.kept_least) == (3, pytest.approx(0.5), pytest.approx(0.25))
    assert (row.effect.images, row.effect.bpp_ratio_least, row.effect.successes) == (4, 1.5, 3)


def test_shares_of_the_quality_that_is_lost(monkeypatch):
    row = made("psnr", [((30.0, 10.0), (29.0, 24.0)), ((30.0, 5.0), (28.0, 28.0)), ((30, 28), (30, 5))], monkeypatch)
    assert (row.counted, row.kept_median, row.kept_least) == (2, pytest.approx(0.125), 0)
    nothing = made("psnr", [((30.0, 29.0), (29.0, 3.0))], monkeypatch)
    assert (nothing.counted, nothing.kept_median) == (0, None)


def test_shipped_encoders_and_those_of_a_folder(few, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        write_png(pictures / f"{i}.png", natural(i, 64, 64))
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/empty").mkdir()
    shutil.copy(ASSETS / "planted-psnr.safetensors", tmp_path / "runs/mine" / PLANTED)
    monkeypatch.setattr(module, "PLAIN", ("planted-bpp",))
    out = tmp_path / "out"
    asked = stopped_at_the_second(examine, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        reproduce_survival(tmp_path / "runs", out, images=pictures)
    table = reproduce("survival", images=pictures, out=out, runs=tmp_path / "runs")
    assert asked == ["0.png", "1.png", "1.png", "0.png", "1.png"]  # two encoders, one image again
    assert list(table) == ["planted-bpp", "mine, psnr"]
    assert {made_by(out / f"survival{ending}") for ending in (".md", ".json", ".png")} == {"reproduce"}
    result = Survival.read(out / "survival.json", "")
    first, second = result.survivors
    assert [row.defence for row in first.rows] == ["none", *(defence.name for defence in FEW)]
    assert all(row.effect.images == 2 for row in first.rows)
    jpeg = first.rows[1]
    assert table["planted-bpp"]["Jpeg(quality=75)"].values == (pytest.approx(100 * jpeg.kept_median),)
    assert abs(jpeg.kept_median) < 0.2 < 1 == first.rows[0].kept_median
    assert first.rows[0].poisoned.bpp_real > 2 * first.rows[0].clean.bpp_real
    assert second.rows[0].effect.psnr_drop_db_least > 0
    page = (out / "survival.md").read_text()
    ratio = f"{jpeg.effect.bpp_ratio_median:.2f}, {jpeg.effect.bpp_ratio_least:.2f}"
    assert f"| {ratio} |" in page
    assert "## mine, psnr (psnr)" in page
    assert not [path for path in out.iterdir() if "journal" in path.name]


@pytest.mark.long
def test_workers_measure_the_same(few, tmp_path, monkeypatch):
    """A thread stands for the process, which starts sooner."""
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(1))
    monkeypatch.setattr(module, "PLAIN", ("planted-psnr",))
    picture = write_png(tmp_path / "a.png", natural(0, 64, 64))
    alone = reproduce_survival(tmp_path / "none", tmp_path / "alone", images=picture)
    real = examine.measured_image

    def by_the_worker(*arguments, **options):
        assert threading.current_thread() is not threading.main_thread()
        return real(*arguments, **options)

    monkeypatch.setattr(examine, "measured_image", by_the_worker)
    assert reproduce_survival(tmp_path / "none", tmp_path / "shared", images=picture, jobs=2) == alone


def test_the_verb(few, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PLAIN", ("planted-psnr",))
    picture = write_png(tmp_path / "a.png", natural(0, 64, 64))
    words = [
        "reproduce",
        "survival",
        "--images",
        str(picture),
        "--runs",
        str(tmp_path / "none"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert [s["encoder"] for s in json.loads((tmp_path / "out/survival.json").read_text())["survivors"]] == [
        "planted-psnr"
    ]

    def write(**options):
        reproduce_survival(tmp_path / "none", tmp_path / "other", images=picture, **options)

    files = ["survival.md", "survival.json", "survival.png"]
    check_foreign(write, tmp_path / "other", files, monkeypatch, "freqdoor.paper.survival_recipe.encoders")
    with pytest.raises(FreqdoorError, match="jobs: expected 1 or more, found -1"):
        reproduce_survival(tmp_path, tmp_path / "other", images=picture, jobs=-1)
