"""How freqdoor ends when something is not as it should be: a user's mistake, or a stop from outside."""

from types import TracebackType

STOPPED = "stopped; what takes minutes goes on when the same command is given again"


class FreqdoorError(Exception):
    """A mistake in what the user gave: the message says what was expected, what was found and what to do."""


class Mistakes:
    """FreqdoorErrors of several blocks, `with mistakes: ...`, that `stop` raises as one."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, FreqdoorError):
            self.found.append(str(error))
            return True
        return False

    def stop(self) -> None:
        """Raise if there are mistakes; one is raised with its own words, of several each has a line."""
        distinct = list(dict.fromkeys(self.found))
        if len(distinct) == 1:
            raise FreqdoorError(distinct[0])
        if distinct:
            lines = "\n".join(distinct).replace("\n", "\n  ")
            raise FreqdoorError(f"{len(distinct)} mistakes:\n  {lines}")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated like Ctrl-C: a training that is stopped saves its state."""


def stop_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a stop from outside, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 143 if isinstance(stop, Terminated) else 130
