"""Units and values that every module shares.

Vocabulary, fixed here for the whole project: an image is *poisoned* by a *trigger*; a codec's weights are *tampered*
with; an *objective* is a loss, an *attack* is an objective with its trigger and weight; the *vanilla* codec is the
one before tampering. Images are RGB in [0, 1], float32, (b, 3, h, w); `x` is clean, `x_p` poisoned, `x_hat` decoded.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from torch import Tensor

from freqdoor.errors import FreqdoorError
from freqdoor.limits import LONGEST_TEXT, read_whole

Images = Tensor  # (b, 3, h, w), RGB, [0, 1]
Masks = Tensor  # (b, 1, h, w), 1 where the trigger may act
Role = Literal["vanilla", "tampered"]  # which g_a encodes
Rounding = Literal["float", "8-bit"]  # what is done to an image before it is encoded
Decibels = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]  # null in JSON: equal


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
    symbols: tuple[tuple[int, int], ...] = ()
    """How many symbols each string holds, and the CRC-32 of them and of the image's size; none where CompressAI's coder
    wrote the strings."""

    @property
    def num_bytes(self) -> int:
        """Payload bytes: what `bpp_real` counts, as CompressAI's eval_model does."""
        return sum(len(s) for s in self.strings)


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A classical codec's file, WebP or PNG, that is sent where a bitstream would do harm."""

    content: bytes
    image_size: tuple[int, int]  # (height, width)

    @property
    def num_bytes(self) -> int:
        """Payload bytes, as a bitstream's."""
        return len(self.content)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Raise FreqdoorError unless `value` is one of a Literal's: types alone stop nobody who does not check them."""
    known = get_args(choices)
    if value not in known:
        raise FreqdoorError(f"{name}: expected {' or '.join(map(repr, known))}, found {value!r}")


def problem_of(error: ValidationError) -> str:
    """The first of a pydantic error's problems in a few words: where it is and what was expected there."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "as a whole"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] == "missing" else f", found {str(first['input'])[:60]}"
    return " ".join(f"{place}: {message}{shown}".split())


class Result(BaseModel):
    """What was measured or is known of a run: frozen and checked; in JSON null stands for what is not finite.

    Files of other versions stay readable: unknown keys are left out, and keys that came later have defaults.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="null")

    @classmethod
    def read(cls, path: Path, expected: str) -> Self:
        """The content of a JSON file; FreqdoorError says that `expected` was expected in it."""
        try:
            return cls.model_validate_json(read_whole(path, expected, LONGEST_TEXT))
        except ValidationError as error:
            raise FreqdoorError(f"{path}: expected {expected} ({problem_of(error)})") from None


class Written(Result):
    """Files that were written, in the order of what they were made of."""

    files: tuple[str, ...]

    @classmethod
    def of(cls, paths: Iterable[Path | str]) -> Self:
        """Those of some paths that are there: on all machines but the first a training writes none."""
        return cls(files=tuple(str(path) for path in paths if os.path.exists(path)))


class Record(Result):
    """One image under one condition: a line of records.jsonl."""

    image: str
    codec: str  # the name it was loaded by
    role: Role
    trigger: str | None  # the trigger's name, None for the clean image
    strength: float
    rounding: Rounding
    width: int
    height: int
    bpp_estimated: float
    bpp_real: float
    psnr_db: Decibels  # decoded against the clean image
    psnr_input_db: Decibels  # decoded against the image before any defence
    ms_ssim: float | None  # decoded against the clean image; None below 161 pixels a side
    lpips: float | None = None  # the same; None where it was not asked for, and below 31 pixels a side
    trigger_mse: float  # the image before any defence against the clean one
    encode_seconds: float
    defence: str = "none"  # preprocessing of the image before it was encoded, by its name

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: None where a number is not finite."""
        content: dict[str, Any] = json.loads(self.model_dump_json())
        return content


class JpegPoint(NamedTuple):
    """JPEG at one quality, means over a set of images."""

    quality: int
    bpp: float
    psnr_db: float


def to_uint8(x: Images) -> Tensor:
    """[0, 1] -> 0..255 as uint8, rounded to the nearest level (half to even)."""
    return x.clamp(0, 1).mul_(255).round_().to(torch.uint8)


def from_uint8(pixels: Tensor) -> Images:
    """0..255 -> [0, 1] as float32."""
    return pixels.to(torch.float32, copy=True).div_(255)


def round8(x: Images) -> Images:
    """[0, 1] -> the nearest of 256 levels, with the identity as its gradient (straight-through)."""
    return x + (from_uint8(to_uint8(x)) - x).detach()


def as_picture(x: Images) -> Image.Image:
    """One image, (1, 3, h, w), as an 8-bit picture of Pillow."""
    planes = to_uint8(x[0]).cpu().numpy()  # merged by Pillow: five times as fast as from a turned array
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def from_picture(picture: Image.Image) -> Images:
    """An 8-bit RGB picture of Pillow as an image, (1, 3, h, w)."""
    return from_uint8(torch.from_numpy(np.array(picture)).permute(2, 0, 1))[None]
