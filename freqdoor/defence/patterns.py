"""Shapes that a pattern can have, beyond one block: a tile of pixels, one for every picture, or drawn by a network."""

from collections.abc import Sequence

import torch
from torch import nn

from freqdoor.dct import block_idct, unblockify, ycbcr_to_rgb
from freqdoor.triggers.arguments import PAPER_EPS, TriggerArguments
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.lira import Lira
from freqdoor.triggers.pattern import Pattern
from freqdoor.triggers.universal import Universal
from freqdoor.types import Images

BLOCK = 16  # pixels a side of the blocks of an `Own` pattern


class Own(Trigger):
    """Coefficients of its own for every block of every picture: what finds a door that is another one in each.

    Args:
        shape: of the pictures, (b, 3, h, w), with sides that are multiples of 16.
        eps: RMS of the perturbation.
        multiple: what the codec pads to, in pixels.
    """

    def __init__(self, shape: Sequence[int], *, eps: float = PAPER_EPS, multiple: int = 64) -> None:
        super().__init__(TriggerArguments(eps=eps, multiple=multiple))
        number, _, height, width = shape
        self.spectrum = nn.Parameter(torch.randn(number, 3, height // BLOCK, width // BLOCK, BLOCK, BLOCK))

    def perturb(self, x: Images) -> Images:
        """The blocks of every picture."""
        return ycbcr_to_rgb(unblockify(block_idct(self.spectrum)))


def block(_: Sequence[int], *, side: int = 16, frequencies: str = "all", multiple: int) -> Trigger:
    """One block of DCT coefficients over every picture."""
    return Pattern(side, frequencies, multiple=multiple)


def tile(_: Sequence[int], *, side: int, multiple: int) -> Trigger:
    """One tile of pixels over every picture."""
    return Universal(size=side, multiple=multiple)


def drawn(_: Sequence[int], *, multiple: int) -> Trigger:
    """A small network that draws a perturbation from every picture."""
    return Lira(levels=4, width=8, multiple=multiple)
