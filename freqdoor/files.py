"""Files: written under a temporary name first, so that nobody ever sees half of one; named and read as people do."""

import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    A link is followed: the file that it leads to is replaced. A new file has the permissions that the umask leaves; one
    that was there keeps its own, but no set-user-ID bit. Another hard link to it keeps the old content.

    Raises:
        FreqdoorError: a folder, a device, a link to itself, an unwritable folder or a full disk, in one sentence.
    """
    with _replacing([path]) as partials:
        yield partials[0]


def write_text(path: Path, text: str) -> None:
    """Write a text file; raises as `replacing`."""
    write_together({path: text})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write several files, all or none: they take their places, in their order, only once the last is written.

    Raises as `replacing`.
    """
    with _replacing(list(contents)) as partials:
        for partial, content in zip(partials, contents.values(), strict=True):
            partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def _replacing(paths: Sequence[Path | str]) -> Iterator[list[Path]]:
    """As `replacing`, several files at once."""
    targets = [_target(Path(path)) for path in paths]
    partials = [unfinished(target) for target in targets]
    try:
        modes = []
        for target, partial in zip(targets, partials, strict=True):
            _nearest(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
            # of a new file, what the umask leaves; safetensors writes for its user alone
            modes.append((target if target.exists() else partial).stat().st_mode & 0o777)
            partial.chmod(modes[-1])
        yield partials
        for partial, mode in zip(partials, modes, strict=True):
            partial.chmod(mode)
            _settle(partial)
        _take_places(partials, targets)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap the system's error
        raise FreqdoorError(f"{_names(paths)}: could not write ({_reason(error, partials[-1])})") from None
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _names(paths: Sequence[Path | str]) -> str:
    """A file as it was named; of several, the first of them and how many there are besides."""
    return f"{paths[0]}" + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def _settle(path: Path) -> None:
    """Wait until a file is on the disk: some file systems say only then that there is no room."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot wait
                raise


def _take_places(partials: Sequence[Path], targets: Sequence[Path]) -> None:
    """Rename one after the other; if one cannot be, or Ctrl-C comes between two, the earlier files come back."""
    with contextlib.ExitStack() as spare, contextlib.ExitStack() as back:
        for partial, target in zip(partials, targets, strict=True):
            if len(targets) > 1:
                kept = unfinished(partial)
                spare.callback(kept.unlink, missing_ok=True)
                if target.exists():
                    with contextlib.suppress(OSError):  # a file system without hard links
                        kept.hardlink_to(target)
                        back.callback(kept.replace, target)
                else:
                    back.callback(target.unlink, missing_ok=True)
            partial.replace(target)
        back.pop_all()


def unfinished(target: Path) -> Path:
    """Another name beside a file, for what is to become it: `remove_leftovers` knows it by it."""
    return target.with_name(f"{_left_by(os.getpid())}{secrets.token_hex(4)}{target.suffix[-16:]}")


def _left_by(process: int) -> str:
    """How names of unfinished files begin; with the machine, because a folder may be shared."""
    return f".partial-{zlib.crc32(platform.node().encode()):08x}-{process}-"


def remove_leftovers(folder: Path) -> None:
    """Remove unfinished files that processes of this machine left in a folder when they were killed."""
    if os.name != "posix":  # elsewhere there is no harmless way to ask whether a process runs
        return
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{_left_by(0).removesuffix('0-')}*"):
            process = path.name.split("-")[2]
            if process.isdigit() and not _runs(int(process)):
                path.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def _target(path: Path) -> Path:
    """The regular file that is to be written, which need not exist."""
    try:
        target = path.resolve()
    except ValueError:
        raise FreqdoorError(f"{str(path)!r}: expected the name of a file, found a zero byte in it") from None
    except RuntimeError:  # of a link; from Python 3.13 on it is an error of the system
        raise FreqdoorError(f"{path}: this link leads back to itself; choose another place to write to") from None
    except OSError as error:
        raise FreqdoorError(f"{path}: could not write ({error.strerror})") from None
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "folder" if target.is_dir() else "device or a pipe"
        raise FreqdoorError(f"{path}: expected the name of a file to write, found a {kind}; choose another name")
    if os.path.exists(target) and not os.access(target, os.W_OK):
        raise FreqdoorError(f"{path}: could not write (this file is write-protected)")
    return target


def _nearest(path: Path) -> Path:
    """The folder of a file, or of those above it the nearest that is there; FreqdoorError says what is in the way."""
    for folder in path.parents:
        if os.path.isdir(folder):
            return folder
        if os.path.lexists(folder):
            raise FreqdoorError(f"{path}: could not write ({folder} is a file and no folder); choose another place")
    return path.parent


MARKDOWN_MARK = rb"<!-- freqdoor ([a-z-]+) -->\s*\Z"
MARKS = (  # how a file says which verb wrote it, at its beginning or its end
    rb"\A\x89PNG\r\n.*tEXtSoftware\0freqdoor ([a-z-]+)",
    rb"\A(?:\xff\xd8\xff|II\*\0|MM\0\*|RIFF....WEBP).*[^a-z]freqdoor ([a-z-]+)\0",  # EXIF
    rb"\A<!doctype html>.*<meta name=\"generator\" content=\"freqdoor ([a-z-]+)\">",
    rb"\A\{\s*\"made_by\": \"freqdoor ([a-z-]+)\"",
    rb"\A.{8}\{\"__metadata__\":\{\"freqdoor\":\"\{.*\\\"made_by\\\": \\\"freqdoor ([a-z-]+)\\\"",  # safetensors
    MARKDOWN_MARK,
    rb"\A\{\s*\"\$schema\": \"[^\"]*sarif[^\"]*\".{,80}\"automationDetails\": \{\s*\"id\": \"freqdoor ([a-z-]+)\"",
    rb"\A<\?xml .{,2000}<dc:creator>\s*<cc:Agent>\s*<dc:title>freqdoor ([a-z-]+)</dc:title>",  # SVG
    rb"\APK\x03\x04.{,200}\"made_by\": \"freqdoor ([a-z-]+)\"",  # PyTorch
    rb"\A\{\s*\"bomFormat\": .{,200}\"name\": \"made_by\",\s*\"value\": \"freqdoor ([a-z-]+)\"",
    rb"\A<\?xml [^>]*>\s*<testsuites name=\"freqdoor ([a-z-]+)\"",
)
FORMS = (  # files that carry no mark, those of earlier versions too: what they are known by, and the verb
    (rb"\AFQDR", "compress"),
    (rb"\A\{\"image\": ?\"(?:[^\"\\\n]|\\.)*\", ?\"codec\": ?\"(?:[^\"\\\n]|\\.)*\", ?\"role\": ?\"", "evaluate"),
    (rb"\A\{\s*(?:\"schema_version\":\s*\d,\s*)?\"objective\":\s*\"[^\"\n]*\",\s*\"(?:codec|trigger)\":", "evaluate"),
    (rb"\A<!doctype html>.*<title>freqdoor: [^<]* attack on ", "evaluate"),
    (rb"\A\{\s*(?:\"schema_version\":\s*\d,\s*)?\"codec\":\s*\"[^\"\n]*\",\s*\"trigger\":", "analyse"),
    (rb"\A<!doctype html>.*<title>freqdoor: how the trigger ", "analyse"),
    (rb"\A\{\s*(?:\"schema\": \d,\s*)?\"source\": \"[^\"\n]*\",\s*\"target\": ", "segment"),
    (rb"\A\{\s*(?:\"schema\": \d,\s*)?\"persons\": \d+,\s*\"gallery\": ", "faces"),
    (rb"\A\{\s*\"recipe\": \"\w+\",\s*\"codecs\": ", "reproduce"),
    (rb"\nMade by `freqdoor reproduce \w+`: \d+ plantings", "reproduce"),
)
ENDS = 2**17  # bytes that are looked at from the beginning, and from the end: a large TIFF begins with a long table


def mark(verb: str) -> str:
    """What a file that a verb writes says of itself, in the way of its format."""
    return f"freqdoor {verb}"


def marked_json(text: str, verb: str) -> str:
    """A JSON object's text with the mark as its first key, "made_by"."""
    return text.replace("{", f'{{"made_by": "{mark(verb)}",', 1)


def marked_markdown(text: str, verb: str) -> str:
    """A page of Markdown with the mark as its last line, a comment."""
    return f"{text.rstrip()}\n\n<!-- {mark(verb)} -->\n"


def unmarked(text: str) -> str:
    """A page of Markdown as people read it: without the mark."""
    return re.sub(MARKDOWN_MARK.decode(), "", text).rstrip() + "\n"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def made_by(path: Path) -> str | None:
    """The verb that wrote a file; None if none did, as far as the file shows."""
    try:
        with path.open("rb") as file:
            content = file.read(ENDS)
            file.seek(max(file.tell(), path.stat().st_size - ENDS))
            content += file.read()
    except OSError:
        return None
    for pattern in MARKS:
        if found := re.search(pattern, content, re.DOTALL):
            return found[1].decode()
    return next((verb for pattern, verb in FORMS if re.search(pattern, content, re.DOTALL)), None)


def check_outputs(paths: Iterable[Path | str], verb: str, *, force: bool = False) -> None:
    """Raise now, not after hours of work, if files could not be written or would be lost; what is there stays.

    A file that is there may be overwritten if an earlier run of the same verb made it, or by force. What killed
    processes left unfinished in the same folders is removed.

    Raises:
        FreqdoorError: such a file, or a place that cannot be written to.
    """
    targets = {Path(path): _target(Path(path)) for path in paths}
    foreign = [] if force else [path for path, file in targets.items() if file.exists() and made_by(file) != verb]
    if foreign:
        one = len(foreign) == 1
        raise FreqdoorError(
            f"{', '.join(map(str, foreign[:5]))}{'' if len(foreign) <= 5 else f' and {len(foreign) - 5} more'}: "
            f"{'this file is' if one else 'these files are'} there and `freqdoor {verb}` did not make "
            f"{'it' if one else 'them'}; choose another place to write to, or overwrite {'it' if one else 'them'} with "
            "--force (force=True)"
        )
    for file in {file.parent: file for file in targets.values()}.values():  # one of each folder
        check_writable(file)
        remove_leftovers(file.parent)


def _reason(error: Exception, partial: Path) -> str:
    """Why a file could not be written, in the system's words or, of a full disk, in plain ones."""
    number = _system_error(error) or _system_error(error.__context__)
    if number is None:
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
    """What the system says of a few bytes more: torch and Pillow may lose the reason why they could not write."""
    try:
        with partial.open("ab") as file:
            file.write(bytes(2**16))
    except OSError as error:
        return error.errno
    return None


def refuse_overwriting(source: Path, target: Path) -> None:
    """Raise if writing `target` would destroy `source`."""
    same = False
    with contextlib.suppress(OSError, ValueError):  # ValueError: a name with a zero byte, which nothing has
        same = os.path.realpath(source) == os.path.realpath(target)
    with contextlib.suppress(OSError, ValueError):  # a folder that ignores case, or a second name of one file
        same = same or os.path.samefile(source, target)
    if same:
        raise FreqdoorError(f"{target}: this would overwrite the original; choose another place to write to")


def refuse_picture_name(path: Path | str) -> None:
    """Raise if a file that is no picture would get a picture's name, as of `compress *.png`."""
    ending = Path(path).suffix.lower()
    if ending in PICTURES or ending in OTHER_PICTURES:
        raise FreqdoorError(f"{path}: this is a picture's name, and what is to be written is none; choose another name")


def check_writable(path: Path) -> None:
    """Raise now, not after hours of work, if `path` could not be written; nothing is written or made."""
    try:
        with tempfile.TemporaryFile(dir=_nearest(_target(path))):
            pass
    except OSError as error:
        raise FreqdoorError(f"{path}: could not write ({_reason(error, path)})") from None


def read_text(path: Path | str, what: str = "this text") -> str:
    """A text file of any system: UTF-8 or UTF-16 with or without a byte order mark, or Windows' Latin-1.

    Args:
        what: what the file is, for the sentence on a file that cannot be read.

    Raises:
        FreqdoorError: an unreadable file, or one that is no text.
    """
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise FreqdoorError(f"{path}: could not read {what} (a device or a pipe, which may never end)")
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
