"""A call in a process of its own: what it tells on the way, its result, and an end when its time is over."""

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from freqdoor.errors import FreqdoorError, defect, sentence_of
from freqdoor.limits import allowed_memory, max_memory

ENDING = 1.0  # second that a process has to end once it has nothing to do
GRACE = 60.0  # seconds that a planting has to save its state, as jobs elsewhere have
PRELOADED = ("freqdoor.web.requests", "freqdoor.demonstration")  # what every call needs, imported once
_context = get_context("forkserver")  # a process of the server itself would have the server's threads and connections


class StoppedWork(Exception):
    """Somebody has stopped the call; what it keeps goes on when it is made again."""


class Work:
    """One call of `function`, in a process of its own.

    Args:
        function: called with the arguments and with `tell`, which hands a value over to `told`.
        folder: where it works: names of files in its sentences are then those that a visitor knows.
        seconds: how long it may take; None for as long as it wants.
    """

    def __init__(
        self, function: Callable[..., Any], *arguments: Any, folder: Path, seconds: float | None = None
    ) -> None:
        self.result: Any = None
        self._over = False  # whether the call has ended by itself
        self._receiver, sender = _context.Pipe(duplex=False)
        self._seconds = seconds
        self._ends = None if seconds is None else time.monotonic() + seconds
        call = (sender, str(folder), allowed_memory(), function, arguments)
        self._process = _context.Process(target=_call, args=call, daemon=True)
        self._process.start()
        sender.close()  # the end of the process is the end of what can be received

    def told(self) -> Iterator[Any]:
        """What the call tells, until it has ended; then `result` is its result.

        Raises:
            FreqdoorError: the call's own, in its words; it took too long, or its process was killed.
            StoppedWork: `stop` was called.
        """
        try:
            while True:
                left = None if self._ends is None else max(0.0, self._ends - time.monotonic())
                if not self._receiver.poll(left):
                    raise FreqdoorError(
                        f"this took longer than the {self._seconds:.0f} seconds that a request may take here; give "
                        "less, or use the command line"
                    )
                kind, value = self._receiver.recv()
                self._over = kind != "told"
                if not self._over:
                    yield value
                elif kind == "failed":
                    raise FreqdoorError(value)
                elif kind == "stopped":
                    raise StoppedWork
                else:
                    self.result = value
                    return
        except EOFError:
            raise FreqdoorError(
                "the process that worked on this was ended by the system, which may be short of memory; give less"
            ) from None
        finally:
            self.end()

    def stop(self) -> None:
        """Let the call end as by Ctrl-C: a planting saves its state first."""
        self._process.terminate()

    def end(self) -> None:
        """End the process, if need be by force."""
        if self._over:
            self._process.join(ENDING)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(ENDING)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._receiver.close()


def get_ready() -> None:
    """Import what calls need in the process that they are copies of, so that the first one does not wait for it."""
    _context.set_forkserver_preload(list(PRELOADED))
    forkserver.ensure_running()


def _call(sender: Connection, folder: str, memory: int, function: Callable[..., Any], arguments: Any) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's, which ends its calls itself
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        os.chdir(folder)
        warnings.showwarning = lambda message, *_, **__: sender.send(("told", f"note: {message}"))
        with max_memory(memory):
            result = function(*arguments, tell=lambda value: sender.send(("told", value)))
        sender.send(("done", result))
    except KeyboardInterrupt:
        sender.send(("stopped", None))
    except Exception as error:
        sender.send(("failed", sentence_of(error) or defect(error)))
