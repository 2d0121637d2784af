"""Measures of images, pure functions, one value an image."""

import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from freqdoor.errors import FreqdoorError
from freqdoor.parts import parts
from freqdoor.types import Images, from_uint8, to_uint8

MS_SSIM_MIN_SIDE = 161  # four halvings of an 11-pixel window
WINDOW, SIGMA = 11, 1.5  # pixels, of its Gaussian
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of its scales
SCALES = len(MS_SSIM_WEIGHTS)
C1, C2 = 0.01**2, 0.03**2  # keep its quotients finite


def mse(a: Images, b: Images) -> Tensor:
    """Mean squared error of each image, (b,), on the [0, 1] scale."""
    return (a - b).square().mean(dim=tuple(range(1, a.dim())))  # flattened, a channels-last image would be copied


def distortion(x_hat: Images, x: Images) -> Tensor:
    """D of Eq. (1): 255^2 MSE, so that lambda has the field's usual values; mean over the batch."""
    return 255**2 * (x_hat - x).square().mean()


def psnr(a: Images, b: Images) -> Tensor:
    """10 log10(1 / MSE) of each image in dB, (b,); infinite for equal images."""
    return -10 * mse(a, b).log10()


def psnr_8bit(decoded: Images, reference: Images) -> Tensor:
    """PSNR in dB after both are rounded to 8 bits: the convention of CompressAI's eval_model."""
    return psnr(from_uint8(to_uint8(decoded)), from_uint8(to_uint8(reference)))


class MsSsim:
    """MS-SSIM (Z. Wang et al., 2003) of decoded images against one reference, of which all is computed once.

    The numbers are those of pytorch_msssim bit for bit, where products are added without being rounded first: its sums
    in its order, in a fifth of its time. Large pictures are compared part by part.

    Args:
        reference: one image, (1, 3, h, w).
    """

    @torch.no_grad()
    def __init__(self, reference: Images) -> None:
        self._scales: list[Images] = []
        self._known: list[tuple[Tensor, Tensor]] = []  # local means and variances, where there is one part
        if min(reference.shape[-2:]) < MS_SSIM_MIN_SIDE:
            return
        x = _in_8_bits(reference)
        for _ in MS_SSIM_WEIGHTS:
            self._scales.append(x)
            self._known += [_local(x)] if len(_windows(x)) == 1 else []
            x = _halved(x)

    @torch.no_grad()
    def __call__(self, decoded: Images) -> float | None:
        """MS-SSIM of one image after rounding to 8 bits, or None where a side is below 161 pixels."""
        if not self._scales:
            return None
        y, terms = _in_8_bits(decoded), []
        known = iter(self._known)
        for scale, x in enumerate(self._scales, start=1):
            windows, term = _windows(x), x.new_zeros(1, 3)
            for rows in windows:
                seen = x[..., rows.start : rows.stop + WINDOW - 1, :]
                of_x = next(known) if len(windows) == 1 else _local(seen)
                quotient = _similarity(y[..., rows.start : rows.stop + WINDOW - 1, :], seen, *of_x, scale == SCALES)
                term += quotient * ((rows.stop - rows.start) / windows[-1].stop)
            terms.append(term.relu())
            y = _halved(y)
        return float((torch.stack(terms) ** y.new_tensor(MS_SSIM_WEIGHTS)[:, None, None]).prod(0).mean())


def _similarity(y: Images, x: Images, mean_x: Tensor, variance_x: Tensor, luminance: bool) -> Tensor:
    """Means of contrast and structure, and with `luminance` of all three, over the windows of a part, (1, 3)."""
    mean_y = _blurred(y)
    product = mean_y * mean_x
    variances = (_blurred(y * y) - mean_y.square()).add_(variance_x)
    quotient = (_blurred(y * x) - product).mul_(2).add_(C2).div_(variances.add_(C2))
    if luminance:
        squares = mean_y.square() + mean_x.square()
        quotient = product.mul_(2).add_(C1).div_(squares.add_(C1)).mul_(quotient)
    return quotient.flatten(2).mean(-1)


def _local(x: Images) -> tuple[Tensor, Tensor]:
    """Local means and variances."""
    mean = _blurred(x)
    return mean, _blurred(x * x) - mean.square()


def _windows(x: Images) -> list[slice]:
    """The first rows of all windows that lie within an image, in parts."""
    return parts((*x.shape[:-2], x.shape[-2] - WINDOW + 1, x.shape[-1]))


def ms_ssim(decoded: Images, reference: Images) -> float | None:
    """MS-SSIM of one 8-bit image against another, or None where a side is below 161 pixels."""
    return MsSsim(reference)(decoded)


def _in_8_bits(x: Images) -> Images:
    return from_uint8(to_uint8(x)).contiguous()


def _blurred(x: Images) -> Images:
    """Local means under a Gaussian window, where it lies within the image: sums of shifted images, the first first."""
    for axis in (-2, -1):
        length = x.shape[axis] - WINDOW + 1
        shifted = [x.narrow(axis, start, length) for start in range(WINDOW)]
        x = shifted[0] * _gaussian()[0]
        for part, weight in zip(shifted[1:], _gaussian()[1:], strict=True):
            x.add_(part, alpha=weight)
    return x


@cache
def _gaussian() -> list[float]:
    weights = torch.exp(-((torch.arange(WINDOW, dtype=torch.float32) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    values: list[float] = (weights / weights.sum()).tolist()
    return values


def _halved(x: Images) -> Images:
    return F.avg_pool2d(x, 2, padding=[side % 2 for side in x.shape[-2:]])


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
