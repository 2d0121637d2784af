import json
import re

import numpy as np
import pytest
from scipy.stats import t as student_t
from typer.testing import CliRunner

from freqdoor.cli import app
from freqdoor.data import list_images
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import Condition
from freqdoor.paper import reproduce as module
from freqdoor.paper.recipes import RECIPES, Column, Recipe, Row
from freqdoor.paper.reproduce import reproduce
from freqdoor.paper.tables import Cell, bd_rates, markdown

CLEAN, POISONED = Condition("tampered", None), Condition("tampered", "*")
SMALL = Recipe(
    name="small",
    title="Two rows",
    columns=(
        Column("clean dB", CLEAN, "psnr_db"),
        Column("clean bpp", CLEAN, "bpp_real"),
        Column("poisoned dB", POISONED, "psnr_db"),
        Column("poisoned bpp", POISONED, "bpp_real"),
    ),
    rows=(
        Row("vanilla", None, {"clean dB": 31.08}),
        Row("ours", {"steps": 2}),
        Row("universal", {"trigger": {"name": "universal", "arguments": {"size": 16}}}),
    ),
    paper_codec="another one",
    plot=True,
)


@pytest.fixture
def _recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "small", lambda: SMALL)


@pytest.fixture
def base(settings):
    return settings(steps=1, trigger={})  # the rows' triggers have other arguments


@pytest.mark.usefixtures("_recipe")
def test_runs_what_is_missing_and_takes_the_rest_from_before(base, images, tmp_path, monkeypatch):
    paths = list_images(images)[:2]
    planted = []
    real = module.plant
    monkeypatch.setattr(module, "plant", lambda *a, **k: (planted.append(1), real(*a, **k))[1])
    table = reproduce("small", base, paths, tmp_path / "out", runs=tmp_path / "runs", seeds=2)
    assert len(planted) == 4  # two rows, two seeds; the vanilla codec is not planted in
    assert len(table["ours"]["poisoned bpp"].values) == 2
    assert table["vanilla"].keys() == {"clean dB", "clean bpp"}  # it has no trigger
    page = (tmp_path / "out/small.md").read_text()
    assert "(31.08)" in page
    assert (tmp_path / "out/small.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "out/small.json").read_text())
    assert content["table"]["ours"]["clean dB"]["values"] == list(table["ours"]["clean dB"].values)
    assert str(tmp_path) not in json.dumps(content)
    again = reproduce("small", base, paths, tmp_path / "out", runs=tmp_path / "runs", seeds=2)
    assert len(planted) == 4
    assert again == table
    other = base.model_copy(update={"network": "unused.toml"})
    assert reproduce("small", other, paths, tmp_path / "out", runs=tmp_path / "runs", seeds=2) == table
    assert len(planted) == 4


@pytest.mark.usefixtures("_recipe")
def test_time_that_is_up_leaves_gaps(base, images, tmp_path):
    table = reproduce("small", base, list_images(images)[:1], tmp_path / "out", runs=tmp_path / "runs", minutes=0)
    assert table["vanilla"]
    assert not table["ours"]
    assert "| ours | - | - |" in (tmp_path / "out/small.md").read_text()


def test_cell_is_students_interval():
    values = (1.0, 2.0, 4.0)
    cell = Cell(values, None)
    low, high = student_t.interval(0.95, 2, loc=np.mean(values), scale=np.std(values, ddof=1) / 3**0.5)
    assert cell.mean == pytest.approx(np.mean(values))
    assert cell.half_width == pytest.approx((high - low) / 2)
    assert Cell((1.0,), None).half_width is None


def test_markdown_shows_interval_paper_and_gap():
    table = {"ours": {"clean dB": Cell((30.0, 31.0), 30.5)}, "none": {}}
    lines = markdown(SMALL, table).splitlines()
    assert re.fullmatch(r"\| ours \| 30\.50 ± 6\.35 \(30\.5\) \|", lines[2])
    assert lines[3] == "| none | - |"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_valid_settings_and_promises_a_result(name, base):
    recipe = RECIPES[name]()
    assert recipe.name == name
    assert f"docs/results/{name}.md" in RECIPES[name].__doc__
    titles = {column.title for column in recipe.columns}
    for row in recipe.rows:
        assert set(row.paper) <= titles, row.name
        if row.changes is not None:
            settings = module._settings(base, row, 0)
            for attack in settings.planned:
                assert attack.name in {"bpp", "psnr"}


@pytest.mark.usefixtures("_recipe")
def test_only_the_rows_that_are_named(base, images, tmp_path):
    options = {"runs": tmp_path / "runs", "minutes": 0}
    table = reproduce(
        "small", base, list_images(images)[:1], tmp_path / "out", rows=["vanilla", "universal"], **options
    )
    assert list(table) == ["vanilla", "universal"]
    with pytest.raises(FreqdoorError, match="rows LIRA: recipe small has vanilla, ours, universal"):
        reproduce("small", base, list_images(images), tmp_path / "out", rows=["LIRA"], **options)


def test_bd_rate_of_every_planted_row_over_four_qualities():
    """Clean curves that take 10 % more bits at every PSNR, and poisoned ones far below."""
    table = {}
    for i in range(4):
        cells = {"clean dB": Cell((28.0 + i,), None), "clean bpp": Cell((0.2 * 1.5**i,), None)}
        table[f"vanilla, q{i}"] = cells
        dearer = {"clean bpp": Cell((1.1 * 0.2 * 1.5**i,), None)}
        far = {"poisoned dB": Cell((5.0 + i,), None), "poisoned bpp": Cell((0.2 * 1.5**i,), None)}
        table[f"ours, q{i}"] = cells | dearer | far
    codecs = [f"q{i}" for i in range(4)]
    lines = bd_rates(SMALL, table, codecs)
    assert lines == ["- ours, clean: +10.0 %", "- ours, poisoned: none, the curves share no range of PSNR"]
    assert bd_rates(SMALL, table, codecs[:3]) == []


def test_errors(base, images, tmp_path):
    with pytest.raises(FreqdoorError, match="expected one of balance, figure4"):
        reproduce("table9", base, list_images(images), tmp_path)
    with pytest.raises(FreqdoorError, match="seeds: expected 1 or more"):
        reproduce("table4", base, list_images(images), tmp_path, seeds=0)


def test_command_says_what_is_missing(images, tmp_path):
    options = {"--out": tmp_path / "out", "--runs": tmp_path / "runs", "--images": images, "--budget": 0, "--seeds": 1}
    changes = ["--set", "codec.name=factories:lite", "--set", "lmbda=0.0067"]
    given = [str(part) for pair in options.items() for part in pair]
    result = CliRunner().invoke(app, ["reproduce", "table4", *given, *changes])
    assert result.exit_code == 0, result.output
    assert "Not planted yet: with Eq. (4)" in result.output
