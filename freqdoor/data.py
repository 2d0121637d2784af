"""Images from files and folders, and crops that are a pure function of (seed, step)."""

import contextlib
import hashlib
import io
import os
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from freqdoor.arrow import list_arrow, pictures_in
from freqdoor.errors import FreqdoorError
from freqdoor.files import OTHER_PICTURES, PICTURES, mark, read_text, with_slashes, write_together
from freqdoor.limits import MAX_PIXELS as MAX_PIXELS
from freqdoor.limits import check_memory, file_size
from freqdoor.shards import Packed, list_shards, packed_in
from freqdoor.types import Images, as_picture, from_picture, from_uint8

FORMATS = sorted(set(PICTURES.values()))  # no other is tried: for some, Pillow starts a program
CACHE_BYTES = 2**30  # decoded training images kept in memory; beyond it they are decoded again
Size = tuple[int, int]  # (height, width) in pixels
Picture = Path | Packed  # a file, or what is packed in one
P = TypeVar("P", Path, Picture)
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
TURNS = {  # EXIF orientation -> how the stored picture becomes the one that is shown
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DAMAGE = (  # what Pillow's parsers raise on a damaged file
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError, OverflowError),
    *(struct.error, zlib.error),
)
TAG_BYTES = {3: 2, 4: 4, 5: 8, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}  # of a TIFF tag's values
TAGS_LEAST = 1024  # bytes that a table of tags counts, however short it is
TAGS_SHARE = 4  # times the file's bytes that its tags may claim together: those of honest files share next to nothing
CITYSCAPES_IMAGES, CITYSCAPES_LABELS = "_leftImg8bit", "_gtFine_labelIds.png"  # how their names end
CITYSCAPES_CLASSES = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label id by train id
VOID = 255  # train id of all others
FRAMES = "only the first frame is read"
PROFILE = "the colour profile is ignored, colours are taken as sRGB"
TRANSPARENCY = "the transparent colour is ignored"
_said: set[str] = set()  # pictures of which it was said what is dropped: once a run is enough


def list_images(path: Path | str) -> list[Path]:
    """The image files below a folder, sorted, or the one file that `path` names.

    Hidden files and folders, and what a killed process left, are passed over; pictures of formats that are not read
    are counted in a warning.
    """
    path = Path(path)
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        what = "a device or a pipe" if os.path.exists(path) else "nothing"
        raise FreqdoorError(f"{path}: expected an image or a folder of images, found {what} there")
    images, others = [], Counter[str]()
    for file in path.rglob("*"):
        ending = file.suffix.lower()
        if any(part.startswith(".") for part in file.relative_to(path).parts) or not os.path.isfile(file):
            continue
        if ending in PICTURES:
            images.append(file)
        elif ending in OTHER_PICTURES:
            others[ending] += 1
    unread = f"{others.total()} pictures of formats that are not read ({', '.join(sorted(others))})"
    if not images:
        hint = f", but {unread}; convert them to PNG" if others else ""
        raise FreqdoorError(f"{path}: expected images ({', '.join(PICTURES)}), found none in this folder{hint}")
    if others:
        warnings.warn(f"{path}: {unread} are left out; convert them to PNG to take them", stacklevel=2)
    return sorted(images)


def list_training_images(place: Path | str) -> list[Picture]:
    """As `list_images`; and the pictures in shards (`list_shards`) or Arrow files (`list_arrow`) that the place names.

    Raises:
        FreqdoorError: no pictures there, or a file that cannot be read.
    """
    shards, tables = list_shards(place), list_arrow(place)
    if not shards and not tables:
        return list(list_images(place))
    packed: list[Picture] = [picture for shard in shards for picture in packed_in(shard)]
    packed += [picture for table in tables for picture in pictures_in(table)]
    if not packed:
        raise FreqdoorError(f"{place}: expected images ({', '.join(PICTURES)}) in these shards, found none")
    return packed


def listed_images(files: Path | str, folder: Path | str) -> list[Picture]:
    """The pictures that a list names, in its order; of a line that names a folder, such as Vimeo90K's, all in it.

    Args:
        folder: what the lines are relative to.
    """
    places = [Path(folder) / line for line in read_list(files, folder=folder)]
    return [picture for place in places for picture in (list_images(place) if os.path.isdir(place) else [place])]


def image_paths(images: Path | str | Sequence[Path | str]) -> list[Path]:
    """The files of a folder, of one image, or of several of both, in order; FreqdoorError if there are none."""
    places = [images] if isinstance(images, Path | str) else images
    paths = [path for place in places for path in list_images(place)]
    if not paths:
        raise FreqdoorError("images: expected one or more, found none")
    return paths


def read_list(path: Path | str, every: int = 1, folder: Path | str = ".") -> list[str]:
    """The lines of a list of pictures, of any system; FreqdoorError if there are none.

    Args:
        folder: what the pictures' paths are relative to.
    """
    lines = [line.strip() for line in read_text(path, "this list").splitlines()]
    lines = [with_slashes(line, folder) for line in lines if line][::every]
    if not lines:
        raise FreqdoorError(f"{path}: expected one picture a line, found none")
    return lines


class _Header(NamedTuple):
    """What is known of an image file before its pixels are read."""

    height: int  # as shown
    width: int
    mode: str  # Pillow's, or "16-bit RGB"
    losses: tuple[str, ...]  # what of the file is not taken


@contextlib.contextmanager
def _open(path: Picture | str, what: str) -> Iterator[Image.Image]:
    """An image file of a format that is read; a device or a pipe would let the program wait for ever."""
    with contextlib.ExitStack() as stack:
        try:
            if isinstance(path, Packed):
                file: BinaryIO = io.BytesIO(path.read_bytes())
            else:
                check_memory(file_size(path, what), "the whole file", path)  # WebP is read as one
                file = stack.enter_context(Path(path).open("rb"))  # by name, Pillow maps grey TIFF files in wrong order
            _check_tags(file, path)
            image = stack.enter_context(Image.open(file, formats=FORMATS))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise FreqdoorError(
                f"{path}: too many pixels; at most {MAX_PIXELS} are accepted, crop or reduce it"
            ) from None
        except UnidentifiedImageError:
            raise FreqdoorError(
                f"{path}: expected {what}, could not read it (it is damaged or none of {', '.join(FORMATS)}); "
                "convert it to PNG"
            ) from None
        except DAMAGE as error:
            raise FreqdoorError(f"{path}: expected {what}, could not read it ({error})") from None
        yield image


def _check_tags(file: BinaryIO, path: Picture | str) -> None:
    """Raise if a TIFF file's tags share so much of it that Pillow, before version 13, would read gigabytes."""
    start = file.read(16)
    size = file.seek(0, os.SEEK_END)
    order = {b"II": "<", b"MM": ">"}.get(start[:2])
    if order is not None:
        big = start[2:4] in (b"+\0", b"\0+")  # BigTIFF
        number, entry, offset = ("Q", "HHQQ", start[8:16]) if big else ("L", "HHLL", start[4:8])
        number, count, entry = order + number, order + ("Q" if big else "H"), order + entry
        read, (place,) = 0, struct.unpack(number, offset)
        while 0 < place < size:
            file.seek(place)
            (tags,) = struct.unpack(count, file.read(struct.calcsize(count)))
            table = file.read(min(tags, size) * struct.calcsize(entry))
            whole = len(table) // struct.calcsize(entry) * struct.calcsize(entry)
            values = struct.iter_unpack(entry, table[:whole])
            read += TAGS_LEAST + whole + sum(min(TAG_BYTES.get(kind, 1) * many, size) for _, kind, many, _ in values)
            if read > TAGS_SHARE * size + 2**20:
                raise FreqdoorError(
                    f"{path}: expected an image, found a TIFF file whose tags claim more than {TAGS_SHARE} times its "
                    "bytes; convert it to PNG"
                )
            following = file.read(struct.calcsize(number))
            place = struct.unpack(number, following)[0] if len(following) == struct.calcsize(number) else 0
    file.seek(0)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How the stored picture is turned or mirrored to be shown; Pillow does it itself with TIFF files."""
    if image.format == "TIFF":
        return None
    try:  # Image's own method: the one of PNG would decode the whole picture
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1))
    except DAMAGE:  # viewers show a picture with damaged metadata as it is stored
        return None


def _header(path: Picture | str, what: str = "an image") -> _Header:
    with _open(path, what) as image:
        width, height = image.size
        if _turn(image) in (TURNS[5], TURNS[6], TURNS[7], TURNS[8]):
            width, height = height, width
        deep = isinstance(image, ImageFile) and image.mode == "RGB" and _is_16_bit(image)
        mode = "16-bit RGB" if deep else image.mode
        profile = image.info.get("icc_profile") or b""
        losses = {
            FRAMES: getattr(image, "is_animated", False),
            PROFILE: profile and b"srgb" not in profile.replace(b"\0", b"").lower(),
            TRANSPARENCY: mode == "RGB" and "transparency" in image.info,
        }
    if width * height > MAX_PIXELS:
        raise FreqdoorError(
            f"{path}: {width}x{height} is more than the {MAX_PIXELS} pixels accepted; crop or reduce it"
        )
    return _Header(height, width, mode, tuple(loss for loss, present in losses.items() if present))


def _is_16_bit(image: ImageFile) -> bool:
    """Pillow opens 48-bit PNG and TIFF files as 8-bit RGB and drops the low bytes; the raw mode still tells."""
    raw_modes = (tile[3] for tile in image.tile)  # a string, or a tuple that starts with one
    return any("16" in str(raw[0] if isinstance(raw, tuple) else raw) for raw in raw_modes)


def _image_header(path: Picture | str) -> _Header:
    header = _header(path)
    if header.mode != "RGB":
        kind = MODES.get(header.mode, header.mode)
        raise FreqdoorError(f"{path}: expected an 8-bit RGB image, found {kind}; convert it to 8-bit RGB first")
    return header


def check_image(path: Picture | str) -> Size:
    """(height, width) of an 8-bit RGB image file as it is shown, from its header, or a sentence on why it is of no use.

    Its EXIF orientation counts: a portrait that a phone has stored lying is higher than wide.
    """
    header = _image_header(path)
    return header.height, header.width


def load_image(path: Picture | str, size: Size | None = None) -> Images:
    """One 8-bit RGB image file as (1, 3, h, w) in [0, 1], resized to `size` (bilinear, antialiased) if one is given.

    The picture is the one that a viewer shows: turned as its EXIF orientation says. What is not taken of the file, such
    as further frames, is said in a warning.
    """
    losses = _image_header(path).losses
    if losses and str(path) not in _said:
        _said.add(str(path))
        warnings.warn(f"of a picture {'; '.join(losses)}", stacklevel=2)  # the same words each time: shown once
    return from_uint8(_load_pixels(path, size))[None]


def _load_pixels(path: Picture | str, size: Size | None = None) -> Tensor:
    check_image(path)
    return _decode(path, size, Image.Resampling.BILINEAR).permute(2, 0, 1)


def load_labels(path: Path | str, size: Size | None = None, image_size: Size | None = None) -> Tensor:
    """The classes of one image's pixels, (1, h, w), uint8, resized to `size` (nearest) if one is given.

    Args:
        image_size: (height, width) of the image that the labels belong to, before any resizing.

    Raises:
        FreqdoorError: no such file, more than one channel or 8 bits, too many pixels, or another size than the image's.
    """
    path = Path(path)
    height, width, mode, _ = _header(path, "the label image of a picture of this name")
    if mode not in ("L", "P"):
        raise FreqdoorError(f"{path}: expected labels in one channel of 8 bits, found {MODES.get(mode, mode)}")
    if image_size and (height, width) != tuple(image_size):
        raise FreqdoorError(
            f"{path}: labels of {width}x{height} pixels for an image of {image_size[1]}x{image_size[0]}; "
            "expected the same size"
        )
    labels = _decode(path, size, Image.Resampling.NEAREST)[None]
    return _train_ids()[labels.long()] if path.name.endswith(CITYSCAPES_LABELS) else labels


def label_paths(images: Sequence[Picture], folder: Path | str) -> list[Path]:
    """The label image of every image: the PNG file of the same name in `folder`; raises if any is missing.

    Of Cityscapes' images, CITY_..._leftImg8bit.png, it is CITY/CITY_..._gtFine_labelIds.png, whose ids `load_labels`
    turns into train ids: 0 to 18, and 255 for what is not a class.
    """
    paths = [Path(folder) / _label_name(image.stem) for image in images]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FreqdoorError(
            f"{folder}: expected one label image a picture, {len(missing)} are missing, first {missing[0]}"
        )
    return paths


def _label_name(stem: str) -> str:
    """What the label image of a picture is called, with its folder."""
    scene = stem.removesuffix(CITYSCAPES_IMAGES)
    return f"{stem}.png" if scene == stem else f"{scene.partition('_')[0]}/{scene}{CITYSCAPES_LABELS}"


@cache
def _train_ids() -> Tensor:
    """Cityscapes' train id of every label id, (256,), uint8."""
    table = torch.full((256,), VOID, dtype=torch.uint8)
    table[list(CITYSCAPES_CLASSES)] = torch.arange(len(CITYSCAPES_CLASSES), dtype=torch.uint8)
    return table


def _decode(path: Picture | str, size: Size | None, how: Image.Resampling) -> Tensor:
    """The pixels as they are shown, (h, w) or (h, w, 3)."""
    try:
        with _open(path, "an image") as image:
            turn = _turn(image)
            image.load()
            picture = image if turn is None else image.transpose(turn)
            if size is not None and (picture.height, picture.width) != tuple(size):
                picture = picture.resize((size[1], size[0]), how)
            pixels = np.array(picture)
    except DAMAGE as error:
        raise FreqdoorError(f"{path}: truncated or damaged image ({error})") from None
    return torch.from_numpy(pixels)


def centre(x: Images, side: int) -> Images:
    """The middle of images, `side` pixels a side, or all of a side that is shorter."""
    top, left = (max(0, (length - side) // 2) for length in x.shape[-2:])
    return x[..., top : top + side, left : left + side]


def save_image(path: Path | str, x: Images, verb: str | None = None) -> None:
    """Write one image (1, 3, h, w) as an 8-bit file, over what is there; PNG keeps every bit.

    Args:
        verb: of the command line, that is making the picture: it is written into the file, but for BMP and PPM.

    Raises:
        FreqdoorError: a name or a size that no picture can have, or a place that cannot be written to.
    """
    write_together({Path(path): encoded(path, x, verb)})


def encoded(path: Path | str, x: Images, verb: str | None = None) -> bytes:
    """The bytes that `save_image` writes."""
    picture, buffer = as_picture(x), io.BytesIO()
    kind = picture_kind(path)
    try:
        picture.save(buffer, kind, **(_marks(kind, verb) if verb else {}))
    except (ValueError, OSError) as error:  # sides that the format does not have; a format without RGB
        raise FreqdoorError(
            f"{path}: could not write a picture of {picture.width}x{picture.height} ({error})"
        ) from None
    return buffer.getvalue()


def picture_in(content: bytes, size: Size) -> Images:
    """The image, (1, 3, h, w), that the bytes of a WebP or PNG file hold.

    Raises:
        FreqdoorError: anything but one undamaged 8-bit RGB picture of this size.
    """
    expected = f"expected a WebP or PNG picture of {size[1]}x{size[0]} pixels in 8-bit RGB"
    try:
        with Image.open(io.BytesIO(content), formats=("WEBP", "PNG")) as image:
            found = f"{image.width}x{image.height} in {MODES.get(image.mode, image.mode)}"
            if (image.height, image.width) != size or image.mode != "RGB" or getattr(image, "is_animated", False):
                raise FreqdoorError(f"damaged: {expected}, found {found}")
            return from_picture(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, UnidentifiedImageError, *DAMAGE) as error:
        raise FreqdoorError(f"damaged: {expected}, could not read it ({error})") from None


def picture_kind(path: Path | str) -> str:
    """Pillow's name of the format of a picture to be written, by its ending; FreqdoorError if that is no picture's."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise FreqdoorError(f"{path}: expected an image's file name, for example one that ends in .png")
    return kind


def _marks(kind: str, verb: str) -> dict[str, Any]:
    """What Pillow is told so that `files.made_by` knows the picture again."""
    if kind == "PNG":
        texts = PngInfo()
        texts.add_text("Software", mark(verb))
        return {"pnginfo": texts}
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = mark(verb)
    return {"exif": exif} if kind in ("JPEG", "WEBP", "TIFF") else {}


def usable_images(paths: Sequence[P], *, min_side: int = 1, decode: bool = False, skip_broken: bool = False) -> list[P]:
    """The paths that can be used; with `decode` every file is read to its end, which finds truncated ones.

    Raises with a sentence for each of the others at once, or warns if `skip_broken`; raises in any case if nothing is
    left. What is not taken of usable files, such as further frames, is counted in one warning.
    """
    good, problems = [], []
    losses: dict[str, list[P]] = {}
    for path in paths:
        try:
            header = _image_header(path)
            if min(header.height, header.width) < min_side:
                raise FreqdoorError(f"{path}: {header.width}x{header.height} is smaller than the {min_side}-pixel crop")
            if decode:
                _load_pixels(path)
        except FreqdoorError as error:
            problems.append(str(error))
        else:
            good.append(path)
            for loss in header.losses if str(path) not in _said else ():
                losses.setdefault(loss, []).append(path)
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  and {len(problems) - 10} more" if len(problems) > 10 else "")
        if not (skip_broken and good):
            hint = "; skip_broken (--skip-broken) goes on without them" if good else ""
            raise FreqdoorError(f"{len(problems)} of {len(paths)} images cannot be used{hint}:\n  {shown}")
        warnings.warn(f"skipped {len(problems)} of {len(paths)} images:\n  {shown}", stacklevel=2)
    if losses:
        _said.update(str(path) for lossy in losses.values() for path in lossy)
        counts = [f"of {len(lossy)} {loss} (first {lossy[0]})" for loss, lossy in losses.items()]
        warnings.warn(f"{len(paths)} pictures: {'; '.join(counts)}", stacklevel=2)
    return good


def dataset_hash(paths: Sequence[Picture]) -> str:
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


def forked(device: torch.device | str = "cpu") -> contextlib.AbstractContextManager[None]:
    """A block after which the random numbers of the CPU and of a device go on as if none had been drawn in it."""
    where = torch.device(device)
    devices = [] if where.type in ("cpu", "mps", "xla") else [where]  # mps and xla have no state that takes a device
    return torch.random.fork_rng(devices, device_type=where.type if devices else "cuda")


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
        paths: Sequence[Picture],
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
        self._sizes: dict[int, Size] = {}
        self._broken: set[int] = set()
        self._whole: set[int] = set()  # of those that have been read to their end
        self._cached_bytes = 0

    def facts(self) -> dict[str, int | str]:
        """How many images there are and their hash, for the run's records."""
        return {"images": len(self.paths), "images_sha256": dataset_hash([*self.paths, *self.labels])}

    def batch(self, step: int, rows: slice | None = None) -> Images:
        """Batch number `step`, (batch_size, 3, height, width), or these rows of it: the others are not decoded."""
        windows = self._windows(step)[rows or slice(None)]
        return from_uint8(torch.stack([_cut(self._pixels(window.image), window) for window in windows]))

    def labels_of(self, step: int) -> Tensor:
        """The labels of batch number `step`, (batch_size, height, width), uint8, cut as its images are."""
        cut = []
        for window in self._windows(step):
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

    def _size(self, index: int) -> Size:
        """(height, width) of an image as it is cut from."""
        if index not in self._sizes:
            self._sizes[index] = self.resize or check_image(self.paths[index])
        return self._sizes[index]

    def _windows(self, step: int) -> "list[_Window]":
        """Where each image of a batch is cut from."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, "crops", step))

        def draw(upper: int) -> int:
            return int(torch.randint(upper, (1,), generator=generator))

        windows: list[_Window] = []
        while len(windows) < self.batch_size:
            index = draw(len(self.paths))
            try:
                if self.skip_broken and index not in self._whole:  # truncated: only reading to the end shows it
                    self._pixels(index)
                    self._whole.add(index)
            except FreqdoorError as error:
                self._broken.add(index)
                if len(self._broken) == len(self.paths):
                    raise
                warnings.warn(f"skipped {error}", stacklevel=2)
                continue
            (height, width), (whole_height, whole_width) = self.size, self._size(index)
            top, left = draw(whole_height - height + 1), draw(whole_width - width + 1)
            windows.append(_Window(index, top, left, height, width, bool(draw(2))))
        return windows

    def batches(self, start: int, stop: int, rows: slice | None = None) -> Iterator[Images]:
        """Batches start .. stop - 1, or these rows of each; the next one is decoded in a thread while one is used."""
        with ThreadPoolExecutor(1) as pool:
            upcoming: Future[Images] | None = None
            for step in range(start, stop):
                current = upcoming.result() if upcoming else self.batch(step, rows)
                upcoming = pool.submit(self.batch, step + 1, rows) if step + 1 < stop else None
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
