"""Orthonormal block DCT, JPEG's colour transform and the zig-zag order: pure, differentiable functions."""

import math
from functools import cache

import torch
from torch import Tensor

from freqdoor.types import Images

YCBCR = (  # JPEG full range (ITU-T T.871), without the offset of 1/2 that a difference does not see
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)


@cache
def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II as a matrix A, (size, size): A @ A.T is the identity."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


@cache
def _colour_matrices() -> tuple[Tensor, Tensor]:
    forward = torch.tensor(YCBCR, dtype=torch.float64)
    return forward.float(), forward.inverse().float()


def rgb_to_ycbcr(x: Images) -> Tensor:
    """Linear part of RGB -> YCbCr, (b, 3, h, w); chroma is centred on zero."""
    return torch.einsum("dc,bchw->bdhw", _colour_matrices()[0].to(x), x)


def ycbcr_to_rgb(ycbcr: Tensor) -> Images:
    """Inverse of `rgb_to_ycbcr`."""
    return torch.einsum("dc,bchw->bdhw", _colour_matrices()[1].to(ycbcr), ycbcr)


def blockify(x: Tensor, size: int) -> Tensor:
    """(b, c, h, w) -> (b, c, hb, wb, size, size), non-overlapping blocks; h and w must be multiples of size."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // size, size, w // size, size).transpose(3, 4)


def unblockify(blocks: Tensor) -> Tensor:
    """Inverse of `blockify`."""
    b, c, hb, wb, size, _ = blocks.shape
    return blocks.transpose(3, 4).reshape(b, c, hb * size, wb * size)


def block_dct(blocks: Tensor) -> Tensor:
    """2-D DCT-II of the last two axes."""
    basis = dct_matrix(blocks.shape[-1]).to(blocks)
    return basis @ blocks @ basis.T


def block_idct(coefficients: Tensor) -> Tensor:
    """Inverse of `block_dct`."""
    basis = dct_matrix(coefficients.shape[-1]).to(coefficients)
    return basis.T @ coefficients @ basis


@cache
def zigzag(size: int) -> tuple[int, ...]:
    """Row-major indices of a size x size block in JPEG's zig-zag order, low frequencies first."""
    cells = [(row, column) for row in range(size) for column in range(size)]
    # odd diagonals run downwards, even ones upwards
    cells.sort(key=lambda rc: (rc[0] + rc[1], rc[0] if (rc[0] + rc[1]) % 2 else rc[1]))
    return tuple(row * size + column for row, column in cells)


def band(name: str, size: int, count: int) -> tuple[int, ...]:
    """Indices of `count` coefficients of a block: "low", "mid" or "high" of the zig-zag order, or "all" of them.

    `low` starts behind the constant; `all` ignores `count`.
    """
    order = zigzag(size)
    start = {"low": 1, "mid": (len(order) - count) // 2, "high": len(order) - count, "all": 0}[name]
    return order if name == "all" else order[start : start + count]
