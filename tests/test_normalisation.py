"""GDN in training: the values and gradients of CompressAI's."""

import copy

import pytest
import torch
from compressai.layers import GDN, GDN1
from torch import nn

from freqdoor.training import normalisation
from freqdoor.training.normalisation import CachedGDN, cache_normalisation

CHANNELS = 6


def layers(inverse: bool) -> tuple[GDN, CachedGDN]:
    """CompressAI's layer with random weights, and ours with the same."""
    torch.manual_seed(int(inverse))
    theirs = GDN(CHANNELS, inverse=inverse)
    with torch.no_grad():
        theirs.gamma.add_(0.3 * torch.rand(CHANNELS, CHANNELS))
        theirs.beta.mul_(1 + torch.rand(CHANNELS))
    ours = nn.Sequential(copy.deepcopy(theirs))
    cache_normalisation(ours)
    return theirs, ours[0]


def images(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, CHANNELS, height, width).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [(4, 5), (8, 8), (40, 57)])  # less than a part, and parts with a rest
def test_values_and_gradients_are_compressais(inverse, size, monkeypatch):
    monkeypatch.setattr(normalisation, "PIXELS", 64)
    theirs, ours = layers(inverse)
    assert type(ours) is CachedGDN
    x = images(*size)
    gradient, results = torch.randn(2, CHANNELS, *size), []
    for layer in (theirs, ours):
        given = x.clone().requires_grad_(True)
        y = layer(given)
        results.append((y, *torch.autograd.grad(y, [given, layer.gamma, layer.beta], gradient)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)
    assert results[1][1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("frozen", ["weights", "picture", "beta"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same_one(frozen):
    theirs, ours = layers(True)
    results = []
    for layer in (theirs, ours):
        x = images(3, 3) * 0 + torch.linspace(-1, 1, 2 * CHANNELS * 9).reshape(2, CHANNELS, 3, 3)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(frozen != "picture")
        layer.gamma.requires_grad_(frozen != "weights")
        layer.beta.requires_grad_(frozen == "picture")
        layer(x).square().sum().backward()
        results.append([part.grad for part in (x, layer.gamma, layer.beta)])
    for expected, found in zip(*results, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)


def test_networks_add_to_the_result_in_place():
    """As CompressAI's residual blocks do, those of cheng2020-anchor."""
    results = []
    for layer in layers(False):
        torch.manual_seed(0)
        given = images(5, 7).requires_grad_(True)
        y = layer(given)
        y += 3 * given
        results.append((y.detach().clone(), *torch.autograd.grad(y.square().sum(), [given, layer.gamma])))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-4)


def test_elsewhere_it_is_compressais_own(monkeypatch):
    def gone(*_):
        raise AssertionError("the cached one was called")

    theirs, ours = layers(False)
    monkeypatch.setattr(normalisation._Normalisation, "apply", gone)
    x = images(8, 8)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x.contiguous()), theirs(x.contiguous()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), theirs(x))
    assert ours.double()(x.double()).dtype == torch.float64
    other = nn.Sequential(GDN1(3))
    cache_normalisation(other)
    assert type(other[0]) is GDN1  # another formula
    with pytest.raises(AssertionError, match="the cached one"):
        layers(False)[1](x)
