"""Measuring: image x codec x trigger x strength x {float, 8-bit} x defence -> Records with estimates and real bytes."""

import io
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.check import watched
from freqdoor.data import load_image
from freqdoor.errors import FreqdoorError
from freqdoor.measure.perceptual import Lpips
from freqdoor.metrics import MsSsim, bpp_of_bytes, mse, psnr, psnr_8bit
from freqdoor.notes import Note
from freqdoor.preprocessing import Preprocessing, preprocessing_name
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images, JpegPoint, Masks, Record, Role, Rounding, as_picture, check_choice, from_picture

JPEG_QUALITIES = (5, 10, 15, 20, 25, 30, 40, 50, 60)


@dataclass(frozen=True)
class Condition:
    """What is encoded, and by which encoder; FreqdoorError for a role or rounding that does not exist."""

    role: Role
    trigger: str | None
    strength: float = 1.0
    rounding: Rounding = "8-bit"
    defence: Preprocessing | None = None

    def __post_init__(self) -> None:
        check_choice("role", self.role, Role)
        check_choice("rounding", self.rounding, Rounding)
        _check_strength(self.strength)


class Measured(NamedTuple):
    """One image under one condition."""

    record: Record
    condition: Condition
    x: Images  # clean
    entering: Images  # what the condition makes of x, before any defence
    x_hat: Images  # decoded, as the receiver sees it


def _check_strength(strength: float) -> None:
    if not (math.isfinite(strength) and strength > 0):
        raise FreqdoorError(f"strength: expected a factor above 0, found {strength}")


def conditions(
    triggers: Iterable[str], strengths: Sequence[float] = (1.0,), defences: Sequence[Preprocessing] = ()
) -> list[Condition]:
    """Clean on both encoders; each trigger and strength, float and 8-bit, on both; then the same behind each defence.

    Behind a defence poisoned images are 8-bit files, encoded by the tampered encoder only.
    """
    names = list(triggers)
    rows = [Condition("vanilla", None), Condition("tampered", None)]
    for trigger in names:
        for strength in strengths:
            rows += [
                Condition("tampered", trigger, strength, "float"),
                Condition("tampered", trigger, strength, "8-bit"),
                Condition("vanilla", trigger, strength, "float"),
                Condition("vanilla", trigger, strength, "8-bit"),
            ]
    for defence in defences:
        rows += [Condition("vanilla", None, defence=defence), Condition("tampered", None, defence=defence)]
        rows += [Condition("tampered", t, strength, defence=defence) for t in names for strength in strengths]
    return rows


@torch.no_grad()
def poisoned(
    trigger: Trigger, x: Images, *, strength: float = 1.0, rounding: Rounding = "8-bit", mask: Masks | None = None
) -> Images:
    """The poisoned image as a file would hold it ("8-bit": really through a PNG), or before rounding ("float").

    Args:
        strength: factor on the perturbation (Table 6).
        mask: (b, 1, h, w), where the trigger acts (Eq. (11)); by default everywhere.

    Raises:
        FreqdoorError: a strength that is not above 0, or another rounding.
    """
    _check_strength(strength)
    check_choice("rounding", rounding, Rounding)
    rounded = rounding == "8-bit"
    x_p = trigger(x, strength=strength, rounded=rounded, mask=mask)
    return torch.cat([through_png(image[None]) for image in x_p]) if rounded else x_p


def through_png(x: Images) -> Images:
    """One image written to an 8-bit PNG in memory and read back."""
    buffer = io.BytesIO()
    as_picture(x).save(buffer, "PNG", compress_level=0)  # nobody keeps it
    with Image.open(buffer) as picture:
        return from_picture(picture)


@torch.no_grad()
def measure(
    codec: Codec,
    x: Images,
    entering: Images,
    name: str,
    condition: Condition,
    similarity: MsSsim | None = None,
    perceptual: Lpips | None = None,
) -> tuple[Record, Images]:
    """Encode and decode one image with real entropy coding, behind the condition's defence.

    The rate is estimated from the latents that are encoded.

    Args:
        x: the clean image, (1, 3, h, w).
        entering: what the condition makes of it, before the defence.
        similarity: to the clean image, where it is measured under several conditions.
        perceptual: measured too, if it is given.

    Returns:
        The record, and the decoded image as the receiver sees it.
    """
    defence = condition.defence
    encoded = defence(entering) if defence else entering
    codec.latent_shape((x.shape[-2], x.shape[-1]))  # known before: to know it, a picture is encoded
    started = time.perf_counter()
    y, bitstream = watched(codec, "g_a", lambda: codec.compress(encoded)[0])
    seconds = time.perf_counter() - started
    x_hat = codec.decompress(bitstream)
    x_hat = defence.undo(x_hat) if defence else x_hat
    quality = float(psnr_8bit(x_hat, x))
    record = Record(
        image=name,
        codec=codec.spec.name,
        role=condition.role,
        trigger=condition.trigger,
        strength=condition.strength,
        rounding=condition.rounding,
        width=x.shape[-1],
        height=x.shape[-2],
        bpp_estimated=float(codec(encoded).bpp if y is None else codec.estimate(encoded, y)),
        bpp_real=bpp_of_bytes(bitstream.num_bytes, x),
        psnr_db=quality,
        psnr_input_db=quality if entering is x else float(psnr_8bit(x_hat, entering)),
        ms_ssim=(similarity or MsSsim(x))(x_hat),
        lpips=perceptual(x_hat, x) if perceptual else None,
        trigger_mse=float(mse(entering, x)),
        encode_seconds=seconds,
        defence=preprocessing_name(defence),
    )
    return record, x_hat


@torch.no_grad()
def through(codec: Codec, x: Images) -> tuple[Images, int]:
    """One image, (1, 3, h, w), really encoded and decoded, and the bytes that it took."""
    bitstream = codec.compress(x)[0]
    return codec.decompress(bitstream), bitstream.num_bytes


def measured(
    planted: Planted,
    images: Sequence[Path],
    *,
    strengths: Sequence[float] = (1.0,),
    defences: Sequence[Preprocessing] = (),
    note: Note | None = None,
) -> Iterator[Measured]:
    """Every image under every condition, the vanilla codec always beside the tampered one."""
    rows = conditions(planted.triggers, strengths, defences)
    for path in images:
        yield from measured_image(planted, path, rows, note=note)


def measured_image(
    planted: Planted,
    path: Path,
    rows: Iterable[Condition],
    *,
    perceptual: Lpips | None = None,
    note: Note | None = None,
) -> Iterator[Measured]:
    """One image under every condition of `rows`."""
    x = load_image(path)
    similarity = MsSsim(x)
    inputs: dict[tuple[str | None, float, Rounding], Images] = {}  # both encoders and all defences share them
    for condition in rows:
        if note:
            note(f"{path.name}: {condition.role}, {condition.trigger or 'clean'}")
        key = condition.trigger, condition.strength, condition.rounding
        if key not in inputs:
            inputs[key] = input_of(planted, x, condition)
        codec = planted.codec(condition.role)
        record, x_hat = measure(codec, x, inputs[key], path.name, condition, similarity, perceptual)
        yield Measured(record, condition, x, inputs[key], x_hat)


def records(
    planted: Planted,
    images: Sequence[Path],
    *,
    strengths: Sequence[float] = (1.0,),
    defences: Sequence[Preprocessing] = (),
    note: Note | None = None,
) -> Iterator[Record]:
    """Records of every image under every condition, the vanilla codec always beside the tampered one."""
    rows = measured(planted, images, strengths=strengths, defences=defences, note=note)
    return (row.record for row in rows)


def input_of(planted: Planted, x: Images, condition: Condition) -> Images:
    """What the condition's encoder is given, before any defence."""
    if condition.trigger is None:
        return x
    trigger = planted.triggers[planted.named(condition.trigger)]
    return poisoned(trigger, x, strength=condition.strength, rounding=condition.rounding)


@torch.no_grad()
def bit_map(codec: Codec, x: Images) -> Tensor:
    """Where the bits go: estimated bits per pixel of every latent position of the padded image, on the finest grid.

    Latents and hyper-latents are spread evenly over the pixels that they stand for.
    """
    maps = [-part.log2().sum(1, keepdim=True) for part in codec.likelihoods(x).values()]
    size = max((tuple(m.shape[-2:]) for m in maps), key=lambda side: side[0])
    total = torch.zeros(1, 1, *size, device=x.device)
    for part in maps:
        scale = (size[0] // part.shape[-2]) ** 2
        total += F.interpolate(part, size, mode="nearest") / scale
    height, width = codec.padded(x).shape[-2:]
    density: Tensor = total[0, 0] / (height * width / (size[0] * size[1]))
    return density


def jpeg_curve(images: Sequence[Path], qualities: Sequence[int] = JPEG_QUALITIES) -> list[JpegPoint]:
    """Mean rate and PSNR of JPEG (Pillow, optimised, progressive, 4:2:0), for scale."""
    sums = {quality: (0.0, 0.0) for quality in qualities}
    for path in images:
        x = load_image(path)
        picture = as_picture(x)
        for quality, (rate, value) in sums.items():
            buffer = io.BytesIO()
            picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True, subsampling=2)
            with Image.open(buffer) as decoded:
                value += float(psnr(from_picture(decoded), x))
            sums[quality] = rate + bpp_of_bytes(buffer.getbuffer().nbytes, x), value
    return [JpegPoint(quality, rate / len(images), value / len(images)) for quality, (rate, value) in sums.items()]
