"""What a stranger's file may take: memory that is known before it is taken, and texts of bounded length and depth."""

import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from freqdoor.errors import FreqdoorError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MOST = 4 * UNITS["G"]  # bytes that one file may take unless more is allowed
HALF = 2  # of the machine's memory, where that is less
LONGEST_HEADER = UNITS["M"]  # characters of a file's own description
LONGEST_TEXT = 64 * UNITS["M"]  # bytes of results, lists and settings
DEEPEST = 32  # tables within tables
MAX_PIXELS = 2**25  # of a picture: one of 7680x4320, which takes up to 4 GiB, and no more
MAX_PADDED = MAX_PIXELS + MAX_PIXELS // 4  # of a picture as a codec pads it: what is long and thin grows to many times
MAX_MULTIPLE = 4096  # pixels that the sides of a codec's pictures have to be a multiple of
_allowed: ContextVar[int | None] = ContextVar("max_memory", default=None)


@contextmanager
def max_memory(size: int | str) -> Iterator[None]:
    """How much memory reading one file may take inside the block; by default 4 GiB, or half of the machine's if less.

    Args:
        size: in bytes, or as a text: "800M", "2G", "1.5G".

    Raises:
        FreqdoorError: a size that is none.
    """
    token = _allowed.set(parse_size(size))
    try:
        yield
    finally:
        _allowed.reset(token)


def parse_size(size: int | str, name: str = "max-memory") -> int:
    """Bytes of "2G", "800M" or a plain number, in powers of 1024; FreqdoorError, of that name, if it is no size."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?)(?:i?B)?", str(size).strip(), re.IGNORECASE)
    number = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if number < 1:
        raise FreqdoorError(f"{name}: expected a size such as 800M or 2G, found {str(size)[:40]!r}")
    return number


def allowed_memory() -> int:
    """Bytes that reading one file may take."""
    return _allowed.get() or min(MOST, machine_memory() // HALF)


def machine_memory() -> int:
    """Bytes that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(needed: int, what: str, path: Path | str) -> None:
    """Refuse what would take more memory than is allowed, before it is taken.

    Args:
        needed: bytes.
        what: what takes them, as "its tensors".

    Raises:
        FreqdoorError: how much is needed, how much is allowed, and how to allow more.
    """
    if needed > (allowed := allowed_memory()):
        more = -(-needed // UNITS["M"])
        raise FreqdoorError(
            f"{path}: {what} would take {size_text(needed)} of memory, and {size_text(allowed)} are allowed; if you "
            f"trust this file, allow more with --max-memory {more}M (freqdoor.max_memory in Python)"
        )


def size_text(size: int) -> str:
    """A number of bytes as people read it: "1.5 GiB"."""
    unit = next((unit for unit in ("T", "G", "M", "K") if size >= UNITS[unit]), "")
    return f"{size / UNITS[unit]:.3g} {unit}iB" if unit else f"{size} bytes"


def file_size(path: Path | str, expected: str) -> int:
    """Bytes of a regular file: a device or a pipe would let the program wait for ever.

    Raises:
        FreqdoorError: nothing there, or no regular file; it says that `expected` was expected.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        nothing = isinstance(error, FileNotFoundError)
        reason = (
            "found nothing there (no such file)"
            if nothing
            else f"could not read it ({getattr(error, 'strerror', error)})"
        )
        raise FreqdoorError(f"{path}: expected {expected}, {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "device or a pipe"
        raise FreqdoorError(f"{path}: expected {expected}, found a {kind}")
    return status.st_size


def read_whole(path: Path | str, expected: str, longest: int | None = None) -> bytes:
    """The content of a regular file of at most `longest` bytes, by default as many as memory is allowed for.

    Raises:
        FreqdoorError: no such file, or a longer one; it says that `expected` was expected.
    """
    size = file_size(path, expected)
    if longest is not None and size > longest:
        raise FreqdoorError(f"{path}: expected {expected} of at most {size_text(longest)}, found {size_text(size)}")
    check_memory(size, "the whole file", path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise FreqdoorError(f"{path}: expected {expected}, could not read it ({error.strerror})") from None


def parse_json(
    text: str | bytes,
    path: Path | str,
    longest: int = LONGEST_HEADER,
    *,
    expected: str = "JSON",
    nan_as_null: bool = False,
) -> Any:
    """What a stranger's JSON text says: of bounded length and depth, with finite numbers and every key once.

    Args:
        path: the file that it stands in, for the sentence.
        longest: characters.
        expected: what the text is, for the sentence.
        nan_as_null: take NaN and Infinity, which earlier versions wrote, as None.

    Raises:
        FreqdoorError: any other text.
    """
    if len(text) > longest:
        raise FreqdoorError(f"{path}: expected {expected} of at most {longest} characters, found {len(text)}")
    too_deep = f"{path}: expected {expected} of at most {DEEPEST} tables within each other, found more"
    constant = (lambda name: None) if nan_as_null else _no_number
    try:
        content = json.loads(text, parse_constant=constant, parse_float=_finite, object_pairs_hook=_each_key_once)
    except RecursionError:
        raise FreqdoorError(too_deep) from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError as well
        raise FreqdoorError(f"{path}: expected {expected}, found something else ({str(error)[:120]})") from None
    if _deeper(content, DEEPEST):
        raise FreqdoorError(too_deep)
    return content


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text[:20])


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name[:40]!r} stands there twice")
    return table


def _deeper(content: Any, depth: int) -> bool:
    """Whether tables and lists lie deeper within each other than so."""
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return depth < 0 or any(_deeper(part, depth - 1) for part in parts)
