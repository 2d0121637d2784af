"""A learned pattern that does not look at the image: what adaptivity has to beat."""

import math
from typing import Any

import torch
from compressai.ops import compute_padding
from torch import Tensor, nn

from freqdoor.codecs.adapter import STRIDE
from freqdoor.errors import FreqdoorError
from freqdoor.triggers.base import PAPER_EPS, Trigger
from freqdoor.types import Images


class Universal(Trigger):
    """The same learnt tile, (3, size, size), side by side over every image, in RGB.

    Args:
        size: side of the tile in pixels.
        eps, project: see `Trigger`.
    """

    def __init__(self, *, size: int = 64, eps: float = PAPER_EPS, project: bool = True) -> None:
        super().__init__(eps=eps, project=project)
        if not 1 <= size <= 1024:
            raise FreqdoorError(f"size: expected 1 to 1024 pixels, found {size}")
        self.size = size
        self.tile = nn.Parameter(eps * torch.randn(3, size, size))

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"size": self.size, "eps": self.eps, "project": self.project}

    def perturb(self, x: Images) -> Images:
        """The tile over every image."""
        return tiled(self.tile, x)


def tiled(tile: Tensor, x: Images) -> Images:
    """A tile, (3, size, size), repeated over the shape of x, from the corner of the image as the codec pads it."""
    height, width = x.shape[-2:]
    (left, _, top, _), _ = compute_padding(height, width, min_div=STRIDE)
    size = tile.shape[-1]
    row, column = top % size, left % size
    repeated = tile.repeat(1, math.ceil((row + height) / size), math.ceil((column + width) / size))
    return repeated[:, row : row + height, column : column + width].expand_as(x)
