"""The baseline FTrojan: fixed coefficients of the chroma channels, the same in every block and image (Section 2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from freqdoor.dct import block_idct, ycbcr_to_rgb
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import rms
from freqdoor.triggers.base import PAPER_EPS, Trigger
from freqdoor.triggers.universal import tiled
from freqdoor.types import Images

BLOCKS = (4, 8, 16, 32, 64)  # what divides the codec's stride


class FTrojan(Trigger):
    """One magnitude added to the same DCT coefficients of Cb and Cr in every block; nothing is learnt.

    The magnitude is the one that makes a whole block's RMS in RGB equal to eps; `project` then makes up for what
    clamping, rounding, cropping and a mask change.

    Args:
        block: side of a block in pixels.
        coefficients: (row, column) of each coefficient that is changed.
        eps, project: see `Trigger`.
    """

    tile: Tensor

    def __init__(
        self,
        *,
        block: int = 32,
        coefficients: Sequence[Sequence[int]] = ((31, 31), (15, 15)),
        eps: float = PAPER_EPS,
        project: bool = True,
    ) -> None:
        super().__init__(eps=eps, project=project)
        if block not in BLOCKS:
            raise FreqdoorError(f"block: expected {', '.join(map(str, BLOCKS))}, found {block}")
        self.block, self.coefficients = block, _places(coefficients, block)
        spectrum = torch.zeros(1, 3, 1, 1, block, block)
        for row, column in self.coefficients:
            spectrum[:, 1:, :, :, row, column] = 1.0
        pattern = ycbcr_to_rgb(block_idct(spectrum)[:, :, 0, 0])
        # derived from the arguments: files need not hold it
        self.register_buffer("tile", (eps * pattern / rms(pattern))[0], persistent=False)

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "block": self.block,
            "coefficients": [list(place) for place in self.coefficients],
            "eps": self.eps,
            "project": self.project,
        }

    def perturb(self, x: Images) -> Images:
        """The block's pattern over every image."""
        return tiled(self.tile, x)


def _places(coefficients: Sequence[Sequence[int]], block: int) -> tuple[tuple[int, int], ...]:
    """The coefficients as distinct (row, column) inside the block."""
    try:
        places = tuple((row, column) for row, column in coefficients)
        fine = 0 < len(set(places)) == len(places) and all(i in range(block) for place in places for i in place)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise FreqdoorError(
            f"coefficients: expected distinct pairs [row, column] from 0 to {block - 1}, found {coefficients}"
        )
    return places
