"""A learned pattern that does not look at the image: what adaptivity has to beat."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from freqdoor.codecs.sides import padding
from freqdoor.triggers.arguments import UniversalArguments
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images


class Universal(Trigger):
    """The same learnt tile, (3, size, size), side by side over every image, in RGB.

    Args:
        arguments: those of `UniversalArguments`, by name.
    """

    def __init__(self, **arguments: Any) -> None:
        settings = UniversalArguments(**arguments)
        super().__init__(settings)
        self.tile = nn.Parameter(self.eps * torch.randn(3, settings.size, settings.size))

    def perturb(self, x: Images) -> Images:
        """The tile over every image."""
        return tiled(self.tile, x, self.multiple)


def tiled(tile: Tensor, x: Images, multiple: int) -> Images:
    """A tile, (3, size, size), repeated over the shape of x, from the corner of the image as the codec pads it."""
    height, width = x.shape[-2:]
    (left, _, top, _), _ = padding(height, width, multiple)
    size = tile.shape[-1]
    row, column = top % size, left % size
    repeated = tile.repeat(1, math.ceil((row + height) / size), math.ceil((column + width) / size))
    return repeated[:, row : row + height, column : column + width].expand_as(x)
