"""The command line: every verb is a thin shell around the Python function of the same name."""

import errno
import sys
import traceback
import warnings

from freqdoor.cli import attack, codec, defence, downstream, research, watermark
from freqdoor.cli.options import app
from freqdoor.cli.terminal import fail, warn
from freqdoor.errors import FreqdoorError

__all__ = ["app", "attack", "codec", "defence", "downstream", "main", "research", "watermark"]


def main() -> None:
    """Run a command; every expected failure ends in one sentence and exit code 2."""
    warnings.showwarning = warn
    debug = "--debug" in sys.argv
    try:
        app(args=[word for word in sys.argv[1:] if word != "--debug"])
    except (FreqdoorError, OSError, MemoryError, RuntimeError) as error:
        sentence = _sentence(error)
        if debug or sentence is None:
            traceback.print_exception(error)
        fail(sentence or f"{type(error).__name__}: {error}; this is a defect of freqdoor, please report it")


def _sentence(error: Exception) -> str | None:
    """What a user is told of an expected error; None for one that should not occur."""
    if isinstance(error, FreqdoorError):
        return str(error)
    if isinstance(error, OSError):
        return f"could not read or write: {'no space left on the disk' if error.errno == errno.ENOSPC else error}"
    # torch has a type of its own for a GPU that is out of memory, and none for a CPU
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory; use smaller images, crops or batches"
    return None
