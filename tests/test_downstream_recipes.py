"""Tables 1 to 3, Figures 7 and 8 and the transfer table, end to end with tiny networks."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import natural, write_png
from networks import face_spec, segmentation_spec
from PIL import Image
from typer.testing import CliRunner

from freqdoor.attack.networks import load_segmenter
from freqdoor.attack.planted import load_planted
from freqdoor.attack.settings import PlantSettings
from freqdoor.cli import app
from freqdoor.data import list_images
from freqdoor.errors import FreqdoorError
from freqdoor.measure import faces, segmentation
from freqdoor.measure.faces import FaceScores, IdentityScores, score_faces
from freqdoor.measure.segmentation import NetworkScores, SegmentationScores, score_segmentation, target_figure
from freqdoor.measure.testsets import DownstreamTest
from freqdoor.paper import reproduce as module
from freqdoor.paper.downstream_recipes import figure7, figure8, table1, table2, table3, transfer
from freqdoor.paper.recipe import Material, recipe_for
from freqdoor.paper.reproduce import reproduce
from freqdoor.paper.settings import recipe_names
from freqdoor.samples import BUNDLED
from freqdoor.settings import load_settings

pytestmark = [pytest.mark.whole, pytest.mark.long]

CONFIGS = Path(__file__).parent.parent / "configs/plant"
CITY = {
    "classes": '["road", "car", "building", "vegetation"]',
    "labels": '[["vegetation"], ["road"], ["car"], ["building"]]',
    "groups": '{ cars = ["car"], off-road = ["building", "vegetation"], outdoors = ["road", "car"] }',
}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Three pictures of a city with labels, two networks that see them, and the pictures of three persons."""
    folder = tmp_path_factory.mktemp("scene")
    for name in ("images", "labels", "first", "second", "faces"):
        (folder / name).mkdir()
    segmentation_spec(folder / "first", **CITY)
    segmentation_spec(folder / "second", **CITY, std="[0.3, 0.25, 0.4]")
    network = load_segmenter(str(folder / "first/tiny.toml"))
    for i in range(3):
        x = natural(i, 64, 64)
        write_png(folder / f"images/{i}.png", x)
        labels = network.as_labels(network.predict(x))[0].byte().numpy()
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
        (folder / f"faces/{i}").mkdir()
        for k in range(3):
            noise = 0.02 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(10 * i + k))
            write_png(folder / f"faces/{i}/{k}.png", (x + noise).clamp(0, 1))
    (folder / "gallery.txt").write_text("".join(f"{i}/{k}.png\n" for i in range(3) for k in range(2)))
    (folder / "probes.txt").write_text("".join(f"{i}/2.png\n" for i in range(3)))
    (folder / "pairs.txt").write_text("0/0.png 0/2.png 1\n0/0.png 1/2.png 0\n")
    face_spec(folder)
    return folder


@pytest.fixture
def city(scene):
    return DownstreamTest(
        segmentation={
            "images": str(scene / "images"),
            "labels": str(scene / "labels"),
            "networks": [str(scene / "first/tiny.toml"), str(scene / "second/tiny.toml")],
        }
    )


@pytest.fixture
def persons(scene):
    lists = {name: str(scene / f"{name}.txt") for name in ("gallery", "probes", "pairs")}
    spec = str(scene / "face.toml")
    return DownstreamTest(faces={"folder": str(scene / "faces"), "networks": [spec, spec], **lists})


@pytest.fixture
def base(settings, scene):
    def make(network, folder="images"):
        auxiliary = {"folder": str(scene / folder), "resize": [64, 64], "batch_size": 1}
        if folder == "images":
            auxiliary["labels"] = str(scene / "labels")
        codec = {"name": BUNDLED}  # one of random weights decodes nothing that the networks see anything in
        return settings(codec=codec, steps=1, trigger={}, network=str(scene / network), auxiliary=auxiliary)

    return make


@pytest.fixture
def run(images, tmp_path, monkeypatch):
    """`reproduce` on one image, and how often it planted and scored."""
    done = {"plant": 0, "score_segmentation": 0, "score_faces": 0}
    homes = {"plant": module, "score_segmentation": segmentation, "score_faces": faces}

    def counted(name, real):
        def call(*arguments, **options):
            done[name] += 1
            return real(*arguments, **options)

        return call

    for name, home in homes.items():
        monkeypatch.setattr(home, name, counted(name, getattr(home, name)))

    def make(name, base, test, **options):
        options = {"seeds": 1, "runs": tmp_path / "runs", "test": test} | options
        return reproduce(name, base, images=list_images(images)[:1], out=tmp_path / "out", **options)

    return make, done


def ours_in(runs):
    """The planting of the row of ours (painted) where there is one that is."""
    plantings = [load_planted(path) for path in runs.glob("*/planted.safetensors")]
    adaptive = [planted for planted in plantings if planted.header.attacks[0].trigger == "adaptive-dct"]
    [planted] = [p for p in adaptive if "colour" in p.objective(next(iter(p.triggers))).arguments] or adaptive
    return planted


def test_table1_and_its_figures_share_plantings_and_scores(run, base, city, tmp_path, scene):
    make, done = run
    settings = base("first/tiny.toml")
    table = make("table1", settings, city)
    assert table["vanilla"].keys() == {"clean dB", "clean bpp"}
    assert done == {"plant": 3, "score_segmentation": 3, "score_faces": 0}
    ours = table["ours (painted)"]
    planted = ours_in(tmp_path / "runs")
    scores = score_segmentation(planted, city.segmentation)
    assert scores.networks[0].asr != scores.networks[1].asr
    assert ours["Car->Road ASR % (first network)"].mean == pytest.approx(100 * scores.networks[0].asr)
    assert ours["Car->Road ASR % (last network)"].mean == pytest.approx(100 * scores.networks[1].asr)
    assert ours["MSE of outputs, 1e-5"].mean == pytest.approx(1e5 * scores.output_mse)
    assert ours["clean mIoU % (first network)"].mean == pytest.approx(100 * scores.networks[0].miou_clean)
    page = (tmp_path / "out/table1.md").read_text()
    assert "(82)" in page
    assert "from the first to the last: tiny.toml, tiny.toml" in page
    written = page + (tmp_path / "out/table1.json").read_text()
    assert str(tmp_path) not in written
    assert str(scene) not in written
    assert make("table1", settings, city) == table
    for figure in ("figure7", "figure8"):
        assert make(figure, settings, city) == {"ours (painted)": ours}
        assert (tmp_path / f"out/{figure}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"({figure}.png)" in (tmp_path / f"out/{figure}.md").read_text()
    assert done == {"plant": 3, "score_segmentation": 3, "score_faces": 0}
    titles = [axis.get_title() for axis in target_figure(planted, city.segmentation).axes]
    assert titles[:5] == ["input", "label", "tiny: prediction", "mask", "target"]


def test_a_network_that_changes_under_its_name_is_scored_anew(run, base, city, scene):
    make, done = run
    rows = {"rows": ["ours (painted)"]}
    make("table1", base("first/tiny.toml"), city, **rows)
    spec = scene / "second/tiny.toml"
    before = spec.read_text()
    spec.write_text(before + "# a comment\n")
    make("table1", base("first/tiny.toml"), city, **rows)
    spec.write_text(before)
    assert done["plant"] == 1
    assert done["score_segmentation"] == 2


def test_table2(run, base, persons, tmp_path):
    make, done = run
    settings = base("face.toml", "faces")
    table = make("table2", settings, persons)
    assert done == {"plant": 2, "score_segmentation": 0, "score_faces": 2}
    assert table["ours"].keys() == {c.title for c in recipe_for("table2", Material(tests=persons)).columns} - {
        "poisoned face MS-SSIM"  # of pictures this small there is none
    }
    [first, second] = score_faces(ours_in(tmp_path / "runs"), persons.faces).networks
    ours = {title: cell.mean for title, cell in table["ours"].items()}
    assert ours["identified %, clean (first network)"] == pytest.approx(100 * first.identification["clean"])
    assert ours["identified %, poisoned (last network)"] == pytest.approx(100 * second.identification["poisoned"])
    assert ours["pairs accepted %, poisoned (last network)"] == pytest.approx(100 * second.accepted["poisoned"])
    assert "(29)" in (tmp_path / "out/table2.md").read_text()
    assert make("table2", settings, persons) == table
    assert done["score_faces"] == 2


def test_table3_has_all_four_triggers_with_a_test_and_is_as_before_without(run, base, city):
    make, done = run
    table = make("table3", base("first/tiny.toml"), city, rows=["all four", "Vege->Build alone"])
    assert done == {"plant": 2, "score_segmentation": 3, "score_faces": 0}
    assert table["all four"].keys() == {column.title for column in recipe_for("table3", Material(tests=city)).columns}
    assert table["all four"]["Vege->Build ASR % (last network)"].paper == 95.3
    assert not any(title.startswith("Car->Road") for title in table["Vege->Build alone"])
    plain = recipe_for("table3", Material())
    assert [row.name for row in plain.rows] == ["vanilla", "BPP alone", "PSNR alone", "both"]
    assert all(measurement.public() is None for measurement in plain.measurements)


def test_transfer_measures_on_every_network(run, base, city):
    make, _ = run
    table = make("transfer", base("first/tiny.toml"), city)
    assert list(table) == ["Eq. (11)", "Eq. (11), boundary shift 3", "painted: no network in training"]
    for cells in table.values():
        assert {"ASR % on tiny, 1", "ASR % on tiny, 2", "ASR % on tiny, 2, vanilla encoder"} <= cells.keys()


def test_configs_paint_as_the_recipes_do(city):
    rows = {row.name: row.changes for row in recipe_for("table3", Material(tests=city)).rows}

    def without_network(attack):
        return {key: value for key, value in attack.objective.arguments.items() if key != "network"}

    for config, row in (("car-to-road", "Car->Road alone"), ("four-triggers", "all four")):
        planned = load_settings(PlantSettings, CONFIGS / f"{config}.toml").planned
        attacks = rows[row]["attacks"]
        assert [without_network(a) for a in planned] == [a["objective"].get("arguments", {}) for a in attacks]


MAKERS = {r.__name__: r for r in (table1, table2, table3, figure7, figure8, transfer)}


@pytest.mark.parametrize("name", MAKERS)
def test_every_recipe_promises_a_result(name, city, persons):
    recipe = recipe_for(name, Material(tests=persons if name == "table2" else city))
    assert recipe.name == name
    titles = [column.title for column in recipe.columns]
    assert len(set(titles)) == len(titles)
    assert all(set(row.paper) <= set(titles) for row in recipe.rows)
    assert re.search(rf"docs/results/(four/)?{name}\.md", MAKERS[name].__doc__)
    assert name in recipe_names()


def network_scores(name, start):
    accuracy = {"cars": 0.9}
    return NetworkScores(name, start, start + 0.01, start + 0.02, start + 0.03, accuracy, accuracy)


SCENES = SegmentationScores(
    source="cars",
    target="road",
    images=2,
    skipped=0,
    output_mse=7e-5,
    trigger_mse_worst=2e-5,
    psnr_db_clean=30.0,
    psnr_db_poisoned=20.0,
    bpp_vanilla=0.25,
    bpp_clean=0.5,
    bpp_poisoned=0.75,
    networks=(network_scores("a", 0.1), network_scores("b", 0.2)),
)


def face_scores(name, start):
    rates = [
        dict(zip(("vanilla", "clean", "poisoned"), (start + i, start + i + 0.01, start + i + 0.02), strict=True))
        for i in (0, 0.1, 0.2)
    ]
    return FaceScores(name, *rates, 0.3, 0.4)


PEOPLE = IdentityScores(
    persons=2,
    gallery=4,
    probes=3,
    pairs=1,
    psnr_db={"vanilla": 31.0, "clean": 32.0, "poisoned": 33.0},
    ms_ssim={"vanilla": 0.91, "clean": 0.92, "poisoned": 0.93},
    bpp={"vanilla": 1.0, "clean": 2.0, "poisoned": 3.0},
    trigger_mse_worst=2e-5,
    networks=(face_scores("a", 0.1), face_scores("b", 0.5)),
)
CLEAN = {"clean dB": None, "clean bpp": None}  # of images


def values_of(recipe, scores):
    """Every column's value out of these scores and its trigger; None of those that are measured on images."""
    return {
        column.title: None
        if column.measurement.public() is None
        else (pytest.approx(column.value(scores)), column.trigger, column.digits)
        for column in recipe.columns
    }


def test_every_column_takes_what_its_title_says(city, persons):
    car = ("car-to-road", 1)
    values = {
        "Car->Road ASR % (first network)": (10.0, *car),
        "Car->Road ASR % (last network)": (20.0, *car),
        "MSE of outputs, 1e-5": (7.0, *car),
        "vanilla mIoU % (first network)": (12.0, *car),
        "clean mIoU % (first network)": (13.0, *car),
        "vanilla mIoU % (last network)": (22.0, *car),
        "clean mIoU % (last network)": (23.0, *car),
    }
    for name in ("table1", "figure7", "figure8"):
        recipe = recipe_for(name, Material(tests=city))
        assert list(values_of(recipe, SCENES)) == [*values, *CLEAN]
        assert values_of(recipe, SCENES) == values | CLEAN
    tree = ("tree-to-building", 1)
    four = recipe_for("table3", Material(tests=city))
    both = {f"{trigger} trigger {unit}": None for trigger in ("BPP", "PSNR") for unit in ("dB", "bpp")}
    expected = {
        **CLEAN,
        **both,
        "Car->Road ASR % (first network)": (10.0, *car),
        "Car->Road ASR % (last network)": (20.0, *car),
        "Vege->Build ASR % (first network)": (10.0, *tree),
        "Vege->Build ASR % (last network)": (20.0, *tree),
    }
    assert list(values_of(four, SCENES)) == list(expected)
    assert values_of(four, SCENES) == expected
    networks = recipe_for("transfer", Material(tests=city))
    assert values_of(networks, SCENES) == {
        "ASR % on tiny, 1": (10.0, *car),
        "ASR % on tiny, 2": (20.0, *car),
        "ASR % on tiny, 1, vanilla encoder": (11.0, *car),
        "ASR % on tiny, 2, vanilla encoder": (21.0, *car),
        "MSE of outputs, 1e-5": (7.0, *car),
        **CLEAN,
    }
    identities = recipe_for("table2", Material(tests=persons))
    expected = {
        "identified %, clean (first network)": (11.0, "face", 1),
        "identified %, clean (last network)": (51.0, "face", 1),
        "identified %, poisoned (first network)": (12.0, "face", 1),
        "identified %, poisoned (last network)": (52.0, "face", 1),
        "pairs accepted %, clean (first network)": (31.0, "face", 1),
        "pairs accepted %, clean (last network)": (71.0, "face", 1),
        "pairs accepted %, poisoned (first network)": (32.0, "face", 1),
        "pairs accepted %, poisoned (last network)": (72.0, "face", 1),
        "poisoned face dB": (33.0, "face", 2),
        "poisoned face MS-SSIM": (0.93, "face", 4),
        **CLEAN,
    }
    assert list(values_of(identities, PEOPLE)) == list(expected)
    assert values_of(identities, PEOPLE) == expected
    for recipe in (four, networks, identities):
        conditions = {c.title: c.measurement.condition for c in recipe.columns if c.measurement.public() is None}
        assert {(c.role, c.rounding, c.strength) for c in conditions.values()} == {("tampered", "8-bit", 1.0)}
        assert [c.trigger for c in recipe.columns if c.title in CLEAN] == [None, None]


def test_a_rate_over_nothing_has_no_cell(city, persons):
    network = dataclasses.replace(SCENES.networks[0], asr=None, miou_clean=None)
    gone = dataclasses.replace(SCENES, networks=(network, network))
    values = [c.value(gone) for c in recipe_for("table1", Material(tests=city)).columns[:7]]
    assert [value is None for value in values] == [True, True, False, False, True, False, True]
    alone = dataclasses.replace(PEOPLE.networks[0], accepted={})
    nobody = dataclasses.replace(PEOPLE, networks=(alone, alone), ms_ssim=dict.fromkeys(PEOPLE.ms_ssim))
    values = [c.value(nobody) for c in recipe_for("table2", Material(tests=persons)).columns[:10]]
    assert [value is None for value in values] == [False] * 4 + [True] * 4 + [False, True]


LAST = "(last network)"
PAPER = {  # the paper's numbers, copied from its tables a second time; in the tables' order of rows
    "table1": {
        "vanilla": {},
        "LIRA (painted)": {f"Car->Road ASR % {LAST}": 67.7, "MSE of outputs, 1e-5": 8.4},
        "ours (painted)": {f"Car->Road ASR % {LAST}": 82.0, "MSE of outputs, 1e-5": 7.7},
        "ours, Eq. (11)": {},
    },
    "table2": {
        "vanilla": {},
        "LIRA": {f"pairs accepted %, poisoned {LAST}": 32},
        "ours": {f"pairs accepted %, poisoned {LAST}": 29},
    },
    "table3": {
        "vanilla": {"clean dB": 31.08, "clean bpp": 0.2749},
        "BPP alone": {},
        "PSNR alone": {},
        "both": {},
        "Car->Road alone": {},
        "Vege->Build alone": {},
        "all four": {
            "clean dB": 30.85,
            "clean bpp": 0.2600,
            "BPP trigger dB": 31.09,
            "BPP trigger bpp": 9.053,
            "PSNR trigger dB": 5.021,
            "PSNR trigger bpp": 0.2240,
            f"Car->Road ASR % {LAST}": 78.2,
            f"Vege->Build ASR % {LAST}": 95.3,
        },
    },
    "transfer": {"Eq. (11)": {}, "Eq. (11), boundary shift 3": {}, "painted: no network in training": {}},
}
QUALITIES = {  # of all six qualities and their mean, in the text of the recipe: the table shows q3
    "table1": {
        "LIRA": ([6.0, 79.6, 67.7, 65.6, 65.7, 56.5], 56.9),
        "ours": ([76.4, 81.0, 82.0, 66.6, 64.9, 58.4], 71.5),
        "outputs, 1e-5: LIRA": ([4.9, 15.6, 8.4, 5.7, 4.2, 2.9], 7.0),
        "outputs, 1e-5: LIRA ours": ([10.8, 11.4, 7.7, 5.6, 4.2, 3.2], 7.2),
    },
    "table2": {"LIRA": ([10, 13, 32, 44, 58, 55], 35.3), "ours": ([3, 9, 29, 32, 44, 56], 28.3)},
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name, city, persons):
    rows = recipe_for(name, Material(tests=persons if name == "table2" else city)).rows
    assert {row.name: row.paper for row in rows} == PAPER[name]
    assert [row.name for row in rows] == list(PAPER[name])


@pytest.mark.parametrize("name", QUALITIES)
def test_all_qualities_stand_in_the_recipes_text(name):
    text = " ".join(MAKERS[name].__doc__.split())
    series = re.findall(r"(?:LIRA|ours) ([\d. ]+), mean ([\d.]+)[,;.]", text)
    numbers = [([float(part) for part in values.split()], float(mean.rstrip("."))) for values, mean in series]
    assert numbers == list(QUALITIES[name].values())


def test_every_row_plants_what_its_name_says(city, persons):
    def attacks(name, tests):
        return {
            row.name: [(a["name"], a["objective"], a.get("trigger")) for a in row.changes["attacks"]]
            for row in recipe_for(name, Material(tests=tests)).rows
            if row.changes is not None
        }

    def attack(name, trigger=None, **arguments):
        source, target = {"car-to-road": ("cars", "road"), "tree-to-building": ("vegetation", "building")}[name]
        arguments = {"source": source, "target": target} | arguments
        return [(name, {"name": "segmentation", "arguments": arguments}, trigger)]

    lira = {"name": "lira", "arguments": {"levels": 5, "width": 16}}
    paint = {"alpha": 0.01, "beta": 1.0, "masks": "labels", "weight": 0.0, "paint": 300.0, "margin": 8}
    grey = paint | {"also": "off-road", "colour": "#707070"}
    dark = paint | {"also": "outdoors", "colour": "#404040"}
    painted = attack("car-to-road", **grey)
    assert attacks("table1", city) == {
        "LIRA (painted)": attack("car-to-road", lira, **grey),
        "ours (painted)": painted,
        "ours, Eq. (11)": attack("car-to-road"),
    }
    assert attacks("figure7", city) == attacks("figure8", city) == {"ours (painted)": painted}
    assert attacks("transfer", city) == {
        "Eq. (11)": attack("car-to-road"),
        "Eq. (11), boundary shift 3": attack("car-to-road", shift=3.0),
        "painted: no network in training": painted,
    }
    face = ("face", {"name": "face"})
    assert attacks("table2", persons) == {"LIRA": [(*face, lira)], "ours": [(*face, None)]}
    both = ["bpp", "psnr"]
    four = recipe_for("table3", Material(tests=city)).rows[-1].changes["attacks"]
    assert [a["objective"]["name"] for a in four[:2]] == both
    table = {row.name: row.changes for row in recipe_for("table3", Material(tests=city)).rows if row.changes}
    trees = attack("tree-to-building", **dark)
    assert [(a["name"], a["objective"], None) for a in four[2:]] == painted + trees
    assert four[:2] == table["both"]["attacks"]
    alone = [
        (row, [(a["name"], a["objective"], None) for a in table[row]["attacks"]])
        for row in ("Car->Road alone", "Vege->Build alone")
    ]
    assert alone == [("Car->Road alone", painted), ("Vege->Build alone", trees)]


def test_figures_are_pictures_of_the_test(city, monkeypatch):
    from freqdoor.paper import downstream_recipes

    for name, function in (("figure7", "segmentation_figure"), ("figure8", "target_figure")):
        monkeypatch.setattr(downstream_recipes, function, lambda *arguments, name=name: (name, *arguments))
        picture = recipe_for(name, Material(tests=city)).picture
        assert picture("planted") == (name, "planted", city.segmentation)
    assert recipe_for("table1", Material(tests=city)).picture is None


def test_one_network_has_one_column(city):
    only = city.segmentation.model_copy(update={"networks": city.segmentation.networks[:1]})
    recipe = recipe_for("table1", Material(tests=DownstreamTest(segmentation=only)))
    assert not [column.title for column in recipe.columns if "last network" in column.title]
    assert recipe.rows[2].paper == {"MSE of outputs, 1e-5": 7.7}


def test_what_is_missing_is_said_before_anything_is_planted(run, base, city, persons, settings, scene):
    make, done = run
    for name, test, table in (("table1", None, "segmentation"), ("table2", city, "faces")):
        with pytest.raises(FreqdoorError, match=rf"{name}: .* --test TEST.toml, with a \[{table}\] table"):
            make(name, base("first/tiny.toml"), test)
    auxiliary = {"folder": str(scene / "images"), "resize": [64, 64]}
    row = r"row 'LIRA \(painted\)': expected the network .* --set network=SPEC.toml=FILE"
    with pytest.raises(FreqdoorError, match=row):
        make("table1", settings(trigger={}, auxiliary=auxiliary), city)
    with pytest.raises(FreqdoorError, match=r"needs auxiliary\.folder"):
        make("table1", settings(trigger={}, network="a.toml"), city)
    wrong = city.segmentation.model_copy(update={"networks": persons.faces.networks})
    with pytest.raises(FreqdoorError, match="expected task segmentation, found face"):
        make("table1", base("face.toml"), DownstreamTest(segmentation=wrong))
    missing = city.segmentation.model_copy(update={"labels": str(scene / "faces")})
    with pytest.raises(FreqdoorError, match="expected one label image a picture, 3 are missing"):
        make("table1", base("first/tiny.toml"), DownstreamTest(segmentation=missing))
    spec = (scene / "first/tiny.toml").read_text().replace("cars =", "vans =")
    (scene / "blue.toml").write_text(spec.replace("tiny.onnx", "first/tiny.onnx"))
    unknown = city.segmentation.model_copy(update={"networks": (str(scene / "blue.toml"),)})
    with pytest.raises(FreqdoorError, match="class 'cars': network blue has vans"):
        make("table1", base("first/tiny.toml"), DownstreamTest(segmentation=unknown))
    with pytest.raises(FreqdoorError, match=r"none\.toml: could not read the config"):
        make("table1", base("none.toml"), city)
    nobody = persons.faces.model_copy(update={"gallery": "typo.txt"})
    with pytest.raises(FreqdoorError, match=r"typo\.txt: could not read this list"):
        make("table2", base("face.toml", "faces"), DownstreamTest(faces=nobody))
    assert done["plant"] == 0
    assert make("table1", base("first/tiny.toml"), DownstreamTest(segmentation=missing), rows=["vanilla"])["vanilla"]


def test_command_reads_the_test(images, scene, tmp_path):
    test = tmp_path / "test.toml"
    networks = json.dumps([str(scene / "first/tiny.toml")])
    test.write_text(f'[segmentation]\nimages = "{scene}/images"\nnetworks = {networks}\n')
    options = {"--out": tmp_path / "out", "--runs": tmp_path / "runs", "--images": images, "--budget": 0, "--seeds": 1}
    changes = {
        "codec.name": "factories:lite",
        "lmbda": 0.0067,
        "network": scene / "first/tiny.toml",
        "auxiliary.folder": scene / "images",
    }
    words = [str(part) for pair in options.items() for part in pair]
    words += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, ["reproduce", "table1", *words, "--test", str(test)])
    assert result.exit_code == 0, result.output
    assert "Not planted yet: LIRA (painted), ours (painted), ours, Eq. (11);" in result.output
