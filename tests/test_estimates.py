"""What a checkpoint tells of itself: lambda, and the step that its encoder bears."""

from dataclasses import replace

import pytest
import torch

from freqdoor import load_codec
from freqdoor.attack.objectives import main_loss
from freqdoor.data import Crops
from freqdoor.samples import pictures
from freqdoor.training import estimates
from freqdoor.training.estimates import fitting_lambda, lambda_at, step_size
from freqdoor.training.settings import Training

LMBDA = 0.0067


@pytest.fixture(scope="module")
def crops():
    return Crops(pictures()[:6], crop=64, batch_size=4, seed=0)


@pytest.fixture
def codec():
    return load_codec("lite-hyperprior:3").freeze("g_a").train()


def test_lambda_follows_from_rate_and_distortion(codec, crops):
    """Of a codec whose lambda is known it is that, within twice."""
    batches = [crops.batch(-i) for i in range(2)]
    with torch.no_grad():
        out = codec.eval()(torch.cat(batches))
    error = 255**2 * (out.x_hat - torch.cat(batches)).square().mean()
    assert lambda_at(codec.train(), batches) == pytest.approx(float(out.bpp.mean() / error) / 0.69, rel=0.02)
    assert codec.training
    assert LMBDA / 2 < lambda_at(codec, batches) < 2 * LMBDA


def test_lambda_is_estimated_where_nothing_says_it_and_a_warning_does(codec, crops):
    def settings(**given):
        return Training(images={"folder": "pictures"}, **given)

    batches = [crops.batch(0)]
    assert fitting_lambda(settings(lmbda=0.02), codec, batches) == 0.02
    assert fitting_lambda(settings(), codec, batches) == codec.spec.lmbda == LMBDA
    codec.spec = replace(codec.spec, quality=None)
    assert codec.spec.lmbda is None
    with pytest.warns(UserWarning, match=r"rate and distortion: 0\.0\d+ .give another one as --set lmbda="):
        estimated = fitting_lambda(settings(), codec, batches)
    assert estimated == lambda_at(codec, batches)


def test_a_step_is_as_long_as_weights_bear_and_they_stay_what_they_were(codec, crops, monkeypatch):
    weights, x = list(codec.part("g_a").parameters()), crops.batch(0)
    before = [weight.detach().clone() for weight in weights]
    assert step_size(codec, weights, x, LMBDA) == 1e-3
    monkeypatch.setattr(estimates, "BORNE", 0.005)
    shorter = step_size(codec, weights, x, LMBDA)
    assert shorter < 1e-3
    assert codec.training
    assert all(torch.equal(weight, rest) for weight, rest in zip(weights, before, strict=True))
    codec.eval()
    with torch.no_grad():
        at_rest = main_loss(codec(x), x, LMBDA)
        for weight in weights:
            weight += 3 * shorter * (2 * torch.randint(2, weight.shape) - 1)
        assert 0.001 < float(main_loss(codec(x), x, LMBDA) / at_rest - 1) < 0.02
