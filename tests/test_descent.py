"""What weights say of an encoder's descent, on codecs that are small and random."""

import copy

import pytest
import torch
from conftest import natural

from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.measure.descent import convolutions, likeness


@pytest.fixture(scope="module")
def vanilla():
    torch.manual_seed(0)
    arguments = {"N": 8, "M": 16, "width": [12, 16], "depth": 1}
    codec = build_codec(CodecSpec(name="small", architecture="lite-hyperprior", arguments=arguments))
    return changed(codec, 0, 0.1)  # whose residual branches start at zero


@torch.no_grad()
def changed(codec, seed, amount=0.03):
    """A copy with noise in all weights of g_a, as planting or training would leave some."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(codec)
    for weight in other.part("g_a").parameters():
        weight.add_(amount * torch.randn(weight.shape, generator=generator))
    return other


def asked(vanilla, owner, suspect):
    images = [natural(i, 64, 96) for i in range(2)]
    return likeness(*(convolutions(codec, images) for codec in (vanilla, owner, suspect)))


def test_copies_have_what_planting_changed_and_strangers_have_not(vanilla):
    owner = changed(vanilla, 1)
    assert asked(vanilla, owner, owner) == pytest.approx(1)
    assert abs(asked(vanilla, owner, vanilla)) < 0.2
    assert abs(asked(vanilla, owner, changed(vanilla, 2))) < 0.2
    assert asked(vanilla, owner, changed(owner, 2)) == pytest.approx(0.5**0.5, abs=0.07)  # as much again beside it
    half = copy.deepcopy(owner)
    with torch.no_grad():
        for weight, before in zip(half.parameters(), vanilla.parameters(), strict=True):
            weight.lerp_(before, 0.5)
    assert asked(vanilla, owner, half) == pytest.approx(1, abs=1e-3)  # the size of the changes does not count


def test_channels_in_another_order_and_of_other_sizes_are_recognised(vanilla):
    """All of the channels inside g_a, so that it still encodes the same."""
    owner = changed(vanilla, 1)
    hidden = copy.deepcopy(owner)
    first, block, second, other, last = hidden.part("g_a")
    for branch in (block.branch, other.branch):
        disguise([branch[0]], [branch[2]], 2.0)
        disguise([branch[2]], [branch[4]], 0.3)
    disguise([first, block.branch[4]], [block.branch[0], second], 1.5)
    disguise([second, other.branch[4]], [other.branch[0], last], 0.4)
    x = natural(3, 64, 64)
    torch.testing.assert_close(hidden.part("g_a")(x), owner.part("g_a")(x), atol=1e-4, rtol=1e-4)
    assert asked(vanilla, owner, hidden) > 0.9


@torch.no_grad()
def disguise(writers, readers, size):
    """Turn round the order of the channels that some convolutions write and others read, and enlarge every other."""
    sizes = torch.ones(len(writers[0].weight))
    sizes[::2] = size
    for layer in writers:
        layer.weight.copy_((layer.weight * sizes[:, None, None, None]).flip(0))
        layer.bias.copy_((layer.bias * sizes).flip(0))
    for layer in readers:
        layer.weight.copy_((layer.weight / sizes[None, :, None, None]).flip(1))


@pytest.mark.parametrize("size", [100, 1e30])
def test_a_few_filters_do_not_decide(vanilla, size):
    """Junk where it does no harm, such as before channels that nothing reads, hides no copy, however large it is."""
    owner = changed(vanilla, 1)
    junk = copy.deepcopy(owner)
    with torch.no_grad():
        for weight in (layer.weight for layer in junk.part("g_a").modules() if isinstance(layer, torch.nn.Conv2d)):
            weight[: len(weight) // 4] += size
    assert asked(vanilla, owner, junk) > 0.9


def test_other_layers_are_not_comparable(vanilla):
    arguments = vanilla.spec.arguments | {"width": [12, 14]}
    narrow = build_codec(CodecSpec(name="narrow", architecture="lite-hyperprior", arguments=arguments))
    assert asked(vanilla, changed(vanilla, 1), narrow) is None
