"""A pattern that opens a door if there is one: optimised against a frozen encoder, without any reference."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec
from freqdoor.data import seed_for
from freqdoor.dct import band, block_idct, ycbcr_to_rgb
from freqdoor.metrics import mse
from freqdoor.triggers.arguments import PAPER_EPS, TriggerArguments
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.universal import tiled
from freqdoor.types import Images, Reconstruction

Goal = Literal["rate", "distortion", "gain"]
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


def inverted(
    codec: Codec,
    x: Images,
    goal: Goal,
    make: Callable[[], Trigger],
    *,
    lr: float = LR,
    steps: int = 80,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Trigger:
    """The pattern that drives a goal furthest on pictures, (b, 3, h, w), by Adam against the frozen codec.

    The budget falls geometrically to the pattern's own. The codec is as it was afterwards, its modes and random numbers
    too.

    Args:
        make: gives the pattern with its first, random values.
        lr: Adam's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "inversion", goal))
        pattern = make().to(x.device).train()
        optimizer = torch.optim.Adam(pattern.parameters(), lr=lr)
        modes = {module: module.training for module in codec.modules()}
        asks = {parameter: parameter.requires_grad for parameter in codec.parameters()}
        codec.requires_grad_(False)
        eps = pattern.eps
        try:
            with torch.no_grad():
                clean = codec.eval()(x).x_hat
            codec.train()  # rounding has no gradient, noise has
            for step in range(steps):
                budget = EPS_START * (eps / EPS_START) ** min(1.0, step / (ANNEAL * steps)) if eps < EPS_START else eps
                x_p = pattern(x, eps=budget)
                value = GOALS[goal](Seen(x, x_p, codec(x_p), clean)).mean()
                optimizer.zero_grad()
                (-value).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if progress:
                    progress(step, float(value.detach()))
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, ask in asks.items():
                parameter.requires_grad = ask
    return pattern.eval()
