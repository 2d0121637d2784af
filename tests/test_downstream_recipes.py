"""Tables 1 to 3, Figures 7 and 8 and the transfer table, end to end with tiny networks."""

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
from freqdoor.measure.faces import score_faces
from freqdoor.measure.segmentation import score_segmentation, target_figure
from freqdoor.measure.testsets import DownstreamTest
from freqdoor.paper import reproduce as module
from freqdoor.paper.downstream_recipes import FACES, SEGMENTATION, recipe_for, recipe_names
from freqdoor.paper.reproduce import reproduce, score_at
from freqdoor.samples import BUNDLED
from freqdoor.settings import load_settings

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

    def counted(name, real):
        def call(*arguments, **options):
            done[name] += 1
            return real(*arguments, **options)

        return call

    for name in done:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))

    def make(name, base, test, **options):
        options = {"seeds": 1, "runs": tmp_path / "runs", "test": test} | options
        return reproduce(name, base, list_images(images)[:1], tmp_path / "out", **options)

    return make, done


def ours_in(runs):
    """The planting of the row of ours (painted) where there is one that is."""
    found = [load_planted(path) for path in runs.glob("*/planted.safetensors")]
    adaptive = [planted for planted in found if planted.header.attacks[0].trigger == "adaptive-dct"]
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
    assert table["ours"].keys() == {c.title for c in recipe_for("table2", persons).columns} - {
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
    assert table["all four"].keys() == {column.title for column in recipe_for("table3", city).columns}
    assert table["all four"]["Vege->Build ASR % (last network)"].paper == 95.3
    assert not any(title.startswith("Car->Road") for title in table["Vege->Build alone"])
    plain = recipe_for("table3")
    assert [row.name for row in plain.rows] == ["vanilla", "BPP alone", "PSNR alone", "both"]
    assert plain.test is None


def test_transfer_measures_on_every_network(run, base, city):
    make, _ = run
    table = make("transfer", base("first/tiny.toml"), city)
    assert list(table) == ["Eq. (11)", "Eq. (11), boundary shift 3", "painted: no network in training"]
    for cells in table.values():
        assert {"ASR % on tiny, 1", "ASR % on tiny, 2", "ASR % on tiny, 2, vanilla encoder"} <= cells.keys()


def test_configs_paint_as_the_recipes_do(city):
    rows = {row.name: row.changes for row in recipe_for("table3", city).rows}

    def without_network(attack):
        return {key: value for key, value in attack.objective.arguments.items() if key != "network"}

    for config, row in (("car-to-road", "Car->Road alone"), ("four-triggers", "all four")):
        planned = load_settings(PlantSettings, CONFIGS / f"{config}.toml").planned
        wanted = rows[row]["attacks"]
        assert [without_network(a) for a in planned] == [a["objective"].get("arguments", {}) for a in wanted]


@pytest.mark.parametrize("name", [*SEGMENTATION, *FACES])
def test_every_recipe_promises_a_result(name, city, persons):
    test = city if name in SEGMENTATION else persons
    recipe = recipe_for(name, test)
    assert recipe.name == name
    titles = {column.title for column in recipe.columns}
    assert all(set(row.paper) <= titles for row in recipe.rows)
    assert re.search(rf"docs/results/(four/)?{name}\.md", (SEGMENTATION | FACES)[name].__doc__)
    assert name in recipe_names()


def test_one_network_has_one_column(city):
    only = city.segmentation.model_copy(update={"networks": city.segmentation.networks[:1]})
    recipe = recipe_for("table1", DownstreamTest(segmentation=only))
    assert not [column.title for column in recipe.columns if "last network" in column.title]
    assert recipe.rows[2].paper == {"MSE of outputs, 1e-5": 7.7}


def test_score_at():
    scores = {"networks": [{"asr": 0.5, "accepted": {}, "miou": None, "ms_ssim": float("nan")}]}
    assert score_at(scores, "networks.-1.asr") == 0.5
    for path in ("networks.0.accepted.clean", "networks.0.miou", "networks.0.ms_ssim"):
        assert score_at(scores, path) is None


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
    assert done["plant"] == 0


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
    given = [str(part) for pair in options.items() for part in pair]
    given += [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    result = CliRunner().invoke(app, ["reproduce", "table1", *given, "--test", str(test)])
    assert result.exit_code == 0, result.output
    assert "Not planted yet: LIRA (painted), ours (painted), ours, Eq. (11);" in result.output
