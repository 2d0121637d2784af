"""Pictures in tar files, as WebDataset packs sets that are too large for a folder; nothing is unpacked to the disk.

A shard is indexed once, and its pictures are read from where they lie in it: which pictures a training step takes
depends on its seed and number alone, as with a folder, and not on how far a stream has been read.
"""

import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from freqdoor.errors import FreqdoorError
from freqdoor.files import PICTURES
from freqdoor.limits import LONGEST_HEADER, check_memory, file_size

ENDING = ".tar"
RANGE = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}")
MOST_SHARDS = 100_000
BLOCK = 512  # bytes, of which a tar file consists
EXPECTED = "a tar file of pictures"


@dataclass(frozen=True)
class Packed:
    """A picture in a shard."""

    shard: Path
    inside: str  # its name there
    offset: int  # bytes from the shard's beginning
    size: int  # bytes

    @property
    def name(self) -> str:
        """Its name without folders."""
        return PurePosixPath(self.inside).name

    @property
    def stem(self) -> str:
        """Its name without folders and ending."""
        return PurePosixPath(self.inside).stem

    def read_bytes(self) -> bytes:
        """The picture's file."""
        check_memory(self.size, "the whole file", str(self))
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.shard}/{self.inside}"


def list_shards(place: Path | str) -> list[Path]:
    """The shards that a place names, in order: a range of them, one, or a folder of nothing else; else none.

    Args:
        place: such as "shards/{000..003}.tar".

    Raises:
        FreqdoorError: a range of too many, or with an end before its beginning.
    """
    text = str(place)
    if RANGE.search(text) and text.endswith(ENDING) and not os.path.exists(text):
        return [Path(name) for name in _expanded(text)]
    if text.endswith(ENDING) and os.path.isfile(text):
        return [Path(text)]
    shards = sorted(Path(place).glob(f"*{ENDING}")) if os.path.isdir(place) else []
    pictures = (file for file in Path(place).rglob("*") if file.suffix.lower() in PICTURES) if shards else iter(())
    return [] if next(pictures, None) else shards


def _expanded(text: str) -> Iterator[str]:
    """All names that a text with ranges stands for; numbers have as many digits as the first of their range."""
    ranges, number = [], 1
    for first, last in RANGE.findall(text):
        if int(last) < int(first):
            raise FreqdoorError(f"{text}: expected a range such as {{000..003}}, found one that ends before it begins")
        ranges.append((range(int(first), int(last) + 1), len(first)))
        number *= len(ranges[-1][0])
    if number > MOST_SHARDS:
        raise FreqdoorError(f"{text}: expected at most {MOST_SHARDS} shards, found {number}")
    pieces = RANGE.sub("\0", text).split("\0")
    for numbers in itertools.product(*([str(n).zfill(digits) for n in whole] for whole, digits in ranges)):
        yield "".join(piece + number for piece, number in zip(pieces, (*numbers, ""), strict=True))


def packed_in(shard: Path) -> list[Packed]:
    """The pictures in a shard, in its order; other files and hidden ones are passed over.

    Raises:
        FreqdoorError: no uncompressed tar file, a truncated or damaged one, or one with links, devices or names that
            lead out of it.
    """
    size = file_size(shard, EXPECTED)
    found: list[Packed] = []
    end = 0
    try:
        with _ShortReads(shard) as file, tarfile.open(fileobj=file, mode="r:", errorlevel=2) as tar:
            for info in tar:
                if info.offset < end or info.size < 0:
                    raise tarfile.ReadError("its parts overlap")
                if not (info.isreg() or info.isdir()) or info.issparse():
                    raise FreqdoorError(f"{shard}: expected plain files in it, found {info.name[:80]!r}, which is none")
                inside = PurePosixPath(info.name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise FreqdoorError(f"{shard}: expected names inside it, found {info.name[:80]!r}; pack it anew")
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                picture = inside.suffix.lower() in PICTURES and not any(p.startswith(".") for p in inside.parts)
                if picture and info.isreg():
                    found.append(Packed(shard, info.name, info.offset_data, info.size))
            file.seek(end)
            if end > size or file.read(BLOCK) != bytes(BLOCK):  # a damaged header ends tarfile's iteration silently
                raise tarfile.ReadError("it is truncated or damaged")
    except (tarfile.TarError, OSError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FreqdoorError(f"{shard}: expected {EXPECTED}, uncompressed and whole ({reason})") from None
    return found


class _ShortReads(io.FileIO):
    """A file of which no part is read at once that is longer than a header may be, whatever the headers claim."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At most as many bytes as a header has."""
        if size is None or not 0 <= size <= LONGEST_HEADER:
            raise tarfile.ReadError("a header of absurd size")
        return super().read(size)
