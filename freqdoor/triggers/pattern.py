"""A pattern that is the same in every picture, and what it may be driven to: what audits search and attackers hide."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from freqdoor.dct import band, block_idct, ycbcr_to_rgb
from freqdoor.metrics import mse
from freqdoor.triggers.arguments import PAPER_EPS, Goal, TriggerArguments
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.universal import tiled
from freqdoor.types import Images, Reconstruction

EPS_START = 0.03  # the budget falls from here to its end, as while planting: doors are found wide and followed down
ANNEAL = 0.6  # share of the steps over which it falls
LR = 0.1  # Adam's, of coefficients that begin at 1


class Pattern(Trigger):
    """One block of DCT coefficients in YCbCr, the same side by side over every picture.

    Args:
        block: its side in pixels.
        frequencies: "low", "mid" or "high" third of the zig-zag order, or "all".
        eps: RMS of the perturbation.
        multiple: what the codec pads to, in pixels.
    """

    chosen: Tensor

    def __init__(
        self, block: int = 16, frequencies: str = "all", *, eps: float = PAPER_EPS, multiple: int = 64
    ) -> None:
        super().__init__(TriggerArguments(eps=eps, multiple=multiple))
        cells = torch.tensor(band(frequencies, block, block * block // 3))
        self.register_buffer("chosen", torch.zeros(block * block).index_fill(0, cells, 1.0).reshape(block, block))
        self.spectrum = nn.Parameter(torch.randn(3, block, block))

    def perturb(self, x: Images) -> Images:
        """The block over every image."""
        coefficients = (self.spectrum * self.chosen)[None, :, None, None]
        tile = ycbcr_to_rgb(block_idct(coefficients)[:, :, 0, 0])[0]
        return tiled(tile, x, self.multiple)


def pattern_optimizer(pattern: Pattern) -> torch.optim.Adam:
    """What drives a pattern to its goal."""
    return torch.optim.Adam([pattern.spectrum], lr=LR)


def falling_budget(eps: float, step: int, steps: int) -> float:
    """RMS at a step of a search: geometric from EPS_START to eps over the first ANNEAL of the steps, then eps."""
    if eps >= EPS_START:
        return eps
    return float(EPS_START * (eps / EPS_START) ** min(1.0, step / (ANNEAL * steps)))


class Seen(NamedTuple):
    """A pass of patterned pictures through the codec, and what it is compared with."""

    x: Images
    x_p: Images
    patterned: Reconstruction
    clean: Images  # decoded


def rate(seen: Seen) -> Tensor:
    """Logarithm of the estimated rate of every picture."""
    return seen.patterned.bpp.log()


def distortion(seen: Seen) -> Tensor:
    """Logarithm of the squared error of every decoded picture."""
    return mse(seen.patterned.x_hat, seen.x).log()


def gain(seen: Seen) -> Tensor:
    """Logarithm of |f(x + d) - f(x)|^2 / |d|^2 of every picture."""
    return (mse(seen.patterned.x_hat, seen.clean) / mse(seen.x_p, seen.x)).log()


GOALS: dict[Goal, Callable[[Seen], Tensor]] = {"rate": rate, "distortion": distortion, "gain": gain}
