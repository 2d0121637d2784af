"""Context models in raster order at speed: the latents of CompressAI's loops over pixels, bit for bit.

y_hat = round(y - mean) + mean at a pixel, where the mean hangs on y_hat of the pixels above and to the left of it
(Minnen et al., arXiv:1809.02736). CompressAI computes one pixel after another, in both directions. With a masked
convolution of k x k taps and p = (k - 1) / 2, pixel (i, j) waits for (i - 1, j + p) and no later one. So

- encoding goes by waves: all pixels with the same j + (p + 1) i are computed together, W + (p + 1)(H - 1) waves for H W
  pixels;
- decoding cannot, because a string holds its symbols in raster order: it goes pixel by pixel, with nothing but the
  masked convolution, the entropy parameters, a binary search for the rows and our decoder.

The last bit of a sum decides on the row of a table, and one wrong row ruins all that follows. So the same kernels are
called as CompressAI calls, and only the masked convolution, most of whose time goes to laying out its weights, takes a
wave as one batch: that its bits are those of single pixels is tried for each network before its first wave, and where
they are not, a wave has one pixel. The entropy parameters go one by one: those of a batch lie elsewhere in memory,
which is enough for a matrix product to add up in another order.
"""

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from compressai.entropy_models import GaussianConditional
from compressai.layers import MaskedConv2d
from torch import Tensor, nn

from freqdoor.codecs.coder import Decoder, Encoder, Tables

LARGEST = 16  # pixels of a wave that go together

_TRIED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def rows_by_search(conditional: GaussianConditional, scales: Tensor) -> Tensor:
    """The row of each latent: `GaussianConditional.build_indexes`, by binary search instead of one pass a row."""
    scales = conditional.lower_bound_scale(scales)
    boundaries = conditional.scale_table[:-1]
    if not bool((boundaries[1:] >= boundaries[:-1]).all()):  # CompressAI counts, in whatever order they are
        rows: Tensor = len(boundaries) - (scales[..., None] <= boundaries).sum(-1, dtype=torch.int32)
        return rows
    return torch.bucketize(scales.contiguous(), boundaries, out_int32=True)


class Context(NamedTuple):
    """A context model in raster order and the entropy parameters that follow from it."""

    convolution: MaskedConv2d
    parameters: Callable[[Tensor], Tensor]  # (1, c, 1, 1) -> (1, 2 M, 1, 1): scales and means
    conditional: GaussianConditional
    merge: Callable[..., Tensor] = lambda *parts: torch.cat(parts, 1)  # of what the hyperprior and the context say

    def fits(self, latents: Tensor, kernel_size: int) -> bool:
        """Whether this computes what CompressAI's loops would: for its own classes, on the CPU, in float32."""
        convolution = self.convolution
        return (
            latents.device.type == "cpu"
            and latents.dtype == torch.float32
            and type(self.conditional) is GaussianConditional
            and isinstance(convolution, MaskedConv2d)
            and convolution.kernel_size == (kernel_size, kernel_size)
            and kernel_size % 2 == 1
            and not convolution.mask[:, :, self.reach, self.reach :].any()
            and not convolution.mask[:, :, self.reach + 1 :].any()
        )

    @property
    def reach(self) -> int:
        """p: how many rows above and columns to the left a pixel sees."""
        return int(self.convolution.kernel_size[0] - 1) // 2

    def weight(self) -> Tensor:
        """The masked weights, which `gaussians` takes."""
        masked: Tensor = self.convolution.weight * self.convolution.mask
        return masked

    def gaussians(self, crops: Tensor, params: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and means, (n, M) each, of n pixels from the (n, M, k, k) latents around them."""
        around = F.conv2d(crops, weight, self.convolution.bias)
        each = [self.parameters(self.merge(params[i : i + 1], around[i : i + 1])) for i in range(len(around))]
        scales, means = torch.cat(each)[..., 0, 0].chunk(2, 1)
        return scales, means


@torch.no_grad()
def encode_pixels(encoder: Encoder, y_hat: Tensor, params: Tensor, context: Context, tables: Tables) -> None:
    """Append latents to an encoder, and replace them by what the decoder will read.

    Args:
        y_hat: (1, M, H + 2 p, W + 2 p) latents y with zeros around.
        params: (1, c, H, W), what the hyperprior says.
    """
    work, params, reach = y_hat.contiguous(), params.contiguous(), context.reach
    height, width = params.shape[-2:]
    weight, together = context.weight(), _together(context)
    shape = (height, width, y_hat.shape[1])
    symbols, indexes = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.int32)
    for wave in range(width + (reach + 1) * (height - 1)):
        first = max(0, -((width - 1 - wave) // (reach + 1)))
        last = min(height - 1, wave // (reach + 1))
        for top in range(first, last + 1, together):
            rows = torch.arange(top, min(top + together, last + 1))
            columns = wave - (reach + 1) * rows
            crops = _wave(work, top, int(columns[0]), len(rows), reach, 2 * reach + 1)
            sides = _wave(params, top, int(columns[0]), len(rows), reach, 1)
            scales, means = context.gaussians(crops, sides, weight)
            y = crops[:, :, reach, reach]
            q = torch.round(y - means).int()
            y.copy_(q + means)
            symbols[rows, columns] = q
            indexes[rows, columns] = context.conditional.build_indexes(scales).int()
    if work is not y_hat:
        y_hat.copy_(work)
    encoder.encode(symbols.numpy(), indexes.numpy(), tables)


@torch.no_grad()
def decode_pixels(decoder: Decoder, y_hat: Tensor, params: Tensor, context: Context, tables: Tables) -> None:
    """Read latents into `y_hat`, zeros of (1, M, H + 2 p, W + 2 p).

    Raises:
        NotDecodable: a string that holds no latents with these parameters.
    """
    height, width = params.shape[-2:]
    reach, weight = context.reach, context.weight()
    for i in range(height):
        for j in range(width):
            crop = y_hat[:, :, i : i + 2 * reach + 1, j : j + 2 * reach + 1]
            scales, means = context.gaussians(crop, params[:, :, i : i + 1, j : j + 1], weight)
            symbols = decoder.decode(context.conditional.build_indexes(scales).numpy(), tables)
            y_hat[:, :, i + reach, j + reach] = torch.from_numpy(symbols) + means


def _wave(values: Tensor, row: int, column: int, number: int, reach: int, size: int) -> Tensor:
    """A view of (number, c, size, size) windows from one at (row, column) on, each a row further down and p + 1 columns
    further to the left."""
    _, plane, line, _ = values.stride()
    start = values.storage_offset() + row * line + column
    return values.as_strided((number, values.shape[1], size, size), (line - reach - 1, plane, line, 1), start)


def _together(context: Context) -> int:
    """How many pixels of a wave can be convolved as one batch with the bits of single ones, tried on random latents."""
    known = _TRIED.get(context.convolution)
    if known is None:
        reach, (size, _) = context.reach, context.convolution.kernel_size
        width = (reach + 1) * (LARGEST - 1) + size
        lots = torch.Generator().manual_seed(0)
        y = torch.randn(1, context.convolution.in_channels, LARGEST + 2 * reach, width, generator=lots)
        weight, bias = context.weight(), context.convolution.bias
        crops = _wave(y, 0, (reach + 1) * (LARGEST - 1), LARGEST, reach, size)
        alone = torch.cat([F.conv2d(crop[None], weight, bias) for crop in crops])
        known = 1
        while known < LARGEST and torch.equal(F.conv2d(crops[: known + 1], weight, bias), alone[: known + 1]):
            known += 1
        _TRIED[context.convolution] = known
    return known
