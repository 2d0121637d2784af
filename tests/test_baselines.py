"""What the baselines promise beyond what every trigger does (test_triggers.py)."""

import numpy as np
import pytest
import torch
from conftest import natural
from scipy.fft import dctn
from torch import nn

from freqdoor.triggers.ftrojan import FTrojan
from freqdoor.triggers.lira import Lira
from freqdoor.triggers.universal import Universal

LUMA = (0.299, 0.587, 0.114)  # chroma is, by definition, what blue and red have beyond it, scaled to +-1/2


def ycbcr_blocks(delta: torch.Tensor, block: int) -> np.ndarray:
    """DCT coefficients of every block by SciPy, (blocks, 3, block, block), of one (3, h, w)."""
    r, g, b = delta.double().numpy()
    y = LUMA[0] * r + LUMA[1] * g + LUMA[2] * b
    ycbcr = np.stack([y, (b - y) / (2 - 2 * LUMA[2]), (r - y) / (2 - 2 * LUMA[0])])
    height, width = y.shape
    tiles = [
        ycbcr[:, top : top + block, left : left + block]
        for top in range(0, height - block + 1, block)
        for left in range(0, width - block + 1, block)
    ]
    return dctn(np.stack(tiles), axes=(2, 3), norm="ortho")


def test_ftrojan_changes_two_chroma_coefficients_of_each_block():
    x = natural(0, 64, 128)
    found = ycbcr_blocks(FTrojan().perturb(x)[0], 32)
    assert len(found) == 8
    expected = np.zeros((3, 32, 32))
    expected[1:, 31, 31] = expected[1:, 15, 15] = found[0, 1, 31, 31]
    assert expected.max() > 0.01
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=1e-6)


def test_ftrojan_blocks_follow_the_padded_image():
    """70x131 is padded to 128x192 around the centre: its first whole block of 32 starts at (3, 2)."""
    delta = FTrojan().perturb(natural(2, 70, 131))[0]
    found = ycbcr_blocks(delta[:, 3:67, 2:130], 32)
    touched = np.abs(found) > 1e-6
    assert touched.sum(axis=(1, 2, 3)).tolist() == [4] * 8
    assert touched[:, 1:, [31, 15], [31, 15]].all()


def test_ftrojan_has_nothing_to_learn(x):
    trigger = FTrojan()
    assert not list(trigger.parameters())
    assert not trigger.state_dict()
    assert not trigger(x).requires_grad


@pytest.mark.parametrize(("trigger", "arguments"), [(FTrojan, {}), (Lira, {"width": 2, "levels": 3})])
def test_rms_is_eps_without_projection(trigger, arguments, x):
    trigger = trigger(project=False, **arguments)
    with torch.no_grad():
        delta = (trigger(0.25 + x / 2) - (0.25 + x / 2)).double().numpy()
    np.testing.assert_allclose(np.sqrt((delta**2).mean(axis=(1, 2, 3))), 0.005, rtol=1e-4)


def test_lira_adds_the_normalised_unet(x):
    torch.manual_seed(0)
    trigger = Lira(width=4, levels=3)
    with torch.no_grad():
        drawn = trigger.unet(x).double().numpy()
        expected = 0.005 * drawn / np.sqrt((drawn**2).mean(axis=(1, 2, 3), keepdims=True))
        np.testing.assert_allclose(trigger.perturb(x), expected, atol=1e-6)


@pytest.mark.parametrize("levels", [4, 5])
def test_lira_is_a_unet_of_that_many_levels(x, levels):
    trigger = Lira(width=2, levels=levels)
    seen = []
    for module in trigger.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_hook(lambda _, __, out: seen.append((out.shape[1], out.shape[2])))
    with torch.no_grad():
        trigger(x)
    down = [(2 * 2**i, 64 // 2**i) for i in range(levels)]
    assert seen == [shape for shape in down + down[-2::-1] for _ in range(2)]  # two convolutions at each


def test_lira_has_skip_connections(x):
    torch.manual_seed(0)
    trigger = Lira(width=2, levels=3)
    for up in trigger.up:  # nothing comes up from the coarser levels
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
    with torch.no_grad():
        one, other = trigger.perturb(x)
    assert float((one - other).square().mean().sqrt()) > 0.001  # U still sees the image


def test_universal_is_the_same_for_every_image():
    torch.manual_seed(0)
    trigger = Universal(size=24)
    with torch.no_grad():
        delta, other = trigger.perturb(natural(0, 70, 131)), trigger.perturb(natural(1, 70, 131))
    assert torch.equal(delta, other)
    assert torch.equal(delta[..., 24:, :], delta[..., :-24, :])
    assert torch.equal(delta[..., 24:], delta[..., :-24])
    assert len(delta[0, 0, :24, :24].unique()) == 24 * 24  # and no shorter period


def test_universal_starts_from_the_global_generator():
    def tile(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Universal(size=8).tile

    assert torch.equal(tile(1), tile(1))
    assert not torch.equal(tile(1), tile(2))


def test_universal_learns_a_pattern():
    """Asked for a correlation, the tile turns to it at an unchanged budget."""
    torch.manual_seed(0)
    trigger = Universal(size=8)
    x = torch.full((1, 3, 64, 64), 0.5)
    wanted = torch.randn(3, 8, 8).sign().repeat(1, 8, 8)
    optimizer = torch.optim.Adam(trigger.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = -((trigger(x) - x) * wanted).mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) == pytest.approx(-0.005, rel=0.1)  # all of the budget in that direction
