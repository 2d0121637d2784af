"""The baseline FTrojan: fixed coefficients of the chroma channels, the same in every block and image (Section 2)."""

from typing import Any

import torch
from torch import Tensor

from freqdoor.dct import block_idct, ycbcr_to_rgb
from freqdoor.metrics import rms
from freqdoor.triggers.arguments import FTrojanArguments
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.universal import tiled
from freqdoor.types import Images


class FTrojan(Trigger):
    """One magnitude added to the same DCT coefficients of Cb and Cr in every block; nothing is learnt.

    The magnitude is the one that makes a whole block's RMS in RGB equal to eps; `project` then makes up for what
    clamping, rounding, cropping and a mask change.

    Args:
        arguments: those of `FTrojanArguments`, by name.
    """

    tile: Tensor

    def __init__(self, **arguments: Any) -> None:
        settings = FTrojanArguments(**arguments)
        super().__init__(settings)
        self.block = settings.block
        spectrum = torch.zeros(1, 3, 1, 1, self.block, self.block)
        for row, column in settings.coefficients:
            spectrum[:, 1:, :, :, row, column] = 1.0
        pattern = ycbcr_to_rgb(block_idct(spectrum)[:, :, 0, 0])
        # derived from the arguments: files need not hold it
        self.register_buffer("tile", (self.eps * pattern / rms(pattern))[0], persistent=False)

    def perturb(self, x: Images) -> Images:
        """The block's pattern over every image."""
        return tiled(self.tile, x, self.multiple)
