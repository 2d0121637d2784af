"""How freqdoor ends when something is not as it should be: a user's mistake, or a stop from outside."""

STOPPED = "stopped; what takes minutes goes on when the same command is given again"


class FreqdoorError(Exception):
    """A mistake in what the user gave: the message says what was expected, what was found and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is treated like Ctrl-C: a training that is stopped saves its state."""


def stop_code(stop: KeyboardInterrupt) -> int:
    """The exit code of a stop from outside, as shells have it: 130 for Ctrl-C, 143 for SIGTERM."""
    return 143 if isinstance(stop, Terminated) else 130
