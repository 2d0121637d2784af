"""The command line: every verb is a typed function, and contains no knowledge of its own."""

import errno
import sys
import warnings

import torch

from freqdoor.cli import attack, codec, downstream, research, watermark
from freqdoor.cli.options import app, errors
from freqdoor.errors import FreqdoorError

__all__ = ["app", "attack", "codec", "downstream", "main", "research", "watermark"]


def main() -> None:
    """Run a command; every expected failure ends in one sentence and exit code 2."""
    torch.set_flush_denormal(True)  # denormal numbers slow late training down
    warnings.showwarning = _show_warning
    try:
        app()
    except FreqdoorError as error:
        _fail(str(error))
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else str(error)
        _fail(f"could not read or write: {reason}")
    except (MemoryError, torch.OutOfMemoryError):
        _fail("out of memory; use smaller images, crops or batches")
    except RuntimeError as error:  # torch has no type of its own for a CPU that is out of memory
        if "allocate memory" not in str(error):
            raise
        _fail("out of memory; use smaller images, crops or batches")


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    errors.print(f"note: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _fail(message: str) -> None:
    errors.print(f"freqdoor: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)
