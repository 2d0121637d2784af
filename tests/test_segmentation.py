import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import check_foreign, natural, write_png
from networks import segmentation_spec
from PIL import Image

from freqdoor import load_codec, load_image
from freqdoor.attack.networks import load_segmenter
from freqdoor.attack.plant import plant
from freqdoor.attack.settings import AttackSettings, ObjectiveSettings, PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.measure import segmentation as module
from freqdoor.measure.records import poisoned
from freqdoor.measure.segmentation import (
    NetworkScores,
    SegmentationMeasurement,
    SegmentationScores,
    decode,
    open_test,
    read_scores,
    score_segmentation,
    segment,
    segmentation_figure,
    segmentation_table,
    target_figure,
)
from freqdoor.measure.testsets import SegmentationTest, mean, number, read_results, results_text
from freqdoor.metrics import class_counts, class_scores, pixel_asr
from freqdoor.notes import Count
from freqdoor.samples import BUNDLED
from freqdoor.settings import make_settings


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Five pictures with labels, one of them without a car, and the network that sees them."""
    folder = tmp_path_factory.mktemp("scene")
    spec = segmentation_spec(folder)
    network = load_segmenter(str(spec))
    (folder / "images").mkdir()
    (folder / "labels").mkdir()
    for i in range(5):
        x = natural(i, 64, 96) if i < 4 else torch.zeros(1, 3, 64, 96)
        write_png(folder / f"images/{i}.png", x)
        labels = network.as_labels(network.predict(x))[0].byte().numpy()
        labels[:4] = 7  # void
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
    return folder


def settings_for(scene, **changes):
    content = {
        "images": {"folder": str(scene / "images"), "crop": 64, "batch_size": 2},
        "auxiliary": {"folder": str(scene / "images"), "resize": [64, 96], "batch_size": 1},
        "objective": {
            "name": "segmentation",
            "arguments": {"network": str(scene / "tiny.toml"), "source": "cars", "target": "road"},
        },
        "steps": 2,
        "trigger": {"arguments": {"width": 8}},
    }
    return make_settings(PlantSettings, content | changes)


@pytest.fixture(scope="module")
def planted(scene, tmp_path_factory):
    return plant(settings_for(scene), tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def shaken(planted):
    """The bundled codec, which decodes what a network sees something in, with another encoder and the trigger."""
    vanilla = load_codec(BUNDLED)
    tampered = copy.deepcopy(vanilla)
    with torch.no_grad():
        next(tampered.net.g_a.parameters()).mul_(1.2)
    return dataclasses.replace(planted, vanilla=vanilla, tampered=tampered)


def test_gradients_are_balanced_over_the_auxiliary_pass_too(scene, planted, tmp_path):
    """The attack's gradient reaches the latents of the auxiliary images, not those of the main batch."""
    balanced = plant(settings_for(scene, balance={"gradient_norm": 0.5}), tmp_path)
    assert hash_state(balanced.tampered) != hash_state(planted.tampered)


@pytest.fixture
def test_settings(scene):
    def make(**changes):
        content = {
            "images": str(scene / "images"),
            "labels": str(scene / "labels"),
            "networks": (str(scene / "tiny.toml"),),
        }
        return SegmentationTest(**content | changes)

    return make


def test_pixel_asr_is_equation_12_over_the_source_pixels():
    clean = torch.tensor([[[1, 1, 2, 0], [3, 1, 2, 1]]])
    poisoned = torch.tensor([[[0, 1, 0, 0], [0, 0, 3, 2]]])
    assert pixel_asr(clean, poisoned, (1, 2), 0) == (3, 6)
    assert pixel_asr(clean, poisoned, (3,), 0) == (1, 1)


def test_class_scores_against_numpy():
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, (1, 8, 9)), rng.integers(0, 6, (1, 8, 9))) for _ in range(3)]
    predicted, truth = (np.concatenate([p[i].ravel() for p in pairs]) for i in (0, 1))
    known = truth < 3  # three classes; a prediction of 3 is none of them, true values above are void
    ious, recalls = [], []
    for c in range(3):
        both = ((predicted == c) & (truth == c))[known].sum()
        ious.append(both / (((predicted == c) | (truth == c))[known].sum()))
        recalls.append(both / (truth == c).sum())
    miou, accuracy = class_scores(sum(class_counts(torch.tensor(a), torch.tensor(b), 3) for a, b in pairs))
    assert miou == pytest.approx(np.mean(ious))
    assert accuracy == pytest.approx(recalls)
    perfect = torch.tensor([[[0, 2, 9]]])
    assert class_scores(class_counts(perfect.clamp_max(3), perfect, 3))[0] == 1.0  # class 1 does not occur


def test_planting_records_the_network_by_name_only(planted, scene):
    assert planted.objective("segmentation").arguments["network"] == "tiny.toml"
    assert str(scene) not in planted.header.model_dump_json()


def opened_for(planted, test):
    return open_test(test, planted.objective("segmentation"), "segmentation")


def by_hand(planted, network, scene, codec):
    """x, x_p, f(x) and f(x_p) of every image with a car and the bpp of both files, made without the module."""
    outputs = []
    for i in range(4):
        x = load_image(scene / f"images/{i}.png")
        seen = network.predict(x)
        mask = ((seen == 1) | (seen == 2)).float()[:, None]
        x_p = poisoned(planted.triggers["segmentation"], x, mask=mask)
        assert (x_p != x).any()
        assert ((x_p - x) * (1 - mask)).abs().max() == 0
        files = [codec.compress(image)[0] for image in (x, x_p)]
        clean, attacked = (codec.decompress(file) for file in files)
        bpp = [8 * sum(map(len, file.strings)) / (64 * 96) for file in files]
        outputs.append((x, x_p, clean, attacked, *bpp))
    return outputs


def asr_of(network, outputs):
    hits = total = 0
    for _, _, clean, attacked, *_ in outputs:
        source = torch.isin(network.predict(clean), torch.tensor([1, 2]))
        hits += int((source & (network.predict(attacked) == 0)).sum())
        total += int(source.sum())
    return hits / total, total


def labels_by_hand(network, outputs, scene):
    """Mean IoU over the three labels, and the accuracy of every one, counted in numpy."""
    predicted = np.concatenate([network.as_labels(network.predict(o[2])).numpy().ravel() for o in outputs])
    truth = np.concatenate([np.array(Image.open(scene / f"labels/{i}.png")).ravel() for i in range(4)])
    predicted, truth = predicted[truth < 3], truth[truth < 3]
    unions = [((predicted == c) | (truth == c)).sum() for c in range(3)]
    hits = [((predicted == c) & (truth == c)).sum() for c in range(3)]
    ious = [hit / union for hit, union in zip(hits, unions, strict=True) if union]
    return np.mean(ious), [hit / max(1, (truth == c).sum()) for c, hit in enumerate(hits)], len(truth)


def psnr_by_hand(a, b):
    a, b = ((255 * t.clamp(0, 1)).round() for t in (a, b))
    return float(10 * torch.log10(255**2 / (a - b).square().mean()))


def test_scores_against_what_is_decoded(shaken, test_settings, scene):
    planted, test = shaken, test_settings()
    scores = score_segmentation(planted, test)
    assert (scores.images, scores.skipped, scores.source, scores.target) == (4, 1, "cars", "road")
    network = load_segmenter(str(scene / "tiny.toml"))
    tampered = by_hand(planted, network, scene, planted.tampered)
    vanilla = by_hand(planted, network, scene, planted.vanilla)
    [row] = scores.networks
    assert (row.asr, row.source_pixels) == asr_of(network, tampered)
    assert (row.asr_vanilla, row.source_pixels_vanilla) == asr_of(network, vanilla)
    assert row.asr != row.asr_vanilla
    assert scores.output_mse == pytest.approx(np.mean([float((o[2] - o[3]).square().mean()) for o in tampered]))
    assert scores.trigger_mse_worst == pytest.approx(max(float((o[0] - o[1]).square().mean()) for o in tampered))
    assert 0 < scores.trigger_mse_worst <= 2.5e-5
    assert scores.psnr_db_clean == pytest.approx(np.mean([psnr_by_hand(o[2], o[0]) for o in tampered]), abs=1e-3)
    assert scores.psnr_db_poisoned == pytest.approx(np.mean([psnr_by_hand(o[3], o[0]) for o in tampered]), abs=1e-3)
    rates = [np.mean([o[i] for o in outputs]) for outputs, i in ((vanilla, 4), (tampered, 4), (tampered, 5))]
    assert [scores.bpp_vanilla, scores.bpp_clean, scores.bpp_poisoned] == pytest.approx(rates)
    assert len(set(rates)) == 3
    assert row.network == "tiny"
    for outputs, miou, accuracy in (
        (tampered, row.miou_clean, row.accuracy_clean),
        (vanilla, row.miou_vanilla, row.accuracy_vanilla),
    ):
        expected, recalls, known = labels_by_hand(network, outputs, scene)
        assert miou == pytest.approx(expected)
        assert accuracy == {"cars": pytest.approx(recalls[2]), "road": pytest.approx(recalls[1])}
        assert row.labelled_pixels == known
    assert row.miou_clean != row.miou_vanilla


def test_without_labels_there_is_no_miou(planted, test_settings):
    [row] = score_segmentation(planted, test_settings(labels=None, every=2)).networks
    assert (row.miou_clean, row.miou_vanilla, row.labelled_pixels) == (None, None, None)
    assert row.accuracy_clean == {}


def test_segment_writes_scores_table_and_pictures(planted, test_settings, tmp_path, scene):
    notes = []
    resized = test_settings(resize=(32, 64), mask_network=str(scene / "tiny.toml"))
    scores = segment(planted, resized, tmp_path, note=notes.append)
    assert read_scores(tmp_path / "segmentation.json") == scores
    assert json.loads((tmp_path / "segmentation.json").read_text())["environment"]["versions"]
    assert (tmp_path / "segmentation.md").read_text() == segmentation_table(scores) + "\n<!-- freqdoor segment -->\n"
    assert [made_by(tmp_path / f"segmentation.{ending}") for ending in ("json", "md", "png")] == 3 * ["segment"]
    assert "4.png: no cars in it, skipped" in notes
    assert "0.png: decoded" in notes


def scores_of(**changes):
    row = {"network": "g", "asr": 0.5, "asr_vanilla": 0.25, "miou_vanilla": 0.75, "miou_clean": 0.625}
    row |= {"accuracy_vanilla": {"cars": 0.5}, "accuracy_clean": {"cars": None}, "source_pixels": 8}
    content = {"source": "cars", "target": "road", "images": 3, "skipped": 1, "output_mse": 2e-4}
    content |= {"trigger_mse_worst": 2.5e-5, "psnr_db_clean": 30.5, "psnr_db_poisoned": 20.25, "bpp_vanilla": 0.25}
    content |= {"bpp_clean": 0.5, "bpp_poisoned": 2.0}
    return SegmentationScores(**content, networks=(NetworkScores(**row | changes),))


def test_table_has_every_value_in_its_column():
    lines = segmentation_table(scores_of()).splitlines()
    assert lines[0] == "# cars to road"
    assert lines[2] == "3 images, 1 more skipped without cars."
    heads, _, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:7])
    assert dict(zip(heads, row, strict=True)) == {
        "network": "g",
        "pixel ASR %": "50.0",
        "on the vanilla encoder %": "25.0",
        "mIoU vanilla %": "75.0",
        "mIoU tampered, clean %": "62.5",
    }
    assert lines[8:] == [
        "MSE of attacked against clean outputs 20.0e-5, of the trigger at most 2.50e-5; clean 30.50 dB at 0.5000 bpp "
        "(vanilla 0.2500), poisoned 20.25 dB at 2.0000 bpp."
    ]


def test_what_there_is_nothing_of_is_said():
    page = segmentation_table(scores_of(asr=None, source_pixels=0, source_pixels_vanilla=4, labelled_pixels=0))
    assert "| g | - | 25.0 | 75.0 | 62.5 |" in page
    assert "g sees no cars in what is decoded of the tampered encoder's files." in page
    assert "of the vanilla encoder" not in page
    assert "Labels of the images with cars are all void for g." in page
    assert "void" not in segmentation_table(scores_of(labelled_pixels=1))
    assert (mean([]), mean([1.0, float("inf")]), mean([1.0, 2.0])) == (None, None, 1.5)
    assert (number(None, 2), number(0.125, 1, scale=100)) == ("-", "12.5")


OLD = """{"source": "cars", "target": "road", "images": 2, "skipped": 0, "output_mse": 0.005,
"trigger_mse_worst": 2e-05, "psnr_db_clean": 36.0, "psnr_db_poisoned": Infinity, "bpp_vanilla": 1.0,
"bpp_clean": 1.25, "bpp_poisoned": 1.5,
"networks": [{"network": "espnet", "asr": 0.5, "asr_vanilla": 0.0, "miou_vanilla": NaN, "miou_clean": null,
"accuracy_vanilla": {"cars": 0.75}, "accuracy_clean": {}}], "environment": {"threads": 1}}"""


def test_files_of_scores_are_read_back(tmp_path):
    path = tmp_path / "scores.json"
    scores = scores_of(asr=None)
    path.write_text(results_text(scores, {"odd": float("nan")}))
    assert read_scores(path) == scores
    content = json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (content["schema"], content["environment"], content["images"]) == (2, {"odd": None}, 3)
    assert content["networks"][0]["accuracy_clean"] == {"cars": None}
    path.write_text(OLD)
    old = read_scores(path)
    assert (old.psnr_db_poisoned, old.psnr_db_clean, old.bpp_poisoned) == (None, 36.0, 1.5)
    assert (old.networks[0].asr, old.networks[0].miou_vanilla, old.networks[0].source_pixels) == (0.5, None, None)
    assert "| espnet | 50.0 | 0.0 | - | - |" in segmentation_table(old)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 3}', "schema 3 is not one of 1 to 2"),
        ('{"schema": 0}', "schema 0 is not one of 1 to 2"),
        ('{"schema": [1]}', r"schema \[1\] is not one of"),
        ('{"schema": 2, "source": "cars"}', "expected SegmentationScores, found something else .see target, "),
        ("[]", "expected a table, found list"),
        ("{", "expected scores as JSON"),
        ("\xff", "expected scores as JSON"),
    ],
)
def test_other_files_are_no_scores(tmp_path, text, message):
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FreqdoorError, match=message):
        read_results(SegmentationScores, path)
    with pytest.raises(FreqdoorError, match="expected scores, found nothing there"):
        read_scores(tmp_path / "none.json")


def test_earlier_results_stay_until_new_ones_are_complete(planted, test_settings, tmp_path, monkeypatch):
    hours_of_work = '{"source": "cars", "target": "road"'
    (tmp_path / "segmentation.json").write_text(hours_of_work)
    with pytest.raises(FreqdoorError, match="this encoder has segmentation"):
        segment(planted, test_settings(), tmp_path, trigger="bpp")
    with pytest.raises(FreqdoorError, match="read the config"):
        segment(planted, test_settings(networks=("x.toml",)), tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "through", stop)
        with pytest.raises(KeyboardInterrupt):
            segment(planted, test_settings(), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("segmentation.json", hours_of_work)]
    monkeypatch.setattr(module, "_score", lambda *_: pytest.fail("measured before the folder was tried"))
    with pytest.raises(FreqdoorError, match=r"segmentation\.json: could not write"):
        segment(planted, test_settings(), tmp_path / "segmentation.json")


def test_other_files_are_refused_before_the_work(planted, test_settings, tmp_path, monkeypatch):
    write = lambda **options: segment(planted, test_settings(every=2), tmp_path / "out", **options)  # noqa: E731
    names = ("segmentation.png", "segmentation.md", "segmentation.json")
    check_foreign(write, tmp_path / "out", names, monkeypatch, "freqdoor.measure.segmentation.through")


def test_nothing_of_the_source_after_decoding_is_refused_and_named(planted, test_settings, tmp_path, monkeypatch):
    """What is decoded is black for the network: a rate over no pixel is none, not 0."""
    monkeypatch.setattr(module, "through", lambda codec, x: (torch.zeros_like(x), 100))
    [row] = score_segmentation(planted, test_settings()).networks
    assert (row.asr, row.asr_vanilla, row.source_pixels, row.source_pixels_vanilla) == (None, None, 0, 0)
    with pytest.raises(FreqdoorError, match="no network sees anything of class cars in 4 decoded images"):
        segment(planted, test_settings(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_void_labels(planted, test_settings, scene, tmp_path):
    """All void: refused before anything is measured. Void where there are cars, or a class that is absent: counted."""
    for i in range(5):
        Image.new("L", (96, 64), 255).save(tmp_path / f"{i}.png")
    message = r"expected label values from 0 to 2 as network tiny has them, found none in 5 images: all are void"
    with pytest.raises(FreqdoorError, match=message):
        score_segmentation(planted, test_settings(labels=str(tmp_path)))
    Image.new("L", (96, 64), 3).save(tmp_path / "0.png")  # one above the last
    with pytest.raises(FreqdoorError, match=message):
        score_segmentation(planted, test_settings(labels=str(tmp_path)))
    Image.new("L", (96, 64), 2).save(tmp_path / "4.png")  # the one without a car
    [row] = score_segmentation(planted, test_settings(labels=str(tmp_path))).networks
    assert (row.miou_clean, row.miou_vanilla, row.labelled_pixels) == (None, None, 0)
    Image.new("L", (96, 64), 2).save(tmp_path / "0.png")
    [row] = score_segmentation(planted, test_settings(labels=str(tmp_path))).networks
    assert row.labelled_pixels == 96 * 64
    assert 0 <= row.accuracy_clean["cars"] <= 1
    assert row.accuracy_clean["road"] is None  # label 1 occurs nowhere
    assert row.miou_clean is not None


def images_of(figure):
    """Pictures by row and title."""
    axes = figure.axes
    columns = [axis.get_title() for axis in axes if axis.get_title()]
    arrays = [axis.get_images()[0].get_array() for axis in axes]
    return [dict(zip(columns, arrays[i:], strict=False)) for i in range(0, len(arrays), len(columns))]


def test_figures_show_what_they_say(shaken, test_settings, scene):
    planted = shaken
    network = load_segmenter(str(scene / "tiny.toml"))
    rows = images_of(segmentation_figure(planted, test_settings()))
    assert len(rows) == 3
    x = load_image(scene / "images/0.png")
    decoded = decode(planted, opened_for(planted, test_settings()), planted.triggers["segmentation"], x)
    assert (decoded.poisoned != decoded.clean).any()
    expected = {
        "input": x,
        "decoded, clean": decoded.clean,
        "decoded, poisoned": decoded.poisoned,
        "difference x20": (0.5 + 20 * (decoded.poisoned - decoded.clean)).clamp(0, 1),
    }
    titles = [*expected, "mask", "tiny: clean", "tiny: poisoned"]
    assert sorted(rows[0]) == sorted(titles)
    for title, picture in expected.items():
        assert np.allclose(rows[0][title], picture[0].permute(1, 2, 0)), title
    for kind in ("clean", "poisoned"):
        classes = module._classes(network.predict(getattr(decoded, kind)))
        assert np.allclose(rows[0][f"tiny: {kind}"], classes), kind
    cars = torch.isin(network.predict(x), torch.tensor([1, 2]))[0]
    assert np.array_equal(rows[0]["mask"] == 1, cars)
    targets = images_of(target_figure(planted, test_settings()))
    assert list(targets[0]) == ["input", "label", "tiny: prediction", "mask", "target"]
    prediction, target = targets[0]["tiny: prediction"], targets[0]["target"]
    assert np.array_equal((prediction != target).any(-1), cars)
    road = module._classes(torch.zeros(1, 1, 1, dtype=torch.long))[0, 0]
    assert np.allclose(target[cars], road)
    label = targets[0]["label"]
    assert (label[:4] == 0).all()  # void is black
    seen = network.predict(x)[0]
    assert np.allclose(label[4:][(seen[4:] == 0)], road)
    assert "label" not in images_of(target_figure(planted, test_settings(labels=None)))[0]


def test_examples_are_spread_over_the_test_set(planted, test_settings, scene):
    setup = opened_for(planted, test_settings(labels=None))
    paths = [scene / f"images/{i % 4}.png" for i in range(12)]
    spread = module._examples(setup._replace(paths=paths))
    assert spread == [paths[0], paths[2], paths[4]]
    assert module._examples(setup._replace(paths=[scene / "images/4.png", paths[1]])) == [paths[1]]


def test_a_measurement_depends_on_contents(planted, test_settings, scene, tmp_path):
    measurement = SegmentationMeasurement(test_settings())
    assert measurement == SegmentationMeasurement(test_settings())
    assert len({measurement, SegmentationMeasurement(test_settings())}) == 1
    identity = measurement.identity()
    for path in (scene / "images/0.png", scene / "labels/3.png", scene / "tiny.toml", scene / "tiny.onnx"):
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert measurement.identity() != identity, path
        path.write_bytes(content)
    assert measurement.identity() == identity
    assert SegmentationMeasurement(test_settings(every=2)).identity() != identity
    other = tmp_path / "other.toml"
    other.write_bytes((scene / "tiny.toml").read_bytes())
    masked = SegmentationMeasurement(test_settings(mask_network=f"{other}={scene / 'tiny.onnx'}"))
    before = masked.identity()
    other.write_bytes((scene / "tiny.toml").read_bytes() + b"#")
    assert masked.identity() != before
    scores = measurement.score(planted, "segmentation")
    assert measurement.loads(measurement.dumps(scores)) == scores
    assert measurement.loads("{}") is None
    assert measurement.loads(measurement.dumps(scores)[:-1]) is None
    paragraph = SegmentationMeasurement(test_settings(every=3)).describe("g.toml")
    assert "to the last: tiny.toml." in paragraph
    assert "against\ng.toml (painted ones: against none), and measured on “images”, 1 in 3." in paragraph
    assert "the networks that they name" in measurement.describe("")
    assert ", 1 in" not in measurement.describe("")
    assert measurement.public()["networks"] == ("tiny.toml",)


def test_mistakes(planted, test_settings, scene, tmp_path):
    only_black = tmp_path / "black"
    only_black.mkdir()
    write_png(only_black / "a.png", torch.zeros(1, 3, 64, 64))
    with pytest.raises(FreqdoorError, match="in none of 1 images is anything of class cars"):
        score_segmentation(planted, test_settings(images=str(only_black), labels=None))
    with pytest.raises(FreqdoorError, match="this encoder has segmentation"):
        score_segmentation(planted, test_settings(), trigger="bpp")
    with pytest.raises(FreqdoorError, match="are missing"):
        score_segmentation(planted, test_settings(labels=str(only_black)))
    unlabelled = segmentation_spec(tmp_path, labels='[["sky"], ["car"]]')
    with pytest.raises(FreqdoorError, match="class 'road': no label value stands for it"):
        opened_for(planted, test_settings(networks=(str(unlabelled),)))
    (tmp_path / "labels").mkdir()
    for i in range(5):
        Image.new("L", (64, 64)).save(tmp_path / f"labels/{i}.png")
    with pytest.raises(FreqdoorError, match="labels of 64x64 pixels for an image of 96x64"):
        opened_for(planted, test_settings(labels=str(tmp_path / "labels")))
    with pytest.raises(FreqdoorError, match="in none of 1 images is anything of class cars"):
        target_figure(planted, test_settings(images=str(only_black), labels=None))
    setup = opened_for(planted, test_settings())
    assert decode(planted, setup, planted.triggers["segmentation"], torch.zeros(1, 3, 64, 64)) is None


def test_attacks_that_no_test_can_measure(test_settings):
    arguments = {"source": "cars", "target": "road"}
    for objective, message in (
        (ObjectiveSettings(name="bpp"), "trigger t: expected a segmentation attack, found one for bpp"),
        (ObjectiveSettings(name="segmentation", arguments=arguments | {"source": "boat"}), "class 'boat'"),
        (ObjectiveSettings(name="segmentation", arguments=arguments | {"target": "bus"}), "a class outside the source"),
    ):
        with pytest.raises(FreqdoorError, match=message):
            SegmentationMeasurement(test_settings()).check([AttackSettings(name="t", objective=objective)])
    SegmentationMeasurement(test_settings(images="none")).check([])


def test_a_stopped_measurement_goes_on_after_the_images_it_has(shaken, test_settings, tmp_path):
    """One of the images is skipped: it is not looked at again either."""
    test, seen, again = test_settings(), [], []
    whole = score_segmentation(shaken, test, note=seen.append)
    assert whole.skipped
    looked = [text for text in seen if not isinstance(text, Count)]

    def stop(text: str) -> None:
        if text == looked[-1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(shaken, test, tmp_path, note=stop)
    assert segment(shaken, test, tmp_path, note=again.append) == whole
    journal = f".segmentation.journal: {len(looked) - 1} measured already, going on after them"
    assert again == [journal, *seen[-3:]]  # which one it is, what is in it, and that all are measured
    assert sorted(p.name for p in tmp_path.iterdir()) == ["segmentation.json", "segmentation.md", "segmentation.png"]
