"""What a verb says while it works and at its end, to a person at a terminal and to a log."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MINUTE = 60.0  # seconds
Show = Callable[[int, dict[str, float]], None]  # a step's number and its measured values
console = Console()
errors = Console(stderr=True)
_place = {"text": ""}  # where the verb is


def say(text: str) -> None:
    """Print a line to the standard output."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Tell a person at a terminal what is being done; a log is told once a minute (`every_minute`)."""
    _place["text"] = text
    if errors.is_terminal:
        errors.print(text, style="dim", highlight=False, markup=False)


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning as one line: takes the place of `warnings.showwarning`."""
    errors.print(f"note: {message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End with one sentence and exit code 2."""
    errors.print(f"freqdoor: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    raise SystemExit(2)


@contextmanager
def every_minute(verb: str) -> Iterator[None]:
    """Say every minute where the verb is, where no terminal shows it."""
    _place["text"] = "starting"
    if errors.is_terminal:
        yield
        return
    started, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(MINUTE):
            minutes = (time.monotonic() - started) / MINUTE
            line = f"{verb}, minute {minutes:.0f}: {_place['text']}"
            errors.print(line, highlight=False, markup=False, soft_wrap=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def live(steps: int, what: str) -> Iterator[Show]:
    """A progress bar with the newest measured values; without a terminal they are what is said every minute."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=steps, values="")

        def show(step: int, row: dict[str, float]) -> None:
            values = _values(row)
            _place["text"] = f"{what}, step {step} of {steps}, {values}"
            bar.update(task, completed=step, values=values)

        yield show


def _values(row: dict[str, float]) -> str:
    if "bpp_poisoned" not in row:
        return f"loss {row['loss']:.3f}"
    return (
        f"clean {row['psnr_db_clean']:.2f} dB {row['bpp_clean']:.3f} bpp, "
        f"poisoned {row['psnr_db_poisoned']:.2f} dB {row['bpp_poisoned']:.3f} bpp, eps {row['eps']:.4f}"
    )
