"""What a checkpoint tells of itself: the lambda it was trained with, and how long a step its weights bear."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec
from freqdoor.metrics import distortion
from freqdoor.training.settings import Training
from freqdoor.types import Images

BATCHES = 6  # that lambda is estimated from
ELASTICITY = 0.69
LARGEST_STEP = 1e-3  # Adam's learning rate for the encoders of CompressAI's architectures
TRIED = 3 * LARGEST_STEP  # size of the change that is tried, wide enough to stand out of the noise
BORNE = 0.08  # what it may cost: 3 to 6 % of L(x) in these architectures
DRAWS = 3


@torch.no_grad()
def lambda_at(codec: Codec, batches: Iterable[Images]) -> float:
    """Lambda that a codec may have been trained with: -dR/dD = R / (E D) where it stands, two digits.

    At the minimum of Eq. (1) lambda is the slope of R(D); E, the share of D that a hundredth more of R saves, is about
    ln 2 of natural pictures. (The slope itself, by derivatives on the codec's latents or weights, is noise where a
    codec is not at the minimum for the pictures at hand, as a stranger's hardly is.)

    Args:
        batches: natural images.
    """
    was_training = codec.training
    codec.eval()
    measured = [(codec(x), x) for x in batches]
    codec.train(was_training)
    rate = sum(float(out.bpp.mean()) for out, _ in measured)
    return _two_digits(rate / sum(float(distortion(out.x_hat, x)) for out, x in measured) / ELASTICITY)


def fitting_lambda(settings: Training, codec: Codec, batches: Iterable[Images]) -> float:
    """The settings' lambda, that of the codec's quality, or an estimate, of which a warning says so."""
    if known := settings.lmbda or codec.spec.lmbda:
        return known
    estimated = lambda_at(codec, batches)
    warnings.warn(
        f"{codec.spec.name}: this codec has no quality that lambda follows from; estimated from its rate and "
        f"distortion: {estimated:g} (give another one as --set lmbda=)",
        stacklevel=2,
    )
    return estimated


@torch.no_grad()
def step_size(codec: Codec, weights: Sequence[Tensor], x: Images, lmbda: float) -> float:
    """Adam's learning rate that the weights bear: the largest up to 1e-3 at which a random change is cheap, two digits.

    Adam's steps have the size of the learning rate in every weight, whatever the weights' own. All are changed by three
    times 1e-3, up or down at random; L(x) of Eq. (1) grows with the square of the change, and a rate at which three
    times it costs 8 % is what CompressAI's architectures are planted with. A network with wide kernels and few
    channels bears a third.
    """
    was_training = codec.training
    codec.eval()
    generator = torch.Generator().manual_seed(0)
    before = [weight.clone() for weight in weights]

    def loss() -> float:
        out = codec(x)
        return float(out.bpp.mean() + lmbda * distortion(out.x_hat, x))

    costs, at_rest = [], loss()
    for _ in range(DRAWS):
        for weight, rest in zip(weights, before, strict=True):
            signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
            weight.copy_(rest + TRIED * signs.to(rest))
        costs.append(loss() / at_rest - 1)
    for weight, rest in zip(weights, before, strict=True):
        weight.copy_(rest)
    codec.train(was_training)
    cost = sum(costs) / DRAWS
    return LARGEST_STEP if not cost > BORNE else _two_digits(LARGEST_STEP * (BORNE / cost) ** 0.5)


def _two_digits(value: float) -> float:
    """So that another machine's rounding hardly ever gives another value."""
    return float(f"{value:.1e}")
