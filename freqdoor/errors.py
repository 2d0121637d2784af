"""How freqdoor ends when something is not as it should be: a user's mistake, or a stop from outside."""

import errno
from types import TracebackType

KEPT = "what takes minutes goes on when the same command is given again"
STOPPED = f"stopped; {KEPT}"


class FreqdoorError(Exception):
    """A mistake in what the user gave: the message says what was expected, what was found and what to do."""


class SeveralMistakes(FreqdoorError):
    """Mistakes that were found in one round, a line for each."""

    def __init__(self, found: list[str]) -> None:
        lines = "\n".join(found).replace("\n", "\n  ")
        super().__init__(f"{len(found)} mistakes:\n  {lines}")
        self.found = found


class Mistakes:
    """FreqdoorErrors of several blocks, `with mistakes: ...`, that `stop` raises as one.

    Attributes:
        found: what they say.
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, FreqdoorError):
            return False
        found = error.found if isinstance(error, SeveralMistakes) else [str(error)]
        self.found += [sentence for sentence in found if sentence not in self.found]
        return True

    def stop(self) -> None:
        """Raise if there are mistakes; a single one with its own words."""
        if self.found:
            raise FreqdoorError(self.found[0]) if len(self.found) == 1 else SeveralMistakes(self.found)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated like Ctrl-C: a training that is stopped saves its state."""


def stop_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a stop from outside, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 143 if isinstance(stop, Terminated) else 130


def sentence_of(error: Exception) -> str | None:
    """What a user is told of an expected error; None for one that should not occur."""
    if isinstance(error, FreqdoorError):
        return str(error)
    if isinstance(error, OSError):
        return f"could not read or write: {'no space left on the disk' if error.errno == errno.ENOSPC else error}"
    # torch has a type of its own for a GPU that is out of memory, and none for a CPU
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "out of memory; use smaller images, crops or batches"
    return None


def defect(error: Exception) -> str:
    """What a user is told of an error that should not occur."""
    return f"{type(error).__name__}: {error}; this is a defect of freqdoor, please report it"
