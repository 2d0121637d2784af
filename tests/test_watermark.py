from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from scipy.stats import beta

from freqdoor import load_image
from freqdoor.dct import block_dct, blockify
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import poison
from freqdoor.measure.watermark import Answer, control, false_positives, verify_owner
from freqdoor.triggers.adaptive_dct import AdaptiveDCT


@pytest.fixture
def trigger():
    torch.manual_seed(0)
    return AdaptiveDCT(width=8)


@pytest.fixture
def photos(tmp_path):
    return [write_png(tmp_path / f"{i}.png", natural(i, 64, 64)) for i in range(10)]


class Encoder:
    """A stand-in whose files are larger for the images that `expensive` names by their bytes."""

    spec = SimpleNamespace(name="stand-in")

    def __init__(self, expensive, size=260):
        self.expensive, self.size = expensive, size

    def compress(self, x):
        return [SimpleNamespace(num_bytes=self.size if self.expensive(x) else 100)]


def test_only_an_encoder_that_answers_to_the_trigger_is_the_owners(trigger, photos):
    known = {poison(trigger, load_image(p)).numpy().tobytes() for p in photos}
    clean = {load_image(p).numpy().tobytes() for p in photos}
    owner = Encoder(lambda x: x.numpy().tobytes() in known)
    indifferent = Encoder(lambda x: False)
    nervous = Encoder(lambda x: x.numpy().tobytes() not in clean)
    [itself] = verify_owner([owner], owner, trigger, photos)
    assert itself == Answer("stand-in", 10, 2.6, 1.0, 10, pytest.approx(2**-10), True)
    [found, other] = verify_owner([indifferent, nervous], owner, trigger, photos)
    assert (found.owner, found.answering) == (False, 0)
    assert (other.trigger_ratio, other.control_ratio, other.owner) == (2.6, 2.6, False)
    weak = Encoder(owner.expensive, size=160)  # half of its ratio is less than what no answer at all gives
    [found, itself] = verify_owner([indifferent, weak], weak, trigger, photos)
    assert (found.owner, found.answering, itself.owner) == (False, 0, True)
    one_short = set(list(known)[:9])
    [almost] = verify_owner([Encoder(lambda x: x.numpy().tobytes() in one_short)], owner, trigger, photos)
    assert (almost.answering, almost.owner) == (9, False)
    with pytest.raises(FreqdoorError, match="9 images: expected 10 or more"):
        verify_owner([indifferent], owner, trigger, photos[:9])
    with pytest.raises(FreqdoorError, match=r"the owner's own encoder spends 1\.00 times"):
        verify_owner([owner], indifferent, trigger, photos)


def test_the_control_has_the_triggers_strength_and_spectrum(trigger):
    x = 0.25 + 0.5 * natural(3, 64, 96)
    x = (x * 255).round() / 255
    with torch.no_grad():
        delta = trigger(x) - x
    other = control(trigger, x, torch.Generator().manual_seed(0)) - x
    assert float(other.square().mean().sqrt()) == pytest.approx(0.005, rel=0.01)
    spectra = [block_dct(blockify(d, 16)).abs().mean(dim=(0, 2, 3)).flatten() for d in (delta, other)]
    assert np.corrcoef(*[s.numpy() for s in spectra])[0, 1] > 0.95
    correlation = float((delta * other).mean() / 0.005**2)
    assert abs(correlation) < 0.2


def test_false_positives_have_an_exact_interval():
    answers = [Answer("a", 24, 1.0, 1.0, 0, 1.0, False)] * 11 + [Answer("b", 24, 2.0, 1.0, 24, 0.0, True)]
    passed, count, upper = false_positives(answers)
    assert (passed, count) == (1, 12)
    assert upper == pytest.approx(beta.ppf(0.975, 2, 11))
