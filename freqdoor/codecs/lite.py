"""The bundled architecture `lite-hyperprior`: a mean-scale hyperprior that trains and runs quickly on a CPU.

g_a and g_s are ladders of strided linear convolutions with residual bottlenecks in between. The residual
branches start at zero, so that at initialisation g_a is linear and `initialise_klt` can set it to a
hierarchical Karhunen-Loeve transform of natural images, and g_s to its transpose: training starts from a
working transform codec instead of from noise.
"""

import math

import torch
from compressai.models import MeanScaleHyperprior
from torch import Tensor, nn

PATCH = 4  # the first convolution's stride; two more of stride 2 follow, as in CompressAI's 16x ladders


class Residual(nn.Module):
    """x + W3 act(W2 act(W1 x)): 1x1, 3x3, 1x1 convolutions through a half-width bottleneck, W3 = 0 at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(channels, half, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, channels, 1),
        )
        last = self.branch[-1]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, channels, h, w) -> the same shape."""
        out: Tensor = x + self.branch(x)
        return out


def _blocks(channels: int, count: int) -> list[nn.Module]:
    return [Residual(channels) for _ in range(count)]


class LiteHyperprior(MeanScaleHyperprior):
    """Mean-scale hyperprior with CompressAI's protocol and a cheaper g_a and g_s.

    Args:
        N: channels of the hyper-latents z.
        M: channels of the latents y, at 1/16 of the image's side.
        width: channels at 1/4 and 1/8 of the image's side.
        depth: residual blocks at each of the two scales.
    """

    def __init__(self, N: int = 64, M: int = 192, width: tuple[int, int] = (64, 96), depth: int = 3) -> None:
        super().__init__(N=N, M=M)
        wide, mid = width
        self.g_a = nn.Sequential(
            nn.Conv2d(3, wide, 2 * PATCH, stride=PATCH, padding=PATCH // 2),
            *_blocks(wide, depth),
            nn.Conv2d(wide, mid, 4, stride=2, padding=1),
            *_blocks(mid, depth),
            nn.Conv2d(mid, M, 2, stride=2),
        )
        self.g_s = nn.Sequential(
            nn.ConvTranspose2d(M, mid, 2, stride=2),
            *_blocks(mid, depth),
            nn.ConvTranspose2d(mid, wide, 4, stride=2, padding=1),
            *_blocks(wide, depth),
            nn.ConvTranspose2d(wide, 3, 2 * PATCH, stride=PATCH, padding=PATCH // 2),
        )
        self.h_a = nn.Sequential(
            nn.Conv2d(M, N, 3, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(N, N, 5, stride=2, padding=2),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(N, N, 5, stride=2, padding=2),
        )
        self.h_s = nn.Sequential(
            nn.ConvTranspose2d(N, N, 4, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.ConvTranspose2d(N, mid, 4, stride=2, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(mid, mid, 3, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.Conv2d(mid, 2 * M, 1),
        )


def _principal_axes(samples: Tensor, keep: int) -> Tensor:
    """The `keep` leading eigenvectors, (keep, d), of the uncentred covariance of (n, d) samples."""
    covariance = samples.T @ samples / samples.shape[0]
    vectors = torch.linalg.eigh(covariance).eigenvectors
    axes: Tensor = vectors.flip(1)[:, :keep].T.contiguous()
    return axes


def _set_taps(down: nn.Conv2d, up: nn.ConvTranspose2d, axes: Tensor, gain: float = 1.0) -> None:
    """Put the axes (k, c*p*p) into the central p x p taps of a strided convolution, their transpose into its mirror.

    Channels beyond the k axes keep their random weights on both sides: zeros there would never get a gradient.
    """
    stride = down.stride[0]
    margin = (down.kernel_size[0] - stride) // 2
    taps = axes.reshape(axes.shape[0], down.in_channels, stride, stride)
    centre = slice(margin, margin + stride)
    for conv, weight in ((down, taps * gain), (up, taps / gain)):
        assert conv.bias is not None
        conv.weight[: taps.shape[0]] = 0.0
        conv.bias.zero_()
        conv.weight[: taps.shape[0], :, centre, centre] = weight


@torch.no_grad()
def initialise_klt(net: LiteHyperprior, images: Tensor, lmbda: float) -> None:
    """Set g_a to a three-level Karhunen-Loeve transform of `images`, g_s to its transpose, h_s to its deviations.

    The gain makes a unit quantiser step optimal at high rate: minimising R + lambda 255^2 Delta^2 / 12 over the
    step Delta of an orthonormal transform gives Delta^2 = 6 / (ln 2 lambda 255^2).

    Shape: images (b, 3, h, w) in [0, 1], sides divisible by 16.
    """
    step = math.sqrt(6 / (math.log(2) * lmbda * 255**2))
    downs = [m for m in net.g_a if isinstance(m, nn.Conv2d)]
    ups = [m for m in net.g_s if isinstance(m, nn.ConvTranspose2d)][::-1]
    features = images - 0.5
    for level, (down, up) in enumerate(zip(downs, ups, strict=True)):
        stride = down.stride[0]
        patches = nn.functional.unfold(features, stride, stride=stride)  # (b, c*p*p, n)
        samples = patches.transpose(1, 2).reshape(-1, patches.shape[1]).double()
        axes = _principal_axes(samples, min(down.out_channels, samples.shape[1])).float()
        last = level == len(downs) - 1
        _set_taps(down, up, axes, gain=1 / step if last else 1.0)
        side = (features.shape[2] // stride, features.shape[3] // stride)
        features = (axes @ patches).reshape(images.shape[0], axes.shape[0], *side)
        if not last:  # the spare channels count as zero: what they carry is learnt
            spare = down.out_channels - axes.shape[0]
            features = nn.functional.pad(features, (0, 0, 0, 0, 0, spare))
    first, mirror = downs[0], ups[0]
    assert first.bias is not None
    assert mirror.bias is not None
    first.bias -= 0.5 * first.weight.sum(dim=(1, 2, 3))  # the transform sees x - 0.5
    mirror.bias += 0.5
    head = net.h_s[-1]
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    deviations = features.std(dim=(0, 2, 3)) / step
    head.weight *= 0.1
    head.bias.zero_()
    head.bias[: deviations.numel()] = deviations.clamp(0.15, 200.0)
