import json

import numpy as np
import pytest
import torch
from conftest import natural
from scipy.fft import dctn, idctn

from freqdoor import dct
from freqdoor.data import list_images, load_image
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import through_png
from freqdoor.metrics import mse
from freqdoor.samples import KODAK
from freqdoor.triggers import base
from freqdoor.triggers.arguments import TRIGGERS
from freqdoor.triggers.base import Trigger, budget_penalty
from freqdoor.triggers.build import build_trigger
from freqdoor.types import round8

BUDGET = 0.005**2
SMALL = {  # every trigger, small; what is promised for all of them is tested for each
    "adaptive-dct": {"width": 8},
    "lira": {"width": 2, "levels": 3},
    "ftrojan": {"block": 16, "coefficients": [[15, 15], [3, 4]]},
    "universal": {"size": 24},
}
every_trigger = pytest.mark.parametrize("name", SMALL)
PATHS = list_images(KODAK)


def make(name: str = "adaptive-dct", **arguments) -> Trigger:
    torch.manual_seed(3)
    return build_trigger(name, **(SMALL[name] | arguments))


def test_every_trigger_is_tested():
    assert SMALL.keys() == TRIGGERS.keys()


def test_injection_equals_adding_t_to_the_dct_coefficients():
    """Section 3.2 by the letter, with SciPy: RGB -> YCbCr -> DCT of each block, + g w, inverse, -> RGB."""
    trigger = make()
    x = natural(0, 64, 64)
    with torch.no_grad():
        g, w = trigger.general_trigger(x)[0].numpy(), trigger.patch_weights(x)[0].numpy()
        ours = (x + trigger.perturb(x))[0].double().numpy()
    assert np.count_nonzero(g, axis=1).tolist() == [16, 16, 16]  # K of N survive per channel
    ycbcr = dct.rgb_to_ycbcr(x)[0].double().numpy()
    for c in range(3):
        for row in range(4):
            for column in range(4):
                place = (c, slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
                coefficients = dctn(ycbcr[place], norm="ortho").ravel()
                coefficients[list(trigger.indices)] += g[c] * w[c, row, column]
                ycbcr[place] = idctn(coefficients.reshape(16, 16), norm="ortho")
    expected = dct.ycbcr_to_rgb(torch.from_numpy(ycbcr)[None])[0].numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@every_trigger
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("strength", [1.0, 3.0])
@pytest.mark.parametrize(
    "x",
    [
        natural(0, 96, 64),
        torch.zeros(1, 3, 64, 64),
        torch.ones(1, 3, 64, 64),
        torch.full((1, 3, 64, 64), 100 / 255),
        torch.randint(0, 2, (1, 3, 64, 64)).float(),
    ],
    ids=["natural", "black", "white", "flat", "saturated"],
)
def test_range_and_budget_hold_on_every_image(name, x, strength, rounded):
    with torch.no_grad():
        x_p = make(name)(x, strength=strength, rounded=rounded)
    assert x_p.min() >= 0
    assert x_p.max() <= 1
    error = float(mse(x_p, x))
    assert error <= BUDGET * strength**2 * 1.0001
    if x.min() > 0 and x.max() < 1:
        assert error >= 0.95 * BUDGET * strength**2  # and the budget is used up


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_budget_holds_for_a_pattern_that_rounding_favours(strength):
    x = torch.full((1, 3, 64, 64), 100 / 255)
    with torch.no_grad():
        x_p = make(band=[136], top_k=1)(x, strength=strength, rounded=True)
    assert float(mse(x_p, x)) <= BUDGET * strength**2


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in SMALL for path in (PATHS if name == "adaptive-dct" else PATHS[:1])],
    ids=lambda value: getattr(value, "stem", value),
)
def test_kodak_files_keep_the_budget(name, path):
    x = load_image(path)
    with torch.no_grad():
        x_p = through_png(make(name)(x, rounded=True))
    assert float(mse(x_p, x)) <= BUDGET


@every_trigger
@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 5), (64, 64), (70, 131)])
def test_any_size(name, height, width):
    x = natural(2, height, width)
    x_p = make(name)(x)
    assert x_p.shape == x.shape
    assert not torch.equal(x_p, x)


@every_trigger
def test_an_image_is_poisoned_the_same_alone_and_in_a_batch(name, x):
    trigger = make(name)
    with torch.no_grad():
        torch.testing.assert_close(trigger(x), torch.cat([trigger(image[None]) for image in x]))


@pytest.mark.parametrize("rounded", [False, True])
def test_the_budget_is_found_in_few_tries(rounded, monkeypatch):
    """Of pictures the model of the squared error is good; others take bisection, and change nothing beside them."""
    pictures = torch.cat([load_image(path)[..., 100:196, 200:296] for path in PATHS[:6]])
    pictures[:3] = (2 * pictures[:3] - 0.5).clamp(0, 1)  # hard contrast: much is clamped
    odd = torch.stack([torch.full((3, 96, 96), value) for value in (0.0, 1.0, 100 / 255)])
    tries, real = [], base._error
    monkeypatch.setattr(base, "_error", lambda *a, **k: tries.append(1) or real(*a, **k))
    for eps in (0.003, 0.005, 0.05):
        delta = torch.rand_like(pictures) - 0.3
        tries.clear()
        scaled = base.project(pictures, delta, eps, rounded=rounded)
        assert len(tries) <= (5 if eps > 0.003 else 8)
        x_p = (pictures + scaled).clamp(0, 1)
        error = mse(round8(x_p) if rounded else x_p, pictures).sqrt() / eps
        assert 0.99 <= float(error.min()) <= float(error.max()) <= 1
        for x, change in ((pictures, delta), (odd, torch.ones_like(odd))):
            alone = [base.project(x[i : i + 1], change[i : i + 1], eps, rounded=rounded) for i in range(len(x))]
            beside = base.project(torch.cat([pictures, x]), torch.cat([delta, change]), eps, rounded=rounded)
            torch.testing.assert_close(beside[6:], torch.cat(alone), rtol=1e-6, atol=0)
    flat = base.project(odd[2:], torch.ones_like(odd[2:]), 1.5 / 255, rounded=True)
    assert float((round8(odd[2:] + flat) - odd[2:]).mean()) == pytest.approx(1 / 255)  # a whole level, no two


def test_blocks_stay_aligned_with_the_codecs_latents():
    """The codec pads 70x131 to 128x192 around the centre: the trigger's blocks follow that grid."""
    trigger = make(patch_weight=False)
    with torch.no_grad():
        delta = trigger.perturb(natural(2, 70, 131))[0, 0]
    top, left = (128 - 70) // 2 % 16, (192 - 131) // 2 % 16
    first = delta[16 - top : 32 - top, 16 - left : 32 - left]
    torch.testing.assert_close(first, delta[32 - top : 48 - top, 32 - left : 48 - left])


@pytest.mark.parametrize(("multiple", "padded"), [(64, (128, 192)), (32, (96, 160)), (1, (70, 131)), (144, (144, 144))])
@pytest.mark.parametrize("name", ["adaptive-dct", "ftrojan", "universal"])
def test_patterns_start_where_the_codec_pads_to(name, multiple, padded):
    """Whatever the codec's multiple, the grid of blocks begins at the padded image's corner."""
    more = {"patch_weight": False, "block": 16} if name == "adaptive-dct" else {}
    size = 24 if name == "universal" else 16
    with torch.no_grad():
        delta = make(name, multiple=multiple, **more).perturb(natural(2, 70, 131))[0]
    top, left = (padded[0] - 70) // 2 % size, (padded[1] - 131) // 2 % size
    first = delta[:, -top % size :, -left % size :][:, :size, :size]
    tiles = first.repeat(1, 8, 10)[:, top : top + 70, left : left + 131]
    torch.testing.assert_close(delta, tiles, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(first[:, 1:], first[:, :-1], atol=1e-6)


@every_trigger
def test_mask_and_strength(name):
    x = torch.full((1, 3, 64, 64), 0.5)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    trigger = make(name, project=False)
    with torch.no_grad():
        scale = 0.01 / float((trigger(x) - x).abs().max())
        delta = trigger(x, strength=scale, mask=mask) - x
        torch.testing.assert_close(trigger(x, strength=2 * scale, mask=mask) - x, 2 * delta, atol=1e-6, rtol=1e-4)
    assert delta[..., 32:].abs().max() == 0
    assert delta[..., :32].abs().max() > 0


@every_trigger
def test_train_and_eval_mode_agree(name, x):
    trigger = make(name)
    with torch.no_grad():
        torch.testing.assert_close(trigger.train()(x), trigger.eval()(x), rtol=0, atol=0)


@every_trigger
@pytest.mark.parametrize("project", [True, False])
def test_gradient_reaches_every_parameter(name, x, project):
    trigger = make(name, project=project)
    loss = (trigger(x, rounded=True) - 0.3).square().sum()
    if list(trigger.parameters()):
        loss.backward()
    for key, parameter in trigger.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().sum() > 0, key


@pytest.mark.parametrize(("selector", "trained"), [("ste", True), ("hard", False), ("magnitude", False)])
def test_gradient_of_the_importance_head(x, selector, trained):
    trigger = make(selector=selector)
    (trigger(x) - 0.3).square().sum().backward()
    gradient = trigger.importance.weight.grad
    assert (gradient is not None and bool(gradient.abs().sum() > 0)) is trained
    assert trigger.value.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({"selector": "none"}, 64),
        ({"top_k": 4, "num_frequencies": 16}, 4),
        ({"band": "low"}, 16),
        ({"band": [3, 5, 7], "top_k": 2}, 2),
        ({"block": 8, "num_frequencies": 20, "top_k": 5}, 5),
    ],
)
def test_options(x, arguments, kept):
    trigger = make(**arguments)
    with torch.no_grad():
        assert int((trigger.general_trigger(x) != 0).sum()) == 2 * 3 * kept
        assert trigger(x).shape == x.shape


@every_trigger
def test_rebuilt_from_its_arguments(name, x):
    """What a file holds, the arguments as JSON and the state, gives the same trigger."""
    more = {"band": [3, 5, 7], "top_k": 2} if name == "adaptive-dct" else {}
    trigger = make(name, eps=0.003, project=False, multiple=32, **more)
    for key, value in (SMALL[name] | more | {"eps": 0.003, "project": False, "multiple": 32}).items():
        assert trigger.arguments[key] == value
    assert trigger.arguments.keys() == TRIGGERS[name].arguments.model_fields.keys()
    again = build_trigger(name, **json.loads(json.dumps(trigger.arguments)))
    assert again.arguments == trigger.arguments
    again.load_state_dict(trigger.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(x), trigger(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("adaptive-dct", {"top_k": 65}, "top_k"),
        ("adaptive-dct", {"band": "middle"}, "band"),
        ("adaptive-dct", {"band": [1, 1]}, "distinct"),
        ("adaptive-dct", {"selector": "soft"}, "selector"),
        ("adaptive-dct", {"block": 12}, "block"),
        ("adaptive-dct", {"colour": 1}, "colour"),
        ("lira", {"levels": 1}, "levels"),
        ("lira", {"width": 7}, "width"),
        ("lira", {"width": 4096}, "width"),
        ("ftrojan", {"block": 12}, "block"),
        ("ftrojan", {"block": 0}, "block"),
        ("ftrojan", {"coefficients": []}, "coefficients"),
        ("ftrojan", {"coefficients": [31, 15]}, "coefficients"),
        ("ftrojan", {"coefficients": [[0.5, 1]]}, "coefficients"),
        ("ftrojan", {"coefficients": [[1, 1], [1, 1]]}, "distinct"),
        ("ftrojan", {"block": 16}, "coefficients"),
        ("universal", {"size": 0}, "size"),
        ("universal", {"size": 100_000}, "size"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, match):
    with pytest.raises(FreqdoorError, match=match):
        build_trigger(name, **arguments)


def test_unknown_trigger_lists_the_known():
    with pytest.raises(FreqdoorError, match="adaptive-dct, lira, ftrojan, universal"):
        build_trigger("lirra")


def test_penalty_is_flat_below_the_budget():
    """Eq. (10)'s second term: gamma max(MSE, eps^2)."""
    x = torch.zeros(1, 3, 4, 4)
    assert float(budget_penalty(x, x + 0.004, gamma=1e4, eps=0.005)) == pytest.approx(0.25)
    assert float(budget_penalty(x, x + 0.01, gamma=1e4, eps=0.005)) == pytest.approx(1.0)


def test_round8_rounds_and_passes_the_gradient():
    x = torch.rand(4, 3, 5, 5, requires_grad=True)
    y = round8(x)
    torch.testing.assert_close(y.detach() * 255, (x.detach() * 255).round())
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
