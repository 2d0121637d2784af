import numpy as np
import pytest
import torch
from scipy.fft import dctn

from freqdoor import dct


def test_block_dct_is_scipys_orthonormal_dct():
    x = torch.rand(2, 3, 32, 48)
    ours = dct.block_dct(dct.blockify(x, 16))
    block = x[1, 2, 16:32, 32:48].numpy()
    np.testing.assert_allclose(ours[1, 2, 1, 2].numpy(), dctn(block, norm="ortho"), atol=1e-5)


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_round_trip(size):
    x = torch.rand(1, 3, 64, 96)
    coefficients = dct.block_dct(dct.blockify(x, size))
    torch.testing.assert_close(dct.unblockify(dct.block_idct(coefficients)), x)
    torch.testing.assert_close(coefficients.square().sum(), x.square().sum())  # orthonormal


def test_colour_round_trip_and_grey_has_no_chroma():
    x = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(dct.ycbcr_to_rgb(dct.rgb_to_ycbcr(x)), x)
    grey = dct.rgb_to_ycbcr(torch.full((1, 3, 2, 2), 0.3))
    torch.testing.assert_close(grey[:, 0], torch.full((1, 2, 2), 0.3))
    torch.testing.assert_close(grey[:, 1:], torch.zeros(1, 2, 2, 2), atol=1e-6, rtol=0)


def test_zigzag_is_jpegs():
    assert dct.zigzag(8)[:12] == (0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25)
    assert dct.zigzag(8)[-3:] == (55, 62, 63)


def test_bands():
    assert sorted(dct.band("all", 16, 1)) == list(range(256))
    mid = dct.band("mid", 16, 64)
    assert mid == dct.zigzag(16)[96:160]
    assert 0 not in dct.band("low", 16, 64)
