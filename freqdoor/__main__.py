"""The entry of `freqdoor` and `python -m freqdoor`: it loads next to nothing, so that Ctrl-C counts from the start."""

import signal
import sys
from types import FrameType

from freqdoor.errors import STOPPED, Terminated, stop_code


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise Terminated


def main() -> None:
    """Run a command; a stop from outside ends in one sentence, at any moment."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from freqdoor.cli import main as run

        run()
    except KeyboardInterrupt as stop:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would cut the sentence
        sys.stderr.write(f"freqdoor: {STOPPED}\n")
        sys.exit(stop_code(stop))


if __name__ == "__main__":
    main()
