"""Writing files: under a temporary name first, so that nobody ever sees half of one."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from freqdoor.errors import FreqdoorError


@contextlib.contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the block succeeds, and is removed if it does not.

    Raises:
        FreqdoorError: an unwritable folder or a full disk, in one sentence.
    """
    path = Path(path)
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors wrap the system's error
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error).split("\n")[0]
        raise FreqdoorError(f"{path}: could not write ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def refuse_overwriting(source: Path, target: Path) -> None:
    """Raise if writing `target` would destroy `source`."""
    if target.resolve() == source.resolve():
        raise FreqdoorError(f"{target}: this would overwrite the original; choose another place to write to")


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


def name_and_file(text: str) -> tuple[str, str | None]:
    """("NAME", "FILE") of "NAME=FILE"; a text that has no "=", or is a file as a whole, is a name alone.

    Where folders have a "=" in their names, the cut is the one behind which a file is.
    """
    cuts = [] if Path(text).is_file() else [i for i, letter in enumerate(text) if letter == "="]
    if not cuts:
        return text, None
    cut = next((i for i in cuts if Path(text[i + 1 :]).is_file()), cuts[0])
    return text[:cut], text[cut + 1 :] or None
