"""Images from files and folders, and crops that are a pure function of (seed, step)."""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from torch import Tensor

from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing
from freqdoor.types import Images, from_uint8, to_uint8

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
MAX_PIXELS = 2**24  # 16.8 million: a codec's activations at this size take about 10 GiB
CACHE_BYTES = 2**30  # decoded training images kept in memory; beyond it they are decoded again
Size = tuple[int, int]  # (height, width) in pixels
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


def read_list(path: Path | str, every: int = 1) -> list[str]:
    """The lines of a list of pictures; FreqdoorError if there are none."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FreqdoorError(f"{path}: could not read this list ({error})") from None
    lines = [line for line in lines if line][::every]
    if not lines:
        raise FreqdoorError(f"{path}: expected one picture a line, found none")
    return lines


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


def load_image(path: Path | str, size: Size | None = None) -> Images:
    """One 8-bit RGB image file as (1, 3, h, w) in [0, 1], resized to `size` (bilinear, antialiased) if one is given."""
    return from_uint8(_load_pixels(path, size))[None]


def _load_pixels(path: Path | str, size: Size | None = None) -> Tensor:
    check_image(path)
    return _decode(path, size, Image.Resampling.BILINEAR).permute(2, 0, 1)


def load_labels(path: Path | str, size: Size | None = None, image_size: Size | None = None) -> Tensor:
    """The classes of one image's pixels, (1, h, w), uint8, resized to `size` (nearest) if one is given.

    Args:
        image_size: (height, width) of the image that the labels belong to, before any resizing.

    Raises:
        FreqdoorError: no such file, more than one channel or 8 bits, or another size than the image's.
    """
    try:
        with Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected the labels of an image of this name, found no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise FreqdoorError(f"{path}: expected a label image, could not read it ({error})") from None
    if mode not in ("L", "P"):
        raise FreqdoorError(f"{path}: expected labels in one channel of 8 bits, found {MODES.get(mode, mode)}")
    if image_size and (height, width) != tuple(image_size):
        raise FreqdoorError(
            f"{path}: labels of {width}x{height} pixels for an image of {image_size[1]}x{image_size[0]}; "
            "expected the same size"
        )
    return _decode(path, size, Image.Resampling.NEAREST)[None]


def label_paths(images: Sequence[Path], folder: Path | str) -> list[Path]:
    """The label image of every image: the PNG file of the same name in `folder`; raises if any is missing."""
    paths = [Path(folder) / f"{image.stem}.png" for image in images]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FreqdoorError(
            f"{folder}: expected one label image a picture, {len(missing)} are missing, first {missing[0]}"
        )
    return paths


def _decode(path: Path | str, size: Size | None, how: Image.Resampling) -> Tensor:
    try:
        with Image.open(path) as image:
            resized = size is not None and (image.height, image.width) != tuple(size)
            pixels = np.array(image.resize((size[1], size[0]), how) if size and resized else image)
    except (OSError, ValueError, SyntaxError) as error:
        raise FreqdoorError(f"{path}: truncated or damaged image ({error})") from None
    return torch.from_numpy(pixels)


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
    """Random square crops, or whole resized images, with horizontal flips; a function of seed and step alone.

    That makes resuming trivial: there is no sampler state to save.

    Args:
        crop: side of the crops in pixels.
        resize: (height, width) that whole images are resized to instead of being cropped.
        window: (height, width) of the windows that are cut from the resized images; by default all of them.
        labels: the label image of each path, for `labels_of`.
        skip_broken: go on without images that turn out to be truncated.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        crop: int,
        batch_size: int,
        seed: int,
        resize: Size | None = None,
        window: Size | None = None,
        labels: Sequence[Path] = (),
        skip_broken: bool = False,
    ) -> None:
        self.paths, self.labels = list(paths), list(labels)
        self.crop, self.batch_size, self.seed, self.skip_broken = crop, batch_size, seed, skip_broken
        self.resize, self.size = resize, window or resize or (crop, crop)
        self._cache: dict[int, Tensor] = {}
        self._cached_bytes = 0

    def facts(self) -> dict[str, int | str]:
        """How many images there are and their hash, for the run's records."""
        return {"images": len(self.paths), "images_sha256": dataset_hash([*self.paths, *self.labels])}

    def batch(self, step: int) -> Images:
        """Batch number `step`, (batch_size, 3, height, width)."""
        return from_uint8(torch.stack([_cut(pixels, window) for window, pixels in self._windows(step)]))

    def labels_of(self, step: int) -> Tensor:
        """The labels of batch number `step`, (batch_size, height, width), uint8, cut as its images are."""
        cut = []
        for window, _ in self._windows(step):
            i = window.image
            cut.append(_cut(load_labels(self.labels[i], self.resize, check_image(self.paths[i]))[0], window))
        return torch.stack(cut)

    def _pixels(self, index: int) -> Tensor:
        if index not in self._cache:
            pixels = _load_pixels(self.paths[index], self.resize)
            if self._cached_bytes + pixels.numel() > CACHE_BYTES:
                return pixels
            self._cache[index] = pixels
            self._cached_bytes += pixels.numel()
        return self._cache[index]

    def _windows(self, step: int) -> "list[tuple[_Window, Tensor]]":
        """Where each image of a batch is cut from, and its pixels."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "crops", step))

        def draw(upper: int) -> int:
            return int(torch.randint(upper, (1,), generator=generator))

        windows: list[tuple[_Window, Tensor]] = []
        while len(windows) < self.batch_size:
            try:
                pixels = self._pixels(index := draw(len(self.paths)))
            except FreqdoorError as error:  # truncated: only reading to the end shows it
                if not self.skip_broken:
                    raise
                warnings.warn(f"skipped {error}", stacklevel=2)
                continue
            height, width = self.size
            top, left = draw(pixels.shape[1] - height + 1), draw(pixels.shape[2] - width + 1)
            windows.append((_Window(index, top, left, height, width, bool(draw(2))), pixels))
        return windows

    def batches(self, start: int, stop: int) -> Iterator[Images]:
        """Batches start .. stop - 1; the next one is decoded in a thread while the current one is used."""
        with ThreadPoolExecutor(1) as pool:
            upcoming: Future[Images] | None = None
            for step in range(start, stop):
                current = upcoming.result() if upcoming else self.batch(step)
                upcoming = pool.submit(self.batch, step + 1) if step + 1 < stop else None
                yield current


class _Window(NamedTuple):
    """Where one image of a batch is cut from."""

    image: int
    top: int
    left: int
    height: int
    width: int
    mirrored: bool


def _cut(pixels: Tensor, window: _Window) -> Tensor:
    """The window of pixels or labels, (..., h, w)."""
    rows, columns = slice(window.top, window.top + window.height), slice(window.left, window.left + window.width)
    cut = pixels[..., rows, columns]
    return cut.flip(-1) if window.mirrored else cut
