"""LPIPS beside PSNR: with random weights in place of AlexNet's, which are a download of 233 MB."""

import hashlib
import json

import pytest
import torch
import torchvision
from conftest import natural, write_png

from freqdoor.errors import FreqdoorError
from freqdoor.measure.examine import evaluate
from freqdoor.measure.perceptual import TRUNK, Lpips, learned_measure
from freqdoor.measure.report import read_records, report

lpips = pytest.importorskip("lpips", reason="pip install 'freqdoor[perceptual]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*not those of:UserWarning")


@pytest.fixture(scope="module")
def trunk():
    """AlexNet's features with random weights, as torchvision's file has them; its classifier is not needed."""
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.features = torchvision.models.alexnet(weights=None).features
    return net


@pytest.fixture(scope="module")
def weights(trunk, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    torch.save(trunk.state_dict(), path)
    return path


def definition(trunk, a, b):
    """LPIPS by the paper's Eq. (1), from AlexNet's five layers and the package's weights of them."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    linear = torch.load(f"{lpips.__path__[0]}/weights/v0.1/alex.pth", "cpu", weights_only=True)
    features = [((2 * x - 1) - shift[:, None, None]) / scale[:, None, None] for x in (a, b)]
    total, layer = 0.0, 0
    with torch.no_grad():
        for part in trunk.features[:12]:
            features = [part(x.clone()) for x in features]
            if isinstance(part, torch.nn.ReLU):
                one, other = (x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in features)
                total += float(((one - other).square() * linear[f"lin{layer}.model.1.weight"]).sum(1).mean())
                layer += 1
    assert layer == 5
    return total


def test_lpips_is_its_definition_on_8_bit_pictures(trunk, weights):
    measure = Lpips(weights)
    a, b = natural(0, 70, 90), natural(1, 70, 90)
    state = torch.random.get_rng_state()
    assert measure(a, b) == pytest.approx(definition(trunk, a, b), rel=1e-4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert measure(a + 0.4 / 255, b) == measure(a, b)  # the same picture in 8 bits
    assert measure(a, a) == 0
    nearer = (a + 0.02 * torch.randn(a.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert 0 < measure(nearer, a) < measure(b, a)
    assert measure(a[..., :31, :31], b[..., :31, :31]) > 0
    assert measure(a[..., :30, :], b[..., :30, :]) is None


def test_what_is_missing_is_said_in_one_sentence_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr("freqdoor.measure.examine.opened", None)
    place = tmp_path / "checkpoints" / TRUNK
    with pytest.raises(
        FreqdoorError, match=f"AlexNet at {place}, found nothing there; get them from https://.*{TRUNK}"
    ):
        evaluate("planted-bpp", tmp_path, tmp_path / "out", perceptual="lpips")
    with pytest.raises(FreqdoorError, match=r"at .*none\.pth, found nothing"):
        learned_measure("lpips=none.pth")
    with pytest.raises(FreqdoorError, match="perceptual: expected lpips or lpips=FILE, found 'dists'"):
        learned_measure("dists")
    place.parent.mkdir()
    torch.save({"classifier.weight": torch.zeros(2)}, place)
    with pytest.raises(FreqdoorError, match=r"\(5 layers, features.0.weight and so on\), found .* of classifier"):
        learned_measure("lpips")


def test_other_weights_than_the_known_ones_are_named(weights):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    with pytest.warns(UserWarning, match=f"{digest}, which are not those of {TRUNK}: compare with no other figures"):
        assert digest in Lpips(weights).facts


@pytest.mark.long
def test_records_summary_and_report_have_it(tmp_path, weights):
    picture = write_png(tmp_path / "a.png", natural(3, 64, 64))
    out, asked = tmp_path / "out", f"lpips={weights}"
    summary = evaluate("planted-bpp", picture, out, perceptual=asked)
    records = read_records(out / "records.jsonl")
    assert all(record.lpips > 0 for record in records)
    of = {(r.role, r.trigger, r.rounding): r.lpips for r in records}
    assert summary.poisoned_8bit.lpips == of["tampered", "bpp", "8-bit"] != summary.clean.lpips
    page = (out / "report.html").read_text()
    assert page.count("<th>LPIPS</th>") == 2
    assert f"{summary.poisoned_8bit.lpips:.4f}" in page
    assert f"{summary.poisoned_8bit.psnr_input_db:.2f}" in page
    assert "which are not those of" in page
    assert report(out) == summary
    assert (out / "report.html").read_text() == page
    there = evaluate("planted-bpp", picture, tmp_path / "plain")
    assert there.clean.lpips is None
    assert "LPIPS" not in (tmp_path / "plain/report.html").read_text()
    assert json.loads((tmp_path / "plain/facts.json").read_text())["perceptual"] is None
