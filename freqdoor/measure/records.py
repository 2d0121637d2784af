"""Measuring: image x codec x trigger x strength x {float, 8-bit} x defence -> Records with estimates and real bytes."""

import io
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compressai.ops import compute_padding
from PIL import Image
from torch import Tensor

from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import STRIDE, Codec
from freqdoor.data import list_images, load_image, save_image
from freqdoor.errors import FreqdoorError
from freqdoor.files import refuse_overwriting, write_text
from freqdoor.metrics import ms_ssim, mse, psnr, psnr_8bit
from freqdoor.preprocessing import Preprocessing, preprocessing_name
from freqdoor.triggers import Trigger
from freqdoor.types import Images, JpegPoint, Masks, Record, from_uint8, to_uint8

JPEG_QUALITIES = (5, 10, 15, 20, 25, 30, 40, 50, 60)
Note = Callable[[str], None]


def image_paths(images: Path | str | Sequence[Path]) -> list[Path]:
    """The images of a folder or file, as `list_images`, or those that are given one by one."""
    return list_images(images) if isinstance(images, Path | str) else list(images)


@dataclass(frozen=True)
class Condition:
    """What is encoded, and by which encoder."""

    role: str  # "vanilla" or "tampered"
    trigger: str | None
    strength: float = 1.0
    rounding: str = "8-bit"
    defence: Preprocessing | None = None


def conditions(
    triggers: Iterable[str], strengths: Sequence[float] = (1.0,), defences: Sequence[Preprocessing] = ()
) -> list[Condition]:
    """Clean on both encoders; each trigger and strength, float and 8-bit, on both; then the same behind each defence.

    Behind a defence poisoned images are 8-bit files, encoded by the tampered encoder only.
    """
    found = [Condition("vanilla", None), Condition("tampered", None)]
    for trigger in triggers:
        for strength in strengths:
            found += [
                Condition("tampered", trigger, strength, "float"),
                Condition("tampered", trigger, strength, "8-bit"),
                Condition("vanilla", trigger, strength, "float"),
                Condition("vanilla", trigger, strength, "8-bit"),
            ]
    for defence in defences:
        found += [Condition(role, None, defence=defence) for role in ("vanilla", "tampered")]
        found += [Condition("tampered", t, strength, defence=defence) for t in triggers for strength in strengths]
    return found


@torch.no_grad()
def poison(
    trigger: Trigger, x: Images, *, strength: float = 1.0, rounding: str = "8-bit", mask: Masks | None = None
) -> Images:
    """The poisoned image as a file would hold it ("8-bit": really through a PNG), or before rounding ("float")."""
    if not (math.isfinite(strength) and strength > 0):
        raise FreqdoorError(f"strength: expected a factor above 0, found {strength}")
    rounded = rounding == "8-bit"
    x_p = trigger(x, strength=strength, rounded=rounded, mask=mask)
    return torch.cat([through_png(image[None]) for image in x_p]) if rounded else x_p


poisoned = poison


def through_png(x: Images) -> Images:
    """One image written to an 8-bit PNG in memory and read back."""
    buffer = io.BytesIO()
    Image.fromarray(to_uint8(x[0]).permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
    with Image.open(buffer) as image:
        return from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]


@torch.no_grad()
def measure(codec: Codec, x: Images, given: Images, name: str, condition: Condition) -> tuple[Record, Images]:
    """Encode and decode one image with real entropy coding, behind the condition's defence.

    Args:
        x: the clean image, (1, 3, h, w).
        given: what the condition makes of it, before the defence.

    Returns:
        The record, and the decoded image as the receiver sees it.
    """
    defence = condition.defence
    encoded = defence(given) if defence else given
    started = time.perf_counter()
    bitstream = codec.compress(encoded)[0]
    seconds = time.perf_counter() - started
    x_hat = codec.decompress(bitstream)
    x_hat = defence.undo(x_hat) if defence else x_hat
    height, width = x.shape[-2:]
    record = Record(
        image=name,
        codec=codec.spec.name,
        role=condition.role,
        trigger=condition.trigger,
        strength=condition.strength,
        rounding=condition.rounding,
        width=width,
        height=height,
        bpp_estimated=float(codec(encoded).bpp),
        bpp_real=8 * bitstream.num_bytes / (width * height),
        psnr_db=float(psnr_8bit(x_hat, x)),
        psnr_input_db=float(psnr_8bit(x_hat, given)),
        ms_ssim=ms_ssim(x_hat, x),
        trigger_mse=float(mse(given, x)),
        encode_seconds=seconds,
        defence=preprocessing_name(defence),
    )
    return record, x_hat


@torch.no_grad()
def through(codec: Codec, x: Images) -> tuple[Images, int]:
    """One image, (1, 3, h, w), really encoded and decoded, and the bytes that it took."""
    bitstream = codec.compress(x)[0]
    return codec.decompress(bitstream), bitstream.num_bytes


def evaluate(
    planted: Planted,
    images: Sequence[Path],
    *,
    strengths: Sequence[float] = (1.0,),
    defences: Sequence[Preprocessing] = (),
    note: Note | None = None,
) -> Iterator[Record]:
    """Records of every image under every condition, the vanilla codec always beside the tampered one."""
    for path in images:
        x = load_image(path)
        for condition in conditions(planted.triggers, strengths, defences):
            if note:
                note(f"{path.name}: {condition.role}, {condition.trigger or 'clean'}")
            yield measure(_encoder(planted, condition), x, encoded(planted, x, condition), path.name, condition)[0]


def _encoder(planted: Planted, condition: Condition) -> Codec:
    return planted.tampered if condition.role == "tampered" else planted.vanilla


def encoded(planted: Planted, x: Images, condition: Condition) -> Images:
    """What the condition's encoder is given, before any defence."""
    if condition.trigger is None:
        return x
    trigger = planted.triggers[condition.trigger]
    return poison(trigger, x, strength=condition.strength, rounding=condition.rounding)


input_of = encoded


def poison_files(
    trigger: Trigger, images: Sequence[Path], out: Path, *, strength: float = 1.0, note: Note | None = None
) -> list[Path]:
    """Write every image poisoned, as an 8-bit PNG of the same name, into the folder `out`."""
    stems = [path.stem for path in images]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise FreqdoorError(f"several images are named {', '.join(twice[:3])}; poison their folders one at a time")
    written = []
    for path in images:
        target = out / f"{path.stem}.png"
        refuse_overwriting(path, target)
        save_image(target, poison(trigger, load_image(path), strength=strength))
        written.append(target)
        if note:
            note(str(target))
    return written


@torch.no_grad()
def bit_map(codec: Codec, x: Images) -> Tensor:
    """Where the bits go: estimated bits per pixel of every latent position, (h / 16, w / 16) of the padded image.

    Latents and hyper-latents are spread evenly over the pixels that they stand for.
    """
    codec.eval()
    pad, _ = compute_padding(x.shape[-2], x.shape[-1], min_div=STRIDE)
    likelihoods = codec.net(F.pad(x, pad))["likelihoods"].values()
    maps = [-part.log2().sum(1, keepdim=True) for part in likelihoods]
    size = max((tuple(m.shape[-2:]) for m in maps), key=lambda side: side[0])
    total = torch.zeros(1, 1, *size)
    for part in maps:
        scale = (size[0] // part.shape[-2]) ** 2
        total += F.interpolate(part, size, mode="nearest") / scale
    pixels = (x.shape[-2] + pad[2] + pad[3]) * (x.shape[-1] + pad[0] + pad[1]) / (size[0] * size[1])
    density: Tensor = total[0, 0] / pixels
    return density


def jpeg_curve(images: Sequence[Path], qualities: Sequence[int] = JPEG_QUALITIES) -> list[JpegPoint]:
    """Mean rate and PSNR of JPEG (Pillow, optimised, progressive, 4:2:0), for scale."""
    points = []
    for quality in qualities:
        rates, values = [], []
        for path in images:
            x = load_image(path)
            buffer = io.BytesIO()
            picture = Image.fromarray(to_uint8(x[0]).permute(1, 2, 0).numpy())
            picture.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True, subsampling=2)
            with Image.open(buffer) as image:
                decoded = from_uint8(torch.from_numpy(np.array(image)).permute(2, 0, 1))[None]
            rates.append(8 * buffer.getbuffer().nbytes / (x.shape[-1] * x.shape[-2]))
            values.append(float(psnr(decoded, x)))
        points.append(JpegPoint(quality, sum(rates) / len(rates), sum(values) / len(values)))
    return points


def write_records(path: Path, records: Iterable[Record]) -> None:
    """One JSON object a line."""
    write_text(path, "".join(json.dumps(record.to_dict()) + "\n" for record in records))
