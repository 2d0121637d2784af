"""Measures of images, pure functions, one value an image."""

import torch
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

from freqdoor.types import Images, from_uint8, to_uint8

MS_SSIM_MIN_SIDE = 161  # four halvings of an 11-pixel window


def mse(a: Images, b: Images) -> Tensor:
    """Mean squared error of each image, (b,), on the [0, 1] scale."""
    return (a - b).square().flatten(1).mean(1)


def distortion(x_hat: Images, x: Images) -> Tensor:
    """D of Eq. (1): 255^2 MSE, so that lambda has the field's usual values; mean over the batch."""
    return 255**2 * (x_hat - x).square().mean()


def psnr(a: Images, b: Images) -> Tensor:
    """10 log10(1 / MSE) of each image in dB, (b,); infinite for equal images."""
    return -10 * mse(a, b).log10()


def psnr_8bit(decoded: Images, reference: Images) -> Tensor:
    """PSNR in dB after both are rounded to 8 bits: the convention of CompressAI's eval_model."""
    return psnr(from_uint8(to_uint8(decoded)), from_uint8(to_uint8(reference)))


def ms_ssim(decoded: Images, reference: Images) -> float | None:
    """MS-SSIM of one 8-bit image against another, or None where a side is below 161 pixels."""
    if min(decoded.shape[-2:]) < MS_SSIM_MIN_SIDE:
        return None
    a, b = from_uint8(to_uint8(decoded)), from_uint8(to_uint8(reference))
    return float(_ms_ssim(a, b, data_range=1.0))


def rms(difference: Images) -> Tensor:
    """Root mean square of each image, (b, 1, 1, 1), differentiable also at zero."""
    square: Tensor = difference.square().mean(dim=(1, 2, 3), keepdim=True)
    return (square + torch.finfo(square.dtype).tiny).sqrt()
