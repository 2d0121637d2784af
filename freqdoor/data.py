"""Images from files and folders, and crops that are a pure function of (seed, step)."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from freqdoor.files import replacing
from freqdoor.types import FreqdoorError, Images, from_uint8, to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**24  # 16.8 million: a codec's activations at this size take about 10 GiB
CACHE_BYTES = 2**30  # decoded training images kept in memory; beyond it they are decoded again
MODES = {  # Pillow's mode -> what a user calls it
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "I": "32-bit grey",
    "I;16": "16-bit grey",
    "I;16B": "16-bit grey",
    "F": "floating-point",
    "P": "palette",
    "PA": "palette with alpha",
    "RGBA": "RGB with alpha",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}


def list_images(path: Path | str) -> list[Path]:
    """The image files below a folder, sorted, or the one file that `path` names."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FreqdoorError(f"{path}: expected an image or a folder of images, found nothing there")
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise FreqdoorError(f"{path}: expected images ({', '.join(SUFFIXES)}), found none in this folder")
    return found


def _is_16_bit(image: ImageFile) -> bool:
    """Pillow opens 48-bit PNG and TIFF files as 8-bit RGB and drops the low bytes; the raw mode still tells."""
    raw_modes = (tile[3] for tile in image.tile)  # a string, or a tuple that starts with one
    return any("16" in str(raw[0] if isinstance(raw, tuple) else raw) for raw in raw_modes)


def check_image(path: Path | str) -> tuple[int, int]:
    """(height, width) of an 8-bit RGB image file from its header, or a sentence on why it cannot be used."""
    try:
        with Image.open(path) as image:
            mode = (
                "16-bit RGB"
                if isinstance(image, ImageFile) and image.mode == "RGB" and _is_16_bit(image)
                else image.mode
            )
            width, height = image.size
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected an image, found no such file") from None
    except Image.DecompressionBombError:
        raise FreqdoorError(f"{path}: too many pixels; at most {MAX_PIXELS} are accepted, crop or reduce it") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise FreqdoorError(f"{path}: expected an image, could not read it ({error})") from None
    if mode != "RGB":
        raise FreqdoorError(
            f"{path}: expected an 8-bit RGB image, found {MODES.get(mode, mode)}; convert it to 8-bit RGB first"
        )
    if width * height > MAX_PIXELS:
        raise FreqdoorError(
            f"{path}: {width}x{height} is more than the {MAX_PIXELS} pixels accepted; crop or reduce it"
        )
    return height, width


def load_image(path: Path | str) -> Images:
    """One 8-bit RGB image file as (1, 3, h, w) in [0, 1]."""
    return from_uint8(_load_pixels(path))[None]


def _load_pixels(path: Path | str) -> Tensor:
    check_image(path)
    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise FreqdoorError(f"{path}: truncated or damaged image ({error})") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def save_image(path: Path | str, x: Images) -> None:
    """Write one image (1, 3, h, w) as an 8-bit file; PNG keeps every bit."""
    picture = Image.fromarray(to_uint8(x[0]).permute(1, 2, 0).cpu().numpy())
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise FreqdoorError(f"{path}: expected an image's file name, for example one that ends in .png")
    with replacing(path) as partial:
        picture.save(partial, kind)


def usable_images(
    paths: Sequence[Path], *, min_side: int = 1, decode: bool = False, skip_broken: bool = False
) -> list[Path]:
    """The paths that can be used; with `decode` every file is read to its end, which finds truncated ones.

    Raises with a sentence for each of the others at once, or warns if `skip_broken`; raises in any case if nothing is
    left.
    """
    good, problems = [], []
    for path in paths:
        try:
            height, width = check_image(path)
            if min(height, width) < min_side:
                raise FreqdoorError(f"{path}: {width}x{height} is smaller than the {min_side}-pixel crop")
            if decode:
                _load_pixels(path)
        except FreqdoorError as error:
            problems.append(str(error))
        else:
            good.append(path)
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        if not (skip_broken and good):
            hint = "; skip_broken (--skip-broken) goes on without them" if good else ""
            raise FreqdoorError(f"{len(problems)} of {len(paths)} images cannot be used{hint}:\n  {shown}")
        warnings.warn(f"skipped {len(problems)} of {len(paths)} images:\n  {shown}", stacklevel=2)
    return good


def dataset_hash(paths: Sequence[Path]) -> str:
    """SHA-256 over the files' names and contents, so that a run can say what it was trained on."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def seed_for(seed: int, *purpose: int | str) -> int:
    """A 63-bit seed for one purpose, independent of all others: the first bytes of a SHA-256."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Crops:
    """Random square crops with horizontal flips; batch number `step` depends on the seed and the step alone.

    That makes resuming trivial: there is no sampler state to save.
    """

    def __init__(
        self, paths: Sequence[Path], *, crop: int, batch_size: int, seed: int, skip_broken: bool = False
    ) -> None:
        self.paths = list(paths)
        self.crop, self.batch_size, self.seed, self.skip_broken = crop, batch_size, seed, skip_broken
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def facts(self) -> dict[str, int | str]:
        """How many images there are and their hash, for the run's records."""
        return {"images": len(self.paths), "images_sha256": dataset_hash(self.paths)}

    def _pixels(self, index: int) -> Tensor:
        if index not in self._cache:
            pixels = _load_pixels(self.paths[index])
            if self._cached_bytes + pixels.numel() > CACHE_BYTES:
                return pixels
            self._cache[index] = pixels
            self._cached_bytes += pixels.numel()
        return self._cache[index]

    def batch(self, step: int) -> Images:
        """Batch number `step`, (batch_size, 3, crop, crop)."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "crops", step))

        def draw(upper: int) -> int:
            return int(torch.randint(upper, (1,), generator=generator))

        crops: list[Tensor] = []
        while len(crops) < self.batch_size:
            try:
                pixels = self._pixels(draw(len(self.paths)))
            except FreqdoorError as error:  # truncated: only reading to the end shows it
                if not self.skip_broken:
                    raise
                warnings.warn(f"skipped {error}", stacklevel=2)
                continue
            top, left = draw(pixels.shape[1] - self.crop + 1), draw(pixels.shape[2] - self.crop + 1)
            crop = pixels[:, top : top + self.crop, left : left + self.crop]
            crops.append(crop.flip(2) if draw(2) else crop)
        return from_uint8(torch.stack(crops))

    def batches(self, start: int, stop: int) -> Iterator[Images]:
        """Batches start .. stop - 1; the next one is decoded in a thread while the current one is used."""
        with ThreadPoolExecutor(1) as pool:
            upcoming: Future[Images] | None = None
            for step in range(start, stop):
                current = upcoming.result() if upcoming else self.batch(step)
                upcoming = pool.submit(self.batch, step + 1) if step + 1 < stop else None
                yield current
