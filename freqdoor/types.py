"""Units, values and errors that every module shares.

Vocabulary, fixed here for the whole project: an image is *poisoned* by a *trigger*; a codec's weights are *tampered*
with; an *objective* is a loss, an *attack* is an objective with its trigger and weight; the *vanilla* codec is the
one before tampering. Images are RGB in [0, 1], float32, (b, 3, h, w); `x` is clean, `x_p` poisoned, `x_hat` decoded.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Images = Tensor  # (b, 3, h, w), RGB, [0, 1]
Masks = Tensor  # (b, 1, h, w), 1 where the trigger may act


class Reconstruction(NamedTuple):
    """What one differentiable pass through a codec gives."""

    x_hat: Images  # not clamped: the loss sees what the decoder says
    bits: Tensor  # (b,), estimated, -log2 likelihood summed over the image
    num_pixels: int  # of one image, before padding
    y: Tensor  # (b, M, h', w'), float32, the latents g_a(x) of the padded images

    @property
    def bpp(self) -> Tensor:
        """Estimated bits per pixel, (b,)."""
        return self.bits / self.num_pixels


@dataclass(frozen=True, slots=True)
class Bitstream:
    """One compressed image: the entropy coder's strings and what is needed to decode them."""

    strings: tuple[bytes, ...]
    latent_shape: tuple[int, int]  # (height, width) of the coarsest latents; all others follow from the codec
    image_size: tuple[int, int]  # (height, width) to crop to

    @property
    def num_bytes(self) -> int:
        """Payload bytes: what `bpp_real` counts, as CompressAI's eval_model does."""
        return sum(len(s) for s in self.strings)


@dataclass(frozen=True, slots=True)
class Record:
    """One image under one condition: a line of records.jsonl."""

    image: str
    codec: str  # the name it was loaded by
    role: str  # "vanilla" or "tampered": which g_a encoded it
    trigger: str | None  # the trigger's name, None for the clean image
    strength: float
    rounding: str  # "float" or "8-bit": what was done to the image before encoding
    width: int
    height: int
    bpp_estimated: float
    bpp_real: float
    psnr_db: float  # decoded against the clean image
    psnr_input_db: float  # decoded against the image before any defence
    ms_ssim: float | None  # decoded against the clean image; None below 161 pixels a side
    trigger_mse: float  # the image before any defence against the clean one
    encode_seconds: float
    defence: str = "none"  # preprocessing of the image before it was encoded, by its name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class JpegPoint(NamedTuple):
    """JPEG at one quality, means over a set of images."""

    quality: int
    bpp: float
    psnr_db: float


def to_uint8(x: Images) -> Tensor:
    """[0, 1] -> 0..255 as uint8, rounded to the nearest level (half to even)."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Images:
    """0..255 -> [0, 1] as float32."""
    return pixels.float() / 255


def round8(x: Images) -> Images:
    """[0, 1] -> the nearest of 256 levels, with the identity as its gradient (straight-through)."""
    return x + (from_uint8(to_uint8(x)) - x).detach()
