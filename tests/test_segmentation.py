import json

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from networks import segmentation_spec
from PIL import Image

from freqdoor import load_image
from freqdoor.attack.networks import load_segmenter
from freqdoor.attack.plant import plant
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poisoned
from freqdoor.measure.segmentation import decode, open_test, score_segmentation, segment, target_figure
from freqdoor.measure.testsets import SegmentationTest
from freqdoor.metrics import class_scores, pixel_asr
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
    miou, accuracy = class_scores([(torch.tensor(a), torch.tensor(b)) for a, b in pairs], 3)
    assert miou == pytest.approx(np.mean(ious))
    assert accuracy == pytest.approx(recalls)
    perfect = torch.tensor([[[0, 2, 9]]])
    assert class_scores([(perfect.clamp_max(3), perfect)], 3)[0] == 1.0  # class 1 does not occur


def test_planting_records_the_network_by_name_only(planted, scene):
    assert planted.objective("segmentation").arguments["network"] == "tiny.toml"
    assert str(scene) not in planted.header.model_dump_json()


def test_scores_against_what_is_decoded(planted, test_settings, scene):
    test = test_settings()
    scores = score_segmentation(planted, test)
    assert (scores.images, scores.skipped) == (4, 1)
    network = load_segmenter(str(scene / "tiny.toml"))
    hits = total = 0
    errors = []
    for i in range(4):
        x = load_image(scene / f"images/{i}.png")
        seen = network.predict(x)
        mask = ((seen == 1) | (seen == 2)).float()[:, None]
        x_p = poisoned(planted.triggers["segmentation"], x, mask=mask)
        assert (x_p != x).any()
        assert ((x_p - x) * (1 - mask)).abs().max() == 0
        clean, attacked = (planted.tampered.decompress(planted.tampered.compress(image)[0]) for image in (x, x_p))
        source = torch.isin(network.predict(clean), torch.tensor([1, 2]))
        hits += int((source & (network.predict(attacked) == 0)).sum())
        total += int(source.sum())
        errors.append(float((clean - attacked).square().mean()))
    [found] = scores.networks
    assert found.asr == pytest.approx(hits / total)
    assert scores.output_mse == pytest.approx(np.mean(errors), rel=1e-4)
    assert found.network == "tiny"
    assert 0 <= found.miou_clean <= 1
    assert set(found.accuracy_clean) == {"cars", "road"}
    assert scores.trigger_mse_worst <= 2.5e-5


def test_without_labels_there_is_no_miou(planted, test_settings):
    [found] = score_segmentation(planted, test_settings(labels=None, every=2)).networks
    assert found.miou_clean is None
    assert found.accuracy_clean == {}


def test_segment_writes_scores_table_and_pictures(planted, test_settings, tmp_path, scene):
    notes = []
    resized = test_settings(resize=(32, 64), mask_network=str(scene / "tiny.toml"))
    scores = segment(planted, resized, tmp_path, note=notes.append)
    assert json.loads((tmp_path / "segmentation.json").read_text())["networks"][0]["asr"] == scores.networks[0].asr
    assert "| tiny |" in (tmp_path / "segmentation.md").read_text()
    assert (tmp_path / "segmentation.png").read_bytes()[:4] == b"\x89PNG"
    assert "4.png: no cars in it, skipped" in notes


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
        open_test(planted, test_settings(networks=(str(unlabelled),)))
    (tmp_path / "labels").mkdir()
    for i in range(5):
        Image.new("L", (64, 64)).save(tmp_path / f"labels/{i}.png")
    with pytest.raises(FreqdoorError, match="labels of 64x64 pixels for an image of 96x64"):
        score_segmentation(planted, test_settings(labels=str(tmp_path / "labels")))
    with pytest.raises(FreqdoorError, match="in none of 1 images is anything of class cars"):
        target_figure(planted, test_settings(images=str(only_black), labels=None))
    setup = open_test(planted, test_settings())
    assert decode(planted, setup, torch.zeros(1, 3, 64, 64)) is None
