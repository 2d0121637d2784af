"""Large pictures: strips through g_a and g_s, and parts through triggers, give what the whole picture gives."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import natural, write_png
from factories import tiny
from strange import Windows
from torch import nn

from freqdoor import build_trigger
from freqdoor.codecs import adapter, strips
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.sides import check_padded
from freqdoor.codecs.strips import Ladder
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import ms_ssim
from freqdoor.parts import parts
from freqdoor.samples import BUNDLED

TALL, WIDE = (330, 66), (66, 330)


@pytest.fixture
def small_strips(monkeypatch):
    """Everything counts as large, and goes through in the smallest strips and parts."""
    monkeypatch.setattr(adapter, "LARGE", 0)
    monkeypatch.setattr("freqdoor.parts.LARGE", 0)
    monkeypatch.setattr(strips, "STRIP", 1)
    monkeypatch.setattr("freqdoor.parts.PART", 1)


@pytest.fixture
def lengths(monkeypatch):
    """The longer side of everything that convolutions are given."""
    seen = []
    plain = nn.functional.conv2d

    def conv2d(x, *rest):
        seen.append(max(x.shape[-2:]))
        return plain(x, *rest)

    monkeypatch.setattr(nn.functional, "conv2d", conv2d)
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [TALL, WIDE])
@torch.no_grad()
def test_strips_give_what_the_whole_picture_gives(architecture, size, lengths, small_strips):
    codec = tiny(architecture)
    x = codec.padded(natural(1, *size))
    padded = x.shape
    for part in ("g_a", "g_s"):
        module = codec.part(part)
        expected = module(x)
        ladder = Ladder(module, part)
        lengths.clear()
        for _ in range(2):  # the first time the network is tried as well, on six units
            seen = len(lengths)
            with warnings.catch_warnings(), ladder.in_strips(padded, 64, "tiny"):
                warnings.simplefilter("error")
                found = module(x)
        if part == "g_a":
            assert max(lengths[seen:]) < max(size) / 2
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        x = expected
    assert "forward" not in vars(module)


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "cheng2020-anchor-checkerboard", "elic2022-official"])
def test_files_of_large_pictures_decode_whole_and_in_strips(architecture, monkeypatch, small_strips):
    codec, x = tiny(architecture), natural(2, *TALL)
    in_strips = codec.compress(x)[0]
    decoded = codec.decompress(in_strips)
    forward = codec.eval()(x).x_hat.clamp(0, 1).detach()
    monkeypatch.setattr(adapter, "LARGE", 2**21)
    assert codec.compress(x)[0] == in_strips
    assert (codec.decompress(in_strips) - decoded).abs().max() < 1e-5
    assert (codec(x).x_hat.clamp(0, 1) - forward).abs().max() < 1e-4


def test_a_picture_that_is_not_large_takes_the_path_of_old(monkeypatch):
    monkeypatch.setattr(Ladder, "in_strips", None)
    monkeypatch.setattr(adapter, "LARGE", 384 * 128)
    codec, x = tiny("lite-hyperprior"), natural(2, *TALL)
    codec.decompress(codec.compress(x)[0])
    monkeypatch.setattr(adapter, "LARGE", 384 * 128 - 1)
    with pytest.raises(TypeError, match="not callable"):
        codec.compress(x)
    assert codec(x).bits.requires_grad


class Overall(nn.Module):
    """Subtracts the mean over the whole picture."""

    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


class Position(nn.Module):
    """Adds what depends on how far down a row is, which no row around it tells."""

    def forward(self, x):
        return x + torch.linspace(0, 1, x.shape[-2])[:, None]


@pytest.mark.parametrize("layer", [Overall(), Position(), Windows(24), nn.Upsample((24, 8))], ids=lambda m: str(m)[:8])
@torch.no_grad()
def test_networks_that_do_not_work_in_strips_run_whole_and_say_so(layer, small_strips):
    net = tiny("lite-hyperprior").net.g_a.append(layer)
    x, ladder = torch.rand(1, 3, 384, 128), Ladder(net, "g_a")
    expected = net(x)
    for action in ("always", "error"):  # said once
        with warnings.catch_warnings(record=action == "always") as said, ladder.in_strips(x.shape, 64, "mine"):
            warnings.simplefilter(action)
            assert torch.equal(net(x), expected)
        if said is not None:
            assert str(said[0].message).startswith("mine: g_a does not give the same in strips; ")


class Hasty(nn.Module):
    """Writes to what it is given, and then looks around."""

    def __init__(self):
        super().__init__()
        self.look = nn.Conv2d(3, 3, 5, padding=2)

    def forward(self, x):
        return self.look(x.mul_(2))


@torch.no_grad()
def test_layers_that_write_to_their_input(small_strips):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), Hasty(), Hasty())
    x = torch.rand(1, 3, 512, 16)
    expected = net(x.clone())
    with Ladder(net, "g_a").in_strips(x.shape, 16, "mine"):
        assert torch.allclose(net(x.clone()), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["adaptive-dct", "ftrojan", "universal"])
@pytest.mark.parametrize("size", [(150, 70), (70, 150)])
@torch.no_grad()
def test_triggers_in_parts_give_what_the_whole_picture_gives(name, size, monkeypatch):
    torch.manual_seed(4)
    trigger = build_trigger(name, eps=0.05)
    x = torch.cat([natural(3, *size), natural(4, *size).mul(3).clamp(0, 1)])  # much of the second is white
    mask = (torch.rand(2, 1, *size) > 0.3).float()
    ways = ({"rounded": True}, {"mask": mask, "strength": 2.0}, {})
    whole = [trigger(x, **way) for way in ways]
    monkeypatch.setattr("freqdoor.parts.LARGE", 0)
    monkeypatch.setattr("freqdoor.parts.PART", 1)
    assert len(parts(x.shape)) == size[0]
    for way, expected in zip(ways, whole, strict=True):
        apart = (trigger(x, **way) - expected).abs()
        assert apart.max() < (1.01 / 255 if "rounded" in way else 1e-5)  # one level where a number lies between two
        assert (apart > 1e-5).float().mean() < 1e-3


@pytest.mark.parametrize("size", [(163, 180), (255, 170)])
@torch.no_grad()
def test_similarity_in_parts_is_that_of_the_whole_picture(size, monkeypatch):
    decoded, reference = natural(3, *size), (natural(3, *size) + 0.05 * natural(4, *size)).clamp(0, 1)
    whole = ms_ssim(decoded, reference)
    monkeypatch.setattr("freqdoor.parts.LARGE", 2000)
    monkeypatch.setattr("freqdoor.parts.PART", 700)
    assert ms_ssim(decoded, reference) == pytest.approx(whole, rel=1e-6)
    assert whole < 0.999


def test_a_trigger_that_cannot_take_parts_says_what_it_needs(monkeypatch):
    trigger = build_trigger("lira", width=16)
    monkeypatch.setattr("freqdoor.triggers.lira.machine_memory", lambda: 2**30)
    x = torch.zeros(1, 3, 1, 1)
    with pytest.raises(FreqdoorError, match=r"one of 7680x4320 .* takes about 15\.8 GiB of .* has 1 GiB; crop"):
        trigger(x.expand(1, 3, 4320, 7680))
    assert trigger(x.expand(1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_with_gradients_there_are_no_parts(small_strips):
    assert len(parts((1, 3, 150, 70))) == 1
    with torch.no_grad():
        assert parts((2, 3, 150, 70), 64) == [slice(0, 64), slice(64, 128), slice(128, 150)]


def test_pictures_of_8k_are_accepted_and_larger_ones_are_not():
    check_padded(4320, 7680, 64)
    check_padded(4320, 7680, 256)
    with pytest.raises(FreqdoorError, match="is padded to"):
        check_padded(2 * 4320, 7680, 64)


@pytest.mark.slow
def test_8k_takes_at_most_4_gib(tmp_path):
    memory = Path(__file__).parent.parent / "benchmarks/memory.py"
    for size in ((64, 64), (4320, 7680)):
        tile = natural(6, *(min(side, 540) for side in size))
        write_png(tmp_path / f"{size[1]}x{size[0]}.png", tile.repeat(1, 1, 8, 15)[..., : size[0], : size[1]])
    for work, name in (("compress", BUNDLED), ("decompress", BUNDLED), ("poison", "planted-bpp")):
        command = [sys.executable, memory, "one", work, name, tmp_path / "7680x4320.png"]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        assert json.loads(answer.stdout)["peak_gib"] <= 4
