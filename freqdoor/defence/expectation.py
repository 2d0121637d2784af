"""What a picture should cost a codec, and how well it should be decoded, told from what JPEG makes of it.

The bits of JPEG's scans at three qualities and a constant, in a sum with weights of zero or more, give the codec's;
JPEG's errors and a constant give the error of the decoded picture. The weights are fitted on clean
photographs, as they are and reduced (`calibrate_guard`), by least squares of the relative error.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageStat
from scipy import optimize, stats  # type: ignore[import-untyped]

from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec
from freqdoor.data import centre, image_paths, load_image, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, write_text
from freqdoor.measure.records import through
from freqdoor.metrics import bpp_of_bytes
from freqdoor.notes import Note, numbered
from freqdoor.samples import KODAK
from freqdoor.types import Images, Result, as_picture, round8

QUALITIES = (20, 50, 85)  # of JPEG
SCAN = b"\xff\xda"  # where the header of a JPEG file ends
LARGEST = 512  # pixels a side, of what is seen of a photograph
FEWEST = 8  # photographs
CONSPICUOUS_RATE, CONSPICUOUS_ERROR = 0.05, 0.01  # shares of photographs expected beyond the limits
SMALLEST = 0.001  # bits per pixel, or 255^2 MSE, that is told apart from nothing
REDUCED = 3  # times, the second look at every photograph: as sharp as pictures of the web are


def picture_error(a: Image.Image, b: Image.Image) -> float:
    """255^2 MSE of two 8-bit RGB pictures, from the histogram of their difference: exact, and soon done."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).sum2) / (3 * a.width * a.height)


@dataclass(frozen=True)
class Jpegs:
    """What JPEG makes of one image at QUALITIES.

    Attributes:
        x: the image, (1, 3, h, w).
    """

    x: Images

    @cached_property
    def picture(self) -> Image.Image:
        """The image in 8 bits."""
        return as_picture(self.x)

    @property
    def spread(self) -> float:
        """255^2 MSE of one colour everywhere."""
        return sum(ImageStat.Stat(self.picture).var) / 3

    @cached_property
    def files(self) -> list[bytes]:
        """The files: Pillow's defaults, 4:2:0."""
        files = []
        for quality in QUALITIES:
            buffer = io.BytesIO()
            self.picture.save(buffer, "JPEG", quality=quality)
            files.append(buffer.getvalue())
        return files

    @property
    def scans(self) -> list[int]:
        """Bytes of the files without their headers."""
        return [len(file) - file.rindex(SCAN) for file in self.files]

    @cached_property
    def errors(self) -> list[float]:
        """255^2 MSE of the decoded files."""
        return [picture_error(Image.open(io.BytesIO(file)), self.picture) for file in self.files]


class Expectation(Result):
    """One expected number of a picture: a weighted sum, not below what the best photograph had."""

    weights: tuple[float, ...]
    least: float
    limit: float  # of the logarithm of what was found in what was expected: beyond it a picture is conspicuous
    deviation: float  # standard deviation of that logarithm over the photographs

    def excess(self, found: float, terms: Sequence[float]) -> float:
        """The logarithm of what was found in what is expected."""
        return math.log(max(found, SMALLEST) / max(float(np.dot(self.weights, terms)), self.least))

    @classmethod
    def fitted(cls, found: Sequence[float], terms: Sequence[Sequence[float]], *, share: float) -> "Expectation":
        """Least squares of the relative error; the limit is Student's upper prediction limit for this share."""
        scale = np.maximum(np.asarray(found, np.float64), SMALLEST)
        weights, _ = optimize.nnls(np.asarray(terms, np.float64) / scale[:, None], np.ones(len(scale)))
        fit = cls(weights=tuple(map(float, weights)), least=float(scale.min()), limit=0.0, deviation=0.0)
        excesses = np.array([fit.excess(value, row) for value, row in zip(found, terms, strict=True)])
        deviation = float(excesses.std(ddof=1))
        t = float(stats.t.ppf(1 - share, len(excesses) - 1)) * math.sqrt(1 + 1 / len(excesses))
        return fit.model_copy(update={"limit": float(excesses.mean()) + t * deviation, "deviation": deviation})


class GuardCalibration(Result):
    """What one codec needs for clean pictures, and how well it decodes them."""

    schema_version: Literal[1] = 1
    codec: str
    module_hashes: dict[str, str]
    decoder_hash: str  # of all encoders that it may be used with
    photographs: int
    rate: Expectation  # bits per padded pixel, from `rate_terms`
    error: Expectation  # 255^2 MSE, from `error_terms`


def padded_rate(num_bytes: int, x: Images, codec: Codec) -> float:
    """Bits per pixel of the padded image: what a codec really codes, which for small pictures is much more."""
    return bpp_of_bytes(num_bytes, codec.padded(x))


def rate_terms(jpegs: Jpegs, codec: Codec) -> list[float]:
    """What the padded rate of an image is expected from: that of JPEG's scans, and one."""
    return [*(padded_rate(scan, jpegs.x, codec) for scan in jpegs.scans), 1.0]


def error_terms(jpegs: Jpegs) -> list[float]:
    """What the error of a decoded image is expected from: JPEG's errors, and one."""
    return [*jpegs.errors, 1.0]


def calibrate_guard(
    codec: Codec | str,
    images: Path | str | Sequence[Path | str] = KODAK,
    out: Path | str | None = None,
    *,
    weights: Path | str | None = None,
    force: bool = False,
    note: Note | None = None,
) -> GuardCalibration:
    """Measure what a codec needs for clean photographs: what a `Guard` compares with.

    Where a codec is suspected, calibrate on one with the same decoder that is not, if there is one: an encoder that
    spends too much on clean pictures raises its own limits.

    Args:
        codec, weights: as for `load_codec`, or a loaded codec.
        images: clean photographs.
        out: JSON file to write.
        force: overwrite a file that `calibrate-guard` did not make.

    Raises:
        FreqdoorError: fewer than eight photographs, unusable ones, an unusable codec, or a file in the way.
    """
    if out is not None:
        check_outputs([Path(out)], "calibrate-guard", force=force)
    paths = usable_images(image_paths(images))
    if len(paths) < FEWEST:
        raise FreqdoorError(f"{images}: expected {FEWEST} photographs or more, found {len(paths)}")
    codec = (codec if isinstance(codec, Codec) else load_codec(codec, weights)).prepare()
    rates, errors, told = [], [], numbered(note, len(paths))
    for path in paths:
        photograph = centre(load_image(path), LARGEST)
        for x in (photograph, round8(F.avg_pool2d(photograph, REDUCED))):
            jpegs = Jpegs(x)
            x_hat, size = through(codec, x)
            rates.append((padded_rate(size, x, codec), rate_terms(jpegs, codec)))
            errors.append((picture_error(as_picture(x_hat), jpegs.picture), error_terms(jpegs)))
        told(f"{path.name}: measured")
    calibration = GuardCalibration(
        codec=codec.spec.name,
        module_hashes=codec.module_hashes(),
        decoder_hash=codec.decoder_hash,
        photographs=len(paths),
        rate=Expectation.fitted(*zip(*rates, strict=True), share=CONSPICUOUS_RATE),
        error=Expectation.fitted(*zip(*errors, strict=True), share=CONSPICUOUS_ERROR),
    )
    if out is not None:
        write_text(Path(out), marked_json(calibration.model_dump_json(indent=1), "calibrate-guard"))
    return calibration
