"""Files: written under a temporary name first, so that nobody ever sees half of one; named and read as people do."""

import contextlib
import errno
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from freqdoor.errors import FreqdoorError
from freqdoor.limits import LONGEST_TEXT, size_text

PICTURES = {  # endings of pictures that are read -> Pillow's name of the format
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
OTHER_PICTURES = (  # endings of pictures that are not read
    *(".avif", ".avifs", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jxl", ".jxr", ".pbm", ".pcx"),
    *(".pgm", ".pnm", ".qoi", ".tga", ".exr", ".hdr", ".psd", ".svg", ".xcf"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2"),  # raw files of cameras
)
FULL = {  # the system's errors of a disk without room -> what a person has to know besides
    errno.ENOSPC: "",
    errno.EDQUOT: " for this user",
    errno.EFBIG: " for a file of this size",
}


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block succeeds, and is removed if it does not.

    A link is followed: the file that it leads to is replaced.

    Raises:
        FreqdoorError: a folder, a device, a link to itself, an unwritable folder or a full disk, in one sentence.
    """
    target = _target(Path(path))
    partial = target.with_name(f".partial-{os.getpid()}-{secrets.token_hex(4)}{target.suffix[-16:]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)  # what the umask leaves; safetensors writes for its user alone
        yield partial
        partial.chmod(mode)
        partial.replace(target)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap the system's error
        raise FreqdoorError(f"{path}: could not write ({_reason(error, partial)})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _target(path: Path) -> Path:
    """The regular file that is to be written, which need not exist."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # which of them depends on Python's version
        raise FreqdoorError(f"{path}: this link leads back to itself; choose another place to write to") from None
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "folder" if target.is_dir() else "device or a pipe"
        raise FreqdoorError(f"{path}: expected the name of a file to write, found a {kind}; choose another name")
    return target


def _reason(error: Exception, partial: Path) -> str:
    """Why a file could not be written, in the system's words or, of a full disk, in plain ones."""
    number = _system_error(error) or _system_error(error.__context__)
    if number is None and isinstance(error, RuntimeError):
        number = _asked_again(partial)
    if number in FULL:
        return f"no space left on the disk{FULL[number]}"
    return os.strerror(number) if number else str(error).split("\n")[0]


def _system_error(error: BaseException | None) -> int | None:
    """The system's number of an error, which safetensors has in its text only."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"(?:os error |\bcode: )(\d+)", str(error))
    return int(code[1]) if code and isinstance(error, SafetensorError) else None


def _asked_again(partial: Path) -> int | None:
    """What the system says of a few bytes more: torch has lost the reason why it could not write."""
    try:
        with partial.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as error:
        return error.errno
    return None


def refuse_overwriting(source: Path, target: Path) -> None:
    """Raise if writing `target` would destroy `source`."""
    same = os.path.realpath(source) == os.path.realpath(target)
    with contextlib.suppress(OSError):  # a folder that ignores case, or a second name of one file
        same = same or os.path.samefile(source, target)
    if same:
        raise FreqdoorError(f"{target}: this would overwrite the original; choose another place to write to")


def refuse_picture_name(path: Path | str) -> None:
    """Raise if a file that is no picture would get a picture's name, as of `compress *.png`."""
    ending = Path(path).suffix.lower()
    if ending in PICTURES or ending in OTHER_PICTURES:
        raise FreqdoorError(f"{path}: this is a picture's name, and what is to be written is none; choose another name")


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def check_writable(path: Path) -> None:
    """Raise now, not after hours of work, if `path` could not be written; what is there stays as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FreqdoorError(f"{path}: could not write ({error.strerror})") from None


def read_text(path: Path | str, what: str = "this text") -> str:
    """A text file of any system: UTF-8 or UTF-16 with or without a byte order mark, or Windows' Latin-1.

    Args:
        what: what the file is, for the sentence on a file that cannot be read.

    Raises:
        FreqdoorError: an unreadable file, or one that is no text.
    """
    if os.path.isfile(path) and (size := os.path.getsize(path)) > LONGEST_TEXT:
        raise FreqdoorError(
            f"{path}: could not read {what} (expected at most {size_text(LONGEST_TEXT)}, found {size_text(size)})"
        )
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FreqdoorError(f"{path}: could not read {what} ({reason})") from None
    wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))  # what Windows' own shell writes
    for encoding in ("utf-16",) if wide else ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            if "\0" not in text:
                return text
    raise FreqdoorError(f"{path}: could not read {what} (not a text: neither UTF-8 nor Latin-1)")


def with_slashes(name: str, folder: Path | str = ".") -> str:
    """A path as this system writes it: "a\\b.png" of another system is a/b.png, if nothing has just that name here.

    Args:
        folder: what the path is relative to.
    """
    if "\\" not in name or os.path.exists(os.path.join(folder, name)):
        return name
    return name.replace("\\", "/")


def name_and_file(text: str) -> tuple[str, str | None]:
    """("SPEC.toml", "FILE") of "SPEC.toml=FILE" or "NAME=FILE"; None for FILE where there is only a name.

    Files and folders may have an equals sign in their names, such as run=1: what exists as a whole is one name, and of
    several places to cut at the first one counts whose parts exist, at best both.
    """
    cuts = [(text[:i], text[i + 1 :]) for i, character in enumerate(text) if character == "="]
    if not cuts or os.path.exists(text):
        return text, None

    def likelihood(cut: tuple[str, str]) -> tuple[bool, int]:
        name, file = cut
        return name.endswith(".toml"), os.path.exists(name) + os.path.exists(file)

    name, file = max(cuts, key=likelihood)
    return name, file or None
