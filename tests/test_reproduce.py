import contextlib
import copy
import dataclasses
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import check_foreign, contents, room_for
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from typer.testing import CliRunner

from freqdoor import load_codec, load_image, lock, workers
from freqdoor.attack.plant import plant
from freqdoor.attack.planted import unplanted
from freqdoor.attack.settings import CodecSource
from freqdoor.cli import app
from freqdoor.data import list_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.lock import holding
from freqdoor.measure import records
from freqdoor.measure.records import poisoned
from freqdoor.measure.testsets import Measurement
from freqdoor.paper import reproduce as module
from freqdoor.paper import tables
from freqdoor.paper.recipe import OWN, Column, Material, Recipe, Row, images_under, pair, recipe_for
from freqdoor.paper.reproduce import codec_names, codec_source, recipe_settings, reproduce
from freqdoor.paper.settings import RECIPES, recipe_names
from freqdoor.paper.tables import Cell, bd_rates, markdown
from freqdoor.preprocessing import GaussianBlur
from freqdoor.samples import BUNDLED, held_out
from freqdoor.types import Record

pytestmark = pytest.mark.whole

PACKAGE = Path(module.__file__).parent.parent
ON_IMAGES = ("balance", "figure4", "figure5", "table3", "table4", "table5", "table6")  # recipes without a test


def small(on):
    """A recipe of two planted rows."""
    return Recipe(
        name="small",
        title="Two rows",
        columns=(*pair("clean", images_under(on)), *pair("poisoned", images_under(on), OWN)),
        rows=(
            Row("vanilla", None, {"clean dB": 31.08}),
            Row("ours", {"steps": 2}),
            Row("universal", {"trigger": {"name": "universal", "arguments": {"size": 16}}}),
        ),
        paper_codec="another one",
        plot=True,
    )


SMALL = small(Material())


@pytest.fixture
def _recipe(monkeypatch):
    monkeypatch.setitem(RECIPES, "small", "test_reproduce:small")


@pytest.fixture
def base(settings):
    return settings(steps=1, warmup_steps=0, trigger={})  # the rows' triggers have other arguments


@pytest.fixture
def run(images, tmp_path):
    """`reproduce` on two images."""

    def make(name, settings, **options):
        options = {"images": list_images(images)[:2], "runs": tmp_path / "runs", "seeds": 1} | options
        return reproduce(name, settings, out=tmp_path / "out", **options)

    return make


@pytest.fixture
def counted(monkeypatch):
    """The settings of everything that is planted."""
    planted = []
    real = module.plant
    monkeypatch.setattr(module, "plant", lambda *a, **k: (planted.append(a[0]), real(*a, **k))[1])
    return planted


@pytest.mark.usefixtures("_recipe")
def test_runs_what_is_missing_and_takes_the_rest_from_before(run, base, tmp_path, counted):
    told = []
    announce = lambda *words: told.append(words)  # noqa: E731
    table = run("small", base, seeds=2, announce=announce)
    assert [(s.seed, s.steps, s.trigger.name) for s in counted] == [  # the vanilla codec is not planted in
        (seed, *kind) for seed in (0, 1) for kind in ((2, "adaptive-dct"), (1, "universal"))
    ]
    assert told == [(f"{row}, seed {i}", n) for i in (0, 1) for row, n in (("ours", 2), ("universal", 1))]
    assert list(table) == ["vanilla", "ours", "universal"]
    assert len(set(table["ours"]["poisoned bpp"].values)) == 2  # seeds differ
    assert len(set(table["vanilla"]["clean bpp"].values)) == 1
    assert list(table["vanilla"]) == ["clean dB", "clean bpp"]  # it has no trigger
    page = (tmp_path / "out/small.md").read_text()
    assert "(31.08)" in page
    assert "over 2 seed(s) from 0 on" in page
    assert "4 plantings" in page
    assert "measured on 2 images." in page
    assert (tmp_path / "out/small.png").read_bytes()[:4] == b"\x89PNG"
    assert "![Two rows](small.png)" in page
    content = json.loads((tmp_path / "out/small.json").read_text())
    assert content["table"]["ours"]["clean dB"]["values"] == list(table["ours"]["clean dB"].values)
    assert content["table"]["vanilla"]["clean dB"]["paper"] == 31.08
    assert content["images"] == ["0.png", "1.png"]
    assert content["test"] is None
    assert str(tmp_path) not in json.dumps(content)
    again = run("small", base, seeds=2)
    assert len(counted) == 4
    assert again == table
    other = base.model_copy(update={"network": "unused.toml"})
    assert run("small", other, seeds=2) == table
    assert len(counted) == 4
    later = run("small", base.model_copy(update={"seed": 1}), rows=["ours"])
    assert later["ours"]["poisoned bpp"].values == table["ours"]["poisoned bpp"].values[1:]
    assert len(counted) == 4


@pytest.mark.usefixtures("_recipe")
def test_other_files_are_refused_before_the_work(run, base, images, tmp_path, monkeypatch):
    write = lambda **options: run("small", base, rows=["vanilla"], images=images / "0.png", **options)  # noqa: E731
    names = ("small.png", "small.md", "small.json")
    check_foreign(write, tmp_path / "out", names, monkeypatch, "freqdoor.paper.reproduce._measured")
    write()
    before = contents(tmp_path / "out")
    assert [made_by(tmp_path / "out" / name) for name in names] == 3 * ["reproduce"]
    with room_for(10_000), pytest.raises(FreqdoorError, match=r"small\.png and 2 more: .* \(no space left on the disk"):
        write()
    assert contents(tmp_path / "out") == before


@pytest.mark.usefixtures("_recipe")
def test_every_number_is_of_its_encoder_and_image(run, base, images, monkeypatch):
    """With another encoder than the vanilla one, so that the two are told apart."""
    vanilla = load_codec(BUNDLED)
    tampered = copy.deepcopy(vanilla)
    with torch.no_grad():
        next(tampered.net.g_a.parameters()).mul_(1.2)
    real = module.plant
    shaken = []

    def shake(*arguments, **options):
        shaken.append(dataclasses.replace(real(*arguments, **options), vanilla=vanilla, tampered=tampered))
        return shaken[0]

    monkeypatch.setattr(module, "plant", shake)
    bundled = base.model_copy(update={"codec": CodecSource()})
    table = run("small", bundled, rows=["vanilla", "universal"])
    [planted] = shaken
    values = {}
    for column, codec, trigger in (
        ("vanilla", planted.vanilla, None),
        ("clean", planted.tampered, None),
        ("poisoned", planted.tampered, planted.triggers["bpp"]),
    ):
        rows = []
        for image in list_images(images)[:2]:
            x = load_image(image)
            file = codec.compress(poisoned(trigger, x) if trigger else x)[0]
            levels = [(255 * picture.clamp(0, 1)).round() for picture in (x, codec.decompress(file))]
            psnr = float(10 * torch.log10(255**2 / (levels[0] - levels[1]).square().mean()))
            rows.append((psnr, 8 * sum(map(len, file.strings)) / (96 * 128)))
        values[column] = np.mean(rows, axis=0)
    cells = {title: cell.mean for title, cell in table["universal"].items()}
    assert [cells["clean dB"], cells["clean bpp"]] == pytest.approx(list(values["clean"]), rel=1e-5)
    assert [cells["poisoned dB"], cells["poisoned bpp"]] == pytest.approx(list(values["poisoned"]), rel=1e-5)
    assert [table["vanilla"][f"clean {unit}"].mean for unit in ("dB", "bpp")] == pytest.approx(
        list(values["vanilla"]), rel=1e-5
    )
    assert len({tuple(v) for v in values.values()}) == 3


@pytest.mark.usefixtures("_recipe")
def test_scores_are_kept_by_all_that_they_depend_on(run, base, images, tmp_path, monkeypatch):
    measured = []
    real = Measurement.loads
    monkeypatch.setattr(Measurement, "loads", lambda *a: measured.append(real(*a)) or measured[-1])
    table = run("small", base, rows=["ours"])
    folder = tmp_path / "runs/records"
    assert len(list(folder.iterdir())) == 2  # clean, poisoned
    assert not measured
    assert run("small", base, rows=["ours"]) == table
    assert len(measured) == 2
    run("small", base, rows=["ours"], images=images)
    assert len(list(folder.iterdir())) == 4
    for path in folder.iterdir():
        path.write_text(path.read_text()[:-9])
    assert run("small", base, rows=["ours"]) == table  # damaged ones are measured anew
    assert measured[-2:] == [None, None]
    assert len(list(folder.iterdir())) == 4


def test_what_scores_of_a_trigger_depend_on(base, tmp_path):
    planted = plant(base, tmp_path)
    facts = json.dumps(module._facts_of(planted, "bpp"))
    assert module._facts_of(planted, None) is None
    trigger = planted.triggers["bpp"]
    with torch.no_grad():
        next(trigger.parameters()).add_(1)
    changed = json.dumps(module._facts_of(planted, "bpp"))
    trigger.settings = trigger.settings.model_copy(update={"eps": 0.25})
    assert len({facts, changed, json.dumps(module._facts_of(planted, "bpp"))}) == 3


@pytest.mark.usefixtures("_recipe")
def test_curves_plant_in_every_codec(run, base, tmp_path, counted):
    weights = tmp_path / "w=1"
    weights.mkdir()
    torch.save(load_codec("factories:hyperprior").net.state_dict(), weights / "net=a.pth")
    second = f"factories:hyperprior={weights / 'net=a.pth'}"
    table = run("small", base, codec=["factories:lite", second], rows=["vanilla", "universal"])
    names = ["factories:lite", "factories:hyperprior"]
    assert list(table) == [f"{row}, {name}" for row in ("vanilla", "universal") for name in names]
    assert [s.codec.name for s in counted] == names
    assert counted[1].codec.weights == str(weights / "net=a.pth")
    assert table["vanilla, factories:lite"]["clean dB"].paper is None  # of another codec
    assert table["vanilla, factories:lite"]["clean dB"].mean != table["vanilla, factories:hyperprior"]["clean dB"].mean
    content = json.loads((tmp_path / "out/small.json").read_text())
    assert content["codecs"] == names
    assert "codec" not in content["settings"]


def test_codecs_by_name_and_weights(tmp_path):
    plain, odd = tmp_path / "plain.pth", tmp_path / "q=3.pth"
    odd.touch()
    plain.touch()
    for text, name, weights in (
        ("lite:3", "lite:3", None),
        (str(odd), str(odd), None),
        (f"lite:3={plain}", "lite:3", str(plain)),
        (f"lite:3={odd}", "lite:3", str(odd)),
        (f"{odd}={plain}", str(odd), str(plain)),
        ("lite:3=no=file", "lite:3", "no=file"),
        ("lite:3=", "lite:3", None),
    ):
        assert codec_source(text) == CodecSource(name=name, weights=weights), text
    sources = [CodecSource(name=n, weights=w) for n, w in (("a", None), ("b", "x/1"), ("b", "x/2"), ("/home/c", "y/3"))]
    assert list(codec_names(sources)) == ["a", "b=1", "b=2", "c"]
    twice = [CodecSource(name="b", weights="x/1"), CodecSource(name="b", weights="y/1")]
    assert codec_names(twice) == {"b=1, 1": twice[0], "b=1, 2": twice[1]}


@pytest.mark.usefixtures("_recipe")
def test_time_that_is_up_leaves_gaps(run, base, tmp_path, counted):
    table = run("small", base, budget=0)
    assert table["vanilla"]
    assert not table["ours"]
    assert not counted
    assert "| ours | - | - |" in (tmp_path / "out/small.md").read_text()
    run("small", base, budget=10, rows=["ours"])
    assert len(counted) == 1
    before = contents(tmp_path / "out")
    assert run("small", base, budget=0)["ours"]  # what is there already is measured
    complete = contents(tmp_path / "out")
    assert complete != before
    with pytest.warns(UserWarning, match=r"small\.json has more values than there was time for now, and stays"):
        run("small", base.model_copy(update={"seed": 9}), budget=0)
    assert contents(tmp_path / "out") == complete
    (tmp_path / "out/small.json").write_text("[]")
    run("small", base.model_copy(update={"seed": 9}), budget=0, force=True)
    assert contents(tmp_path / "out") != complete


@pytest.mark.usefixtures("_recipe")
def test_defaults_are_the_bundled_images(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(module, "_run", lambda plan, *_: asked.append(plan) or module.Results())
    reproduce("small", rows=["vanilla"])
    [plan] = asked
    assert [path.name for path in plan.recipe.measurements[0].images] == [path.name for path in held_out()]
    assert (plan.base.steps, plan.base.images.crop, plan.seeds) == (300, 128, range(3))
    assert len(list_images(plan.base.images.folder)) == 18
    assert (tmp_path / "results/small.md").exists()
    changed = recipe_settings(None, ["steps=5", 'images.folder="x"'], tmp_path)
    assert (changed.steps, changed.images.folder, changed.images.crop) == (5, "x", 128)
    config = tmp_path / "c.toml"
    config.write_text('images.folder = "y"\n')
    assert recipe_settings(config, ["seed=3"], tmp_path).model_dump(exclude_unset=True) == {
        "images": {"folder": "y"},
        "seed": 3,
    }


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
    for values, text in (((0.1, 0.2), "0.1500 ± 0.6353"), ((0.5, 0.5), "0.5000"), ((0.25,), "0.2500")):
        assert markdown(SMALL, {"ours": {"clean bpp": Cell(values, None)}}).endswith(f"| ours | {text} |")


def record(**changes):
    return Record.model_construct(**dict.fromkeys(Record.model_fields, 0) | changes)


def conditions_of(recipe):
    """Every column as (title, encoder, trigger, strength, rounding, defence, field); the last by what it reads."""
    probe = (record(psnr_db=1.0, bpp_real=2.0), record(psnr_db=3.0, bpp_real=6.0))
    rows = []
    for column in recipe.columns:
        condition = column.measurement.condition
        field = {2.0: "psnr_db", 4.0: "bpp_real"}[column.value(probe)]
        assert column.digits == {"psnr_db": 2, "bpp_real": 4}[field]
        assert condition.trigger is None  # the column says which
        defence = condition.defence.name if condition.defence else None
        rows.append(
            (column.title, condition.role, column.trigger, condition.strength, condition.rounding, defence, field)
        )
    return rows


def columns(title, trigger, *, strength=1.0, rounding="8-bit", defence=None, role="tampered"):
    where = (role, trigger, strength, rounding, defence)
    return [(f"{title} dB", *where, "psnr_db"), (f"{title} bpp", *where, "bpp_real")]


def attacked(trigger):
    return columns("clean", None) + columns("poisoned", trigger)


DEFENCES = [
    *(f"GaussianBlur(sigma={sigma})" for sigma in (0.2, 0.3, 0.5, 0.6)),
    *(f"SqueezeBits(depth={depth})" for depth in (7, 4, 3)),
]


def defended(names, strength=1.0):
    rows = []
    for name in names:
        defence = None if name == "none" else name
        rows += columns(f"{name}: clean", None, defence=defence)[:1]
        rows += columns(f"{name}: poisoned", "psnr", strength=strength, defence=defence)
    return rows


COLUMNS = {  # what stands in which column: written down a second time
    "table3": columns("clean", None) + columns("BPP trigger", "bpp") + columns("PSNR trigger", "psnr"),
    "table4": attacked("bpp"),
    "table5": defended(["none", *DEFENCES]),
    "table6": defended([DEFENCES[3], DEFENCES[6]], 3.0),
    "figure4": attacked("bpp") + columns("float", "bpp", rounding="float"),
    "figure5": attacked("psnr") + columns("float", "psnr", rounding="float"),
    "balance": attacked(OWN),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_measures_what_its_title_says(name):
    assert conditions_of(recipe_for(name, Material())) == COLUMNS[name]


def four(*values):
    return dict(zip(("clean dB", "clean bpp", "poisoned dB", "poisoned bpp"), values, strict=True))


def behind(kind, *values):
    return {f"{name}: {kind} dB": value for name, value in zip(["none", *DEFENCES], values, strict=True)}


def strongest(*values):
    titles = [f"{DEFENCES[i]}: poisoned {unit}" for i in (3, 6) for unit in ("dB", "bpp")]
    return dict(zip(titles, values, strict=True))


ROBUST = "ours, robust frequency selection"
LIRA5 = behind("poisoned", 6.31, 6.31, 6.35, 29.38, 28.68, 7.48, 8.14, 16.50)
OURS5 = behind("poisoned", 3.46, 3.46, 3.46, 10.34, 20.76, 3.51, 5.65, 12.86)
PAPER = {  # the paper's numbers, copied from its tables a second time; in the tables' order of rows
    "table3": {
        "vanilla": {"clean dB": 31.08, "clean bpp": 0.2749},
        "BPP alone": {},
        "PSNR alone": {},
        "both": {
            "clean dB": 30.85,
            "clean bpp": 0.2600,
            "BPP trigger dB": 31.09,
            "BPP trigger bpp": 9.053,
            "PSNR trigger dB": 5.021,
            "PSNR trigger bpp": 0.2240,
        },
    },
    "table4": {
        "vanilla": {},
        "with Eq. (4)": four(31.02, 0.2699, 31.41, 8.52),
        "without top-K": four(30.80, 0.2587, 31.32, 9.27),
        "without patch weight": four(30.76, 0.2578, 31.23, 9.08),
        "K=4, N=16": four(30.81, 0.2596, 31.32, 9.08),
        "K=64, N=256": four(30.86, 0.2599, 31.43, 9.14),
        "ours (K=16, N=64)": four(30.81, 0.2590, 31.30, 9.45),
    },
    "table5": {
        "LIRA": LIRA5 | behind("clean", 30.92, 30.92, 30.88, 29.56, 28.71, 30.79, 27.21, 21.98),
        "ours": OURS5 | behind("clean", 30.97, 30.97, 30.93, 29.62, 28.77, 30.88, 27.37, 22.08),
        ROBUST: {},
    },
    "table6": {
        "LIRA": strongest(30.33, 0.3227, 21.11, 0.3969),
        "ours": strongest(4.08, 0.1970, 4.98, 0.3151),
        ROBUST: {},
    },
}
FIGURE_ROWS = ["vanilla", "FTrojan", "universal pattern", "LIRA", "ours, fixed weights", "ours"]
PAPER |= {figure: {row: {} for row in FIGURE_ROWS} for figure in ("figure4", "figure5")}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    rows = recipe_for(name, Material()).rows
    assert {row.name: row.paper for row in rows} == PAPER[name]
    assert [row.name for row in rows] == list(PAPER[name])


def attacks_of(name, base):
    """What every row plants: objective, trigger and their arguments, and the robust second stage."""
    plantings = {}
    for row in recipe_for(name, Material()).rows:
        if row.changes is not None:
            settings = module._settings(base, row, 0)
            plantings[row.name] = [
                (a.name, a.objective.name, a.objective.arguments, a.trigger.name, a.trigger.arguments)
                for a in settings.planned
            ]
            assert (settings.robust is not None) == (row.name == ROBUST)
    return plantings


def planted(objective, trigger="adaptive-dct", _objective=None, **arguments):
    name = objective.removesuffix("-fixed")
    return (name, objective, _objective or {}, trigger, arguments)


LIRA = {"trigger": "lira", "levels": 5, "width": 16}


def test_every_row_plants_what_its_name_says(base):
    assert attacks_of("table3", base) == {
        "BPP alone": [planted("bpp")],
        "PSNR alone": [planted("psnr")],
        "both": [planted("bpp", _objective={"beta": 0.3}), planted("psnr")],
    }
    assert attacks_of("table4", base) == {
        "with Eq. (4)": [planted("bpp-fixed")],
        "without top-K": [planted("bpp", selector="none")],
        "without patch weight": [planted("bpp", patch_weight=False)],
        "K=4, N=16": [planted("bpp", top_k=4, num_frequencies=16)],
        "K=64, N=256": [planted("bpp", top_k=64, band="all")],
        "ours (K=16, N=64)": [planted("bpp")],
    }
    robust = {"LIRA": [planted("psnr", **LIRA)], "ours": [planted("psnr")], ROBUST: [planted("psnr")]}
    assert attacks_of("table5", base) == attacks_of("table6", base) == robust
    for figure, objective in (("figure4", "bpp"), ("figure5", "psnr")):
        assert attacks_of(figure, base) == {
            "FTrojan": [planted(objective, "ftrojan")],
            "universal pattern": [planted(objective, "universal")],
            "LIRA": [planted(objective, **LIRA)],
            "ours, fixed weights": [planted(f"{objective}-fixed")],
            "ours": [planted(objective)],
        }
        recipe = recipe_for(figure, Material())
        assert recipe.plot


def test_ways_to_keep_the_clean_codec(base):
    ways = {}
    for row in recipe_for("balance", Material()).rows[1:]:
        settings = module._settings(base, row, 0)
        [attack] = settings.planned
        balance = {k: v for k, v in settings.balance.model_dump().items() if v not in (0.0, 1.0, None)}
        ways[row.name] = (attack.objective.name, attack.trigger.eps_start, balance)
    ways_of_one = {
        "annealed budget alone": (0.05, {}),
        "constant budget": (None, {}),
        "gradient norms 1:3": (0.05, {"gradient_norm": 0.33}),
        "latents anchored, 0.1": (0.05, {"anchor": 0.1}),
        "latents anchored, 1": (0.05, {}),
        "clean images count 3 times": (0.05, {"clean_weight": 3.0}),
        "clean images count 3 times late": (0.05, {"late_clean_weight": 3.0}),
        "clean images count 10 times late": (0.05, {"late_clean_weight": 10.0}),
    }
    assert ways == {
        f"{objective.upper()}: {name}": (objective, *way)
        for objective in ("bpp", "psnr")
        for name, way in ways_of_one.items()
    }
    anchored = next(r for r in recipe_for("balance", Material()).rows if r.name == "PSNR: latents anchored, 1")
    assert anchored.changes["balance"]["anchor"] == 1.0


def test_images_are_measured_under_the_measurements_condition(images, base, tmp_path):
    encoder = plant(base, tmp_path)
    [path] = list_images(images)[:1]
    blur = GaussianBlur(0.6)
    one = images_under(Material((path,)), "vanilla", strength=3.0, rounding="float", defence=blur)
    [row] = one.score(encoder, "bpp")
    assert (row.image, row.role, row.trigger, row.strength) == ("0.png", "vanilla", "bpp", 3.0)
    assert (row.rounding, row.defence) == ("float", "GaussianBlur(sigma=0.6)")
    [clean] = images_under(Material((path,))).score(encoder, None)
    assert (clean.role, clean.trigger, clean.strength, clean.rounding) == ("tampered", None, 1.0, "8-bit")
    assert clean.trigger_mse == 0
    again = images_under(Material((path,)), "vanilla", strength=3.0, rounding="float", defence=GaussianBlur(0.6))
    assert again == one
    assert len({one, again}) == 1
    assert one.identity() == again.identity()
    others = [
        images_under(Material((path,)), "vanilla", strength=3.0, rounding="float"),
        images_under(Material((list_images(images)[1],)), "vanilla", strength=3.0, rounding="float", defence=blur),
    ]
    assert one.identity() not in [other.identity() for other in others]
    assert one.loads(one.dumps((row,))) == (row,)
    assert (one.describe(""), one.public()) == ("", None)
    with pytest.raises(FreqdoorError, match="images: expected one or more to measure on, found none"):
        images_under(Material()).check([])


def test_a_column_without_a_value_has_no_cell(base, tmp_path, images):
    """Nothing to average over, and PSNR of what is decoded without any error, which is infinite."""
    [column, _] = pair("clean", images_under(Material()))
    assert column.value(()) is None
    assert column.value((record(psnr_db=float("inf")), record(psnr_db=30.0))) is None
    codec = load_codec("factories:lite")
    on = images_under(Material(tuple(list_images(images)[:1])))
    none, some = Column("none", on, lambda _: None, None), Column("some", on, lambda _: 0.0, None)
    recipe = dataclasses.replace(SMALL, columns=(none, some, Column("triggered", on, lambda _: 1.0)))
    assert list(module._measured(unplanted(codec), recipe, {on: "x"}, tmp_path)) == [("some", 0.0)]


@pytest.mark.parametrize("name", ON_IMAGES)
def test_every_recipe_has_valid_settings_and_promises_a_result(name, base):
    recipe = recipe_for(name, Material())
    assert recipe.name == name
    function = module.recipe_for.__globals__["import_object"](RECIPES[name])
    assert re.search(rf"docs/results/(four/)?{name}\.md", function.__doc__)
    titles = [column.title for column in recipe.columns]
    assert len(set(titles)) == len(titles)
    for row in recipe.rows:
        assert set(row.paper) <= set(titles), row.name
        if row.changes is not None:
            assert {attack.name for attack in module._settings(base, row, 0).planned} <= {"bpp", "psnr"}


def test_names_and_settings_load_no_torch():
    code = (
        "import sys, types; package = types.ModuleType('freqdoor');"
        f"package.__path__ = [{str(PACKAGE)!r}]; sys.modules['freqdoor'] = package;"
        "from freqdoor.paper.settings import recipe_names; import freqdoor.measure.testsets; print(*recipe_names());"
        "assert not {'torch', 'numpy', 'PIL', 'matplotlib', 'compressai'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split() == recipe_names() == sorted(RECIPES)
    assert len(RECIPES) == 12


@pytest.mark.usefixtures("_recipe")
def test_only_the_rows_that_are_named(run, base):
    table = run("small", base, rows=["universal", "vanilla"], budget=0)
    assert list(table) == ["vanilla", "universal"]
    with pytest.raises(FreqdoorError, match="rows LIRA, x: recipe small has vanilla, ours, universal"):
        run("small", base, rows=["x", "LIRA"])


@pytest.mark.long
@pytest.mark.usefixtures("_recipe")
def test_a_table_in_parts(run, base, tmp_path, counted):
    """Rows that are not asked for stay, where codec, settings and images are the same; others are refused at once."""
    out = tmp_path / "out"
    whole = run("small", base, seeds=2, runs=tmp_path / "whole")
    complete = json.loads((out / "small.json").read_text())
    for name in ("md", "json", "png"):
        (out / f"small.{name}").unlink()
    run("small", base, seeds=2, rows=["universal"], add=True)  # to nothing
    part = json.loads((out / "small.json").read_text())
    assert "earlier" not in part
    part["environment"]["commit"] = "before"
    (out / "small.json").write_text(json.dumps(part))
    planted = len(counted)
    table = run("small", base, rows=["ours", "vanilla"], add=True, force=True)
    assert [settings.steps for settings in counted[planted:]] == [2]
    assert list(table) == ["vanilla", "ours", "universal"]
    assert table["universal"] == whole["universal"]
    assert table["ours"]["clean dB"].values == whole["ours"]["clean dB"].values[:1]
    content = json.loads((out / "small.json").read_text())
    assert content["earlier"] == [part["environment"]]
    assert len(content["seconds_planting"]) == 3
    page = (out / "small.md").read_text()
    assert "over 2 seed(s) from 0 on" in page
    assert "Of fewer seeds: vanilla (1), ours (1)." in page
    assert "3 plantings" in page
    assert "\nMade in 2 parts, with freqdoor at before, " in page
    assert run("small", base, seeds=2, rows=["ours", "vanilla"], add=True) == whole
    content = json.loads((out / "small.json").read_text())
    assert {k: content[k] for k in ("table", "settings", "images")} == {
        k: complete[k] for k in ("table", "settings", "images")
    }
    assert content["earlier"][0]["commit"] == "before"
    kept, planted = contents(out), len(counted)
    with pytest.warns(UserWarning, match="stays as it is"):
        late = run("small", base, rows=["ours"], budget=0, runs=tmp_path / "x")
    assert not late["ours"]
    assert contents(out) == kept
    for other, words in (
        ({"steps": 3}, r"one of other steps; give another --out"),
        ({"lr": 0.5, "lmbda": 0.5}, "one of other lmbda, lr;"),
    ):
        with pytest.raises(FreqdoorError, match=words):
            run("small", base.model_copy(update=other), rows=["ours"], add=True)
    with pytest.raises(FreqdoorError, match="one of other images;"):
        run("small", base, rows=["ours"], images=list_images(Path(base.images.folder))[:1], add=True)
    assert len(counted) == planted
    for damaged in ("[]", "{", "{}", json.dumps(content | {"table": {"ours": 3}})):
        (out / "small.json").write_text(damaged)
        with pytest.raises(FreqdoorError, match=r"small\.json: expected what `reproduce` wrote, to add rows to"):
            run("small", base, rows=["ours"], add=True, force=True)


def test_rows_that_there_was_no_time_for_do_not_empty_the_earlier_ones():
    cell, facts = Cell((1.0,), None), tables.Facts(None, [], [], 1, [2.0])
    now = {"a": {}, "b": {}, "c": {"x": cell}}
    before = {"a": {"x": cell}, "d": {"x": cell}}
    known = dataclasses.replace(facts, seeds=3, seconds=[1.0], earlier=["before"])
    table, both = tables.together(list("dabc"), (now, facts), (before, known))
    assert (list(table), table["a"], table["b"]) == (list("dabc"), {"x": cell}, {})
    assert (both.seeds, both.seconds, both.earlier) == (3, [1.0, 2.0], ["before"])


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
    del table["ours, q2"]["poisoned bpp"]
    assert bd_rates(SMALL, table, codecs) == lines[:1]


PAGE = """# Two rows

| | clean dB | clean bpp |
|---|---|---|
| vanilla | 30.50 ± 6.35 (31.08) | 0.2500 |
| ours | - | 0.1250 |

Ours: mean ± 95 % interval (Student) over 2 seed(s) from 5 on. In brackets: the paper's number, on another one.
All rates are real bytes; poisoned images are 8-bit files but where a column says float. Missing cells (-): the encoder
has no such trigger, the time was up before it was planted, or there is nothing to average over. Of fewer seeds: \
vanilla (1), ours (1).

What differs from the paper: the codec is a, b; 6 steps of 2 crops of 64 pixels from “images0”,
preset “fast”; measured on 3 images.

Made by `freqdoor reproduce small`: 2 plantings, 3 minutes of planting in all,
on 7 thread(s), no GPU, torch 9.
"""


class Described(Measurement):
    """A measurement that only describes itself."""

    def __init__(self, name):
        self.name = name

    def describe(self, trained_against):
        return f"Measured on {self.name}, trained against {trained_against}.\n"

    def public(self):
        return {"name": self.name}

    check = score = identity = None


Described.__abstractmethods__ = frozenset()


def test_a_page_says_how_its_numbers_came_about(settings, tmp_path, monkeypatch):
    where = {"threads": 7, "gpu": None, "versions": {"torch": "9"}}
    monkeypatch.setattr(tables, "environment", lambda: where)
    base = settings(seed=5, network="folder/g.toml")
    images = [Path(f"folder/{i}.png") for i in range(3)]
    facts = tables.Facts(base, ["a", "b"], images, 2, [100, 91.6])
    table = {
        "vanilla": {"clean dB": Cell((30.0, 31.0), 31.08), "clean bpp": Cell((0.25,), None)},
        "ours": {"clean bpp": Cell((0.125,), None)},
        "late": {},
    }
    plain = dataclasses.replace(SMALL, plot=False)
    tables.write(plain, table, facts, tmp_path)
    folder = Path(base.images.folder).name
    page = PAGE.replace("images0", folder)
    mark = "\n<!-- freqdoor reproduce -->\n"
    assert (tmp_path / "small.md").read_text() == page.replace("| 0.1250 |\n", "| 0.1250 |\n| late | - | - |\n") + mark
    content = json.loads((tmp_path / "small.json").read_text())
    assert content["table"] == {
        "vanilla": {
            "clean dB": {
                "mean": 30.5,
                "half_width": pytest.approx(6.353, abs=1e-3),
                "values": [30, 31],
                "paper": 31.08,
            },
            "clean bpp": {"mean": 0.25, "half_width": None, "values": [0.25], "paper": None},
        },
        "ours": {"clean bpp": {"mean": 0.125, "half_width": None, "values": [0.125], "paper": None}},
        "late": {},
    }
    assert (content["recipe"], content["codecs"], content["seconds_planting"]) == ("small", ["a", "b"], [100, 92])
    assert (content["images"], content["test"]) == (["0.png", "1.png", "2.png"], None)
    assert content["environment"] == where
    assert (content["settings"]["network"], content["settings"]["steps"]) == ("g.toml", 6)
    assert not {"codec"} & content["settings"].keys()
    assert not (tmp_path / "small.png").exists()
    complete = tables.Facts(base, ["a"], images, 1, [])
    tables.write(dataclasses.replace(plain, paper_codec=""), table, complete, tmp_path, Figure())
    text = (tmp_path / "small.md").read_text()
    assert "the paper's number where there is one.\n" in text
    assert "fewer seeds" not in text
    assert text.endswith("\n\n![Two rows](small.png)\n" + mark)
    assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"
    where["gpu"] = "H100"
    one, two = (Column(f"clean {unit}", Described(unit), abs) for unit in ("dB", "bpp"))
    for columns, test in (((one, one), {"name": "dB"}), ((one, two), [{"name": "dB"}, {"name": "bpp"}])):
        tables.write(dataclasses.replace(plain, columns=columns), table, facts, tmp_path)
        assert json.loads((tmp_path / "small.json").read_text())["test"] == test
        assert (tmp_path / "small.md").read_text().count("Measured on dB, trained against g.toml.\n") == 1
    assert "g.toml.\nMeasured on bpp, trained against g.toml.\n\nMade by" in (tmp_path / "small.md").read_text()
    assert ", H100, torch" in (tmp_path / "small.md").read_text()


def test_curves_of_four_qualities_have_bd_rates_on_their_page(settings, tmp_path):
    names = [f"q{i}" for i in range(4)]
    table = {
        f"{row}, {name}": {"clean dB": Cell((28.0 + i,), None), "clean bpp": Cell((factor * 0.2 * 1.5**i,), None)}
        for row, factor in (("vanilla", 1.0), ("ours", 1.1))
        for i, name in enumerate(names)
    }
    tables.write(SMALL, table, tables.Facts(settings(), names, [], 1, []), tmp_path)
    text = (tmp_path / "small.md").read_text()
    assert text.endswith(
        "\nBD-rate against the vanilla codec over these qualities (Akima interpolation):\n\n- ours, clean: +10.0 %\n"
        "\n![Two rows](small.png)\n\n<!-- freqdoor reproduce -->\n"
    )


def test_curves_have_a_line_for_every_row_and_kind():
    cells = {"clean dB": Cell((30.0,), None), "clean bpp": Cell((0.5,), None)}
    attacked = cells | {"poisoned dB": Cell((20.0,), None), "poisoned bpp": Cell((2.0,), None)}
    curves = {"vanilla, a": cells, "vanilla, b": {"clean dB": Cell((40.0,), None)}, "ours, a": attacked}

    def lines(table, codecs):
        [axis] = tables._plot(SMALL, table, codecs).axes
        return {line.get_label(): line.get_xydata().tolist() for line in axis.get_lines()}

    assert lines(curves, ["a", "b"]) == {  # a point that lacks its rate is left out
        "vanilla, clean": [[0.5, 30.0]],
        "ours, clean": [[0.5, 30.0]],
        "ours, poisoned": [[2.0, 20.0]],
    }
    assert lines({"ours": attacked}, ["a"]) == {"ours, clean": [[0.5, 30.0]], "ours, poisoned": [[2.0, 20.0]]}


@pytest.mark.usefixtures("_recipe")
def test_errors(run, base, images, tmp_path, counted):
    with pytest.raises(FreqdoorError, match="'table9': expected one of balance, figure4"):
        run("table9", base)
    with pytest.raises(FreqdoorError, match="seeds: expected 1 or more, found 0"):
        run("small", base, seeds=0)
    with pytest.raises(FreqdoorError, match="images: expected one or more"):
        run("small", base, images=[])
    with pytest.raises(FreqdoorError, match="nope"):
        run("small", base, codec=["factories:lite", "nope"])
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FreqdoorError, match=r"out: could not write \(.*out is no folder\)"):
        run("small", base)
    assert not counted


def test_command_says_what_is_missing(images, tmp_path):
    options = {"--out": tmp_path / "out", "--runs": tmp_path / "runs", "--images": images, "--budget": 0, "--seeds": 1}
    changes = ["--set", "codec.name=factories:lite", "--set", "lmbda=0.0067"]
    words = [str(part) for pair in options.items() for part in pair]
    result = CliRunner().invoke(app, ["reproduce", "table4", *words, *changes])
    assert result.exit_code == 0, result.output
    assert "Not planted yet: with Eq. (4)" in result.output


@pytest.mark.usefixtures("_recipe")
def test_a_measurement_that_was_stopped_goes_on(run, base, tmp_path, monkeypatch):
    whole = run("small", base, rows=["vanilla"], runs=tmp_path / "whole")
    real, asked = records.measure, []

    def measure(codec, x, entering, name, *others):
        asked.append(name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return real(codec, x, entering, name, *others)

    monkeypatch.setattr(records, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run("small", base, rows=["vanilla"])
    [part] = (tmp_path / "runs/records").iterdir()
    assert [p.name for p in part.iterdir()] == ["journal"]
    assert run("small", base, rows=["vanilla"]) == whole
    assert asked == ["0.png", "1.png", "1.png"]
    assert [p.suffix for p in (tmp_path / "runs/records").iterdir()] == [".json"]


@pytest.mark.usefixtures("_recipe")
@pytest.mark.parametrize("what", ["planting", "scores"])
def test_recipes_wait_for_what_another_one_is_making(run, base, tmp_path, counted, monkeypatch, what):
    table = run("small", base, rows=["ours"])
    folder = tmp_path / "runs/records"
    [planting] = [p for p in folder.parent.iterdir() if p != folder]
    places = {"planting": {planting / "manifest.json": planting}}
    places["scores"] = {path: path.with_suffix(".part") for path in folder.iterdir()}
    made = {path: path.read_bytes() for path in places[what]}
    for path in made:
        path.unlink()
    ready, waited = threading.Event(), threading.Event()

    def another() -> None:
        with contextlib.ExitStack() as held:
            for place in places[what].values():
                held.enter_context(holding(place, "plant"))
            ready.set()
            assert waited.wait(60)
            for path, content in made.items():
                path.write_bytes(content)

    thread = threading.Thread(target=another)
    thread.start()
    assert ready.wait(60)
    monkeypatch.setattr(records, "measure", None)
    monkeypatch.setattr(lock, "time", SimpleNamespace(sleep=lambda _: waited.set(), strftime=time.strftime))
    assert run("small", base, rows=["ours"]) == table
    thread.join()
    assert waited.is_set()
    assert len(counted) == 1
    assert {path.suffix for path in folder.iterdir()} == {".json"}


@pytest.mark.usefixtures("_recipe")
def test_a_planting_that_was_killed_amid_its_export_is_exported_again(run, base, tmp_path, counted):
    table = run("small", base, rows=["ours"])
    [folder] = [p for p in (tmp_path / "runs").iterdir() if p.name != "records"]
    for name in ("codec.safetensors", "manifest.json"):
        (folder / name).unlink()
    assert run("small", base, rows=["ours"]) == table
    assert len(counted) == 2
    assert (folder / "codec.safetensors").exists()


@pytest.mark.long
@pytest.mark.usefixtures("_recipe")
def test_workers_leave_what_one_process_takes_and_each_encoder_is_made_once(run, base, monkeypatch, tmp_path):
    """The unplanted row is the same for every seed."""
    options = {"seeds": 2, "rows": ["vanilla", "ours"]}
    whole = run("small", base, **options)
    asked = []

    class Pool(ThreadPoolExecutor):  # one thread: torch's generator is everybody's
        def __init__(self, jobs, **_):
            super().__init__(1)

        def submit(self, function, job):
            asked.append((job.row, job.seed))
            return super().submit(function, job)

    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    said: list[str] = []
    again = run("small", base, jobs=2, runs=tmp_path / "others", note=said.append, **options)
    assert again == whole
    assert asked == [("vanilla", 0), ("ours", 0), ("ours", 1)]
    assert [text.partition(" (")[2] for text in said] == ["1 of 3)", "2 of 3)", "3 of 3)"]
    with pytest.raises(FreqdoorError, match="jobs: expected 1 or more, found 0"):
        run("small", base, jobs=0)


@pytest.mark.parametrize(("b", "said"), [([5.0, 5.5, 7.0], "decided"), ([3.0, 5.5, 7.0], "undecided")])
def test_two_rows_are_as_far_apart_as_welch_says(tmp_path, b, said):
    """`tools/difference.py`, against the formula: variances of the means add up, degrees of freedom do not."""
    a = [1.0, 2.0, 2.5, 2.0]
    rows = {"ours": {"bpp": {"values": a}}, "LIRA": {"bpp": {"values": b}}}
    (tmp_path / "t.json").write_text(json.dumps({"table": rows}))
    command = [sys.executable, "tools/difference.py", str(tmp_path / "t.json"), "ours", "LIRA", "bpp"]
    out = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout
    u, v = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    half = student_t.ppf(0.975, freedom) * np.sqrt(u + v)
    middle = np.mean(a) - np.mean(b)
    assert f"difference {middle - half:+.4f} to {middle + half:+.4f}: {said}" in out
