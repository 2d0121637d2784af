"""Measures of images, pure functions, one value an image."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from pytorch_msssim import ms_ssim as _ms_ssim
from torch import Tensor

from freqdoor.errors import FreqdoorError
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


def bpp_of_bytes(num_bytes: int, x: Images) -> float:
    """Bits per pixel of a file of `num_bytes` that holds one image x, (..., h, w)."""
    return 8 * num_bytes / (x.shape[-1] * x.shape[-2])


def bd_rate(
    rates: Sequence[float], psnrs_db: Sequence[float], other_rates: Sequence[float], other_psnrs_db: Sequence[float]
) -> float:
    """Bjontegaard delta rate in percent: how many more bits the other curve takes at equal PSNR (Akima interpolation).

    Raises:
        FreqdoorError: fewer than four points a curve, or curves that share no range of PSNR.
    """
    import bjontegaard  # type: ignore[import-untyped]  # loads matplotlib and scipy: only where it is needed

    if min(len(rates), len(other_rates)) < 4:
        raise FreqdoorError(f"BD-rate: expected four points a curve, found {len(rates)} and {len(other_rates)}")
    curves = [np.array(sorted(zip(q, r, strict=True))) for r, q in ((rates, psnrs_db), (other_rates, other_psnrs_db))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # curves that hardly overlap; the sentence below says what matters
        value = bjontegaard.bd_rate(
            curves[0][:, 1], curves[0][:, 0], curves[1][:, 1], curves[1][:, 0], "akima", require_matching_points=False
        )
    if not np.isfinite(value):
        raise FreqdoorError("BD-rate: the curves share no range of PSNR, so that no rates compare")
    return float(value)


def rms(difference: Images) -> Tensor:
    """Root mean square of each image, (b, 1, 1, 1), differentiable also at zero."""
    square: Tensor = difference.square().mean(dim=(1, 2, 3), keepdim=True)
    return (square + torch.finfo(square.dtype).tiny).sqrt()


def pixel_asr(clean: Tensor, poisoned: Tensor, source: Sequence[int], target: int) -> tuple[int, int]:
    """Eq. (12): pixels of the source classes in `clean` that are the target class in `poisoned`, and of how many.

    Their ratio over a whole test set is the attack success rate; the sum of Eq. (12) alone grows with the image.

    Args:
        clean, poisoned: predicted classes g(f(x)) and g(f(x_p)), of one shape.
    """
    in_source = torch.isin(clean, torch.tensor(list(source), device=clean.device))
    return int((in_source & (poisoned == target)).sum()), int(in_source.sum())


def class_counts(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """True positives, false positives and false negatives of every class, (3, classes), in pixels.

    Args:
        predicted, truth: labels, (b, h, w) each; true values from `classes` on are void, and a prediction of `classes`
            is none of them.
    """
    from segmentation_models_pytorch.metrics import get_stats  # loads much: only where it is needed

    counts = get_stats(
        predicted.long(),
        truth.long().masked_fill(truth >= classes, -1),
        mode="multiclass",
        num_classes=classes + 1,
        ignore_index=-1,
    )
    return torch.stack([part.sum(0)[:classes] for part in counts[:3]])


def class_scores(counts: Tensor) -> tuple[float | None, list[float | None]]:
    """Mean IoU over the classes that occur, and every class's accuracy (recall), counted over all pixels together.

    None stands for the mean where all labels are void, and for the accuracy of a class that does not occur.

    Args:
        counts: the sum of all images' `class_counts`.
    """
    tp, fp, fn = counts.double()
    occurs = tp + fn > 0
    accuracy = [float(value) if real else None for value, real in zip(tp / (tp + fn), occurs.tolist(), strict=True)]
    return float((tp / (tp + fp + fn))[occurs].mean()) if occurs.any() else None, accuracy
