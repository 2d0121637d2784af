"""The entry of `freqdoor` and `python -m freqdoor`: it loads next to nothing, so that Ctrl-C counts from the start."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

from freqdoor.errors import STOPPED, Terminated, stop_code

PACKAGE = os.path.dirname(os.path.abspath(__file__))
SHELL = (os.path.join(PACKAGE, "cli", ""), os.path.abspath(__file__))  # where nothing is open that would have to close
SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides


def _stop(signal_number: int, frame: FrameType | None) -> None:
    """Raise what ends the work that is under way; end the process at once where there is none yet."""
    stop = Terminated() if signal_number == signal.SIGTERM else KeyboardInterrupt()
    if frame is None or _at_work(frame):
        raise stop
    _leave(stop)


def _at_work(frame: FrameType | None) -> bool:
    """Whether the package's own code is running, and nothing is imported: libraries swallow exceptions meanwhile."""
    working = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            return False
        working = working or (name.startswith(PACKAGE + os.sep) and not name.startswith(SHELL))
        frame = frame.f_back
    return working


def _leave(stop: KeyboardInterrupt) -> NoReturn:
    """End the process with one sentence, whatever is on the stack."""
    if lock := sys.modules.get("freqdoor.lock"):
        lock.let_go()
    os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + f"freqdoor: {STOPPED}\n".encode())
    os._exit(stop_code(stop))


def _stop_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """A stop that arrived where nothing can be raised, as in a destructor, arrives once more a moment later."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = signal.SIGTERM if isinstance(unraisable.exc_value, Terminated) else signal.SIGINT
    threading.Timer(0.01, signal.pthread_kill, (threading.main_thread().ident, number)).start()


def main() -> None:
    """Run a command; a stop from outside ends in one sentence, at any moment."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _stop)
    sys.unraisablehook = _stop_again
    try:
        from freqdoor.cli import main as run

        run()
    except KeyboardInterrupt as stop:
        _leave(stop)
    finally:  # what there was to do is done, and said: a stop while Python ends would only hide it
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
