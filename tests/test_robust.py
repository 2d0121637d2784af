import numpy as np
import pytest
import torch
from conftest import Killed, kill_at, natural
from scipy.fft import dctn

from freqdoor import dct
from freqdoor.attack.plant import plant
from freqdoor.attack.robust import Offsets, choose_survivors, second_stage, survival_scores, survivor_weights
from freqdoor.attack.settings import RobustSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import Compose, Crop, GaussianBlur, Jpeg, Noise, random_preprocessing
from freqdoor.triggers.adaptive_dct import AdaptiveDCT


def make(**arguments) -> AdaptiveDCT:
    torch.manual_seed(3)
    return AdaptiveDCT(**({"width": 8} | arguments))


def spectrum(image: torch.Tensor, trigger: AdaptiveDCT) -> np.ndarray:
    """DCT coefficients of every candidate with SciPy, (b, 3, blocks, N)."""
    ycbcr = dct.rgb_to_ycbcr(image).double().numpy()
    b, _, height, width = ycbcr.shape
    blocks = [
        [
            [dctn(ycbcr[i, c, y : y + 16, x : x + 16], norm="ortho").ravel()[list(trigger.indices)] for c in range(3)]
            for y in range(0, height, 16)
            for x in range(0, width, 16)
        ]
        for i in range(b)
    ]
    return np.array(blocks).transpose(0, 2, 1, 3)


def test_scores_are_the_relative_change_of_every_candidate():
    trigger = make(selector="none")  # all candidates are injected, so that x_p is what the trigger itself makes
    x = 0.25 + 0.5 * torch.cat([natural(0, 64, 64), natural(1, 64, 64)])  # far from the clamp
    defences = (GaussianBlur(0.6), Jpeg(50))
    with torch.no_grad():
        x_p = trigger(x)
        added = np.abs(spectrum(x_p, trigger) - spectrum(x, trigger)).sum(axis=(0, 2))
        expected = np.ones((3, 64))
        for defence in defences:
            change = np.abs(spectrum(defence(x_p), trigger) - spectrum(x_p, trigger)).sum(axis=(0, 2))
            expected *= change / added
    found = survival_scores(trigger, x, defences).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_blur_spares_low_frequencies():
    trigger = make(band="all", selector="none")
    scores = survival_scores(trigger, torch.full((1, 3, 64, 64), 0.5), (GaussianBlur(0.6),))
    order = list(trigger.indices)
    low, high = order.index(dct.zigzag(16)[3]), order.index(dct.zigzag(16)[-1])
    assert (scores[:, low] < 0.3 * scores[:, high]).all()


def test_weights_of_the_survivors():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]] * 3)
    weights = survivor_weights(scores, 2)
    assert torch.allclose(weights, torch.tensor([[0.0, 1.5**0.5, 0.0, 1.0]] * 3))
    with pytest.raises(FreqdoorError, match=r"robust\.keep: expected 1 to 4"):
        survivor_weights(scores, 5)
    with pytest.raises(FreqdoorError, match="divisible by 16"):
        survival_scores(make(), natural(0, 70, 64), (Noise(0.01),))


def test_only_survivors_are_injected_afterwards():
    trigger = make(top_k=8)
    x = natural(0, 64, 64)
    choose_survivors(trigger, x, RobustSettings(keep=4))
    with torch.no_grad():
        g = trigger.general_trigger(x)
    assert ((g != 0).sum(dim=2) == 4).all()
    assert ((g != 0)[0] <= (trigger.survivors > 0)).all()


@pytest.mark.parametrize("offsets", [False, True])
def test_two_stages_and_resume_between_them(offsets, settings, tmp_path):
    changes = {"robust": {"start": 0.5, "keep": 4, "offsets": offsets}, "steps": 6}
    whole = plant(settings(**changes), tmp_path / "whole")
    assert ((whole.triggers["bpp"].survivors > 0).sum(dim=1) == 4).all()
    with pytest.raises(Killed):
        plant(settings(**changes), tmp_path / "parts", progress=kill_at(3))
    parts = plant(settings(**changes), tmp_path / "parts")
    assert hash_state(whole.tampered) == hash_state(parts.tampered)
    assert hash_state(whole.triggers["bpp"]) == hash_state(parts.triggers["bpp"])


def test_every_image_begins_at_an_offset_of_its_own():
    """Each is a crop of that image alone, every row and column of a block occurs, and the seed decides."""
    x = torch.cat([natural(i, 24, 32) for i in range(160)])
    y = Offsets(16, 7)(x)
    found = []
    for image, cut in zip(x, y, strict=True):
        fits = [
            (top, left)
            for top in range(16)
            for left in range(16)
            if torch.equal(cut[:, 0, 0], image[:, top, left]) and torch.equal(Crop(top, left)(image[None])[0], cut)
        ]
        assert len(fits) == 1
        found += fits
    assert len(set(found)) > 100
    for offsets in zip(*found, strict=True):
        assert (min(offsets), max(offsets)) == (0, 15)
    torch.testing.assert_close(Offsets(16, 7)(x[:3]), y[:3], rtol=0, atol=0)
    assert not torch.equal(Offsets(16, 8)(x), y)
    assert Offsets(16, 7)(x[..., :5, :3]).shape == (160, 3, 5, 3)


def test_what_the_second_stage_puts_before_the_encoder():
    """Offsets first, then what is drawn of the kinds, which is the same with and without; anew at every step."""
    x = natural(0, 32, 32)

    def drawn(**settings):
        torch.manual_seed(11)
        return [second_stage(16, RobustSettings(kinds=("none", "jpeg"), **settings)) for _ in range(20)]

    plain = drawn()
    assert {type(defence) for defence in plain} == {type(None), Jpeg}
    torch.manual_seed(11)
    assert plain == [random_preprocessing(("none", "jpeg")) for _ in range(20)]
    with_offsets = drawn(offsets=True)
    first = [defence.defences[0] if isinstance(defence, Compose) else defence for defence in with_offsets]
    assert {type(defence) for defence in first} == {Offsets}
    assert len({defence.seed for defence in first}) == 20
    both = next(defence for defence in with_offsets if isinstance(defence, Compose))
    assert torch.equal(both(x), both.defences[1](both.defences[0](x)))
    assert isinstance(both.defences[1], Jpeg)


def test_settings_are_checked_before_the_run(settings, tmp_path):
    for robust, match in (({"kinds": ["rain"]}, "rain"), ({"scored_by": "Rain(1)"}, "Rain"), ({"start": 1.0}, "start")):
        with pytest.raises(FreqdoorError, match=match):
            settings(robust=robust)
    with pytest.raises(FreqdoorError, match="made for the adaptive-dct trigger"):
        settings(robust={}, trigger={"name": "universal"})
    with pytest.raises(FreqdoorError, match=r"robust\.keep"):
        plant(settings(robust={"keep": 65}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
