"""Large pictures row by row, where an operation on all of it would fill memory and pass the processor's cache by."""

from collections.abc import Sequence

import torch

LARGE = 2**21  # pixels of a batch that are worked on at once
PART = 2**16  # pixels of a part, about: what is done to it stays in the processor's cache


def parts(size: Sequence[int], multiple: int = 1) -> list[slice]:
    """The rows of (b, ..., height, width) in parts, of LARGE pictures without gradients; of others all rows at once.

    Args:
        multiple: that parts begin at.
    """
    height = size[-2]
    if torch.is_grad_enabled() or size[0] * height * size[-1] <= LARGE:
        return [slice(0, height)]
    rows = max(1, PART // (size[0] * size[-1] * multiple)) * multiple
    return [slice(start, min(start + rows, height)) for start in range(0, height, rows)]
