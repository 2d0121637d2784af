"""What a verb says while it works and at its end, to a person at a terminal and to a log."""

import json
import sys
import threading
import time
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from freqdoor.files import mark
from freqdoor.notes import Count

MINUTE = 60.0  # seconds
Show = Callable[[int, dict[str, float]], None]  # a step's number and its measured values
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode's control, format (also of direction), surrogate, line separators


def harmless(text: str) -> str:
    r"""Text that only shows what it says: control and bidi characters as \x1b, \u202e and the like.

    They come from file names, headers of a stranger's file and what a user's code raises, and could recolour, retitle
    or overwrite what a terminal shows. A line break stays where two spaces follow: our own messages indent their lists.
    """
    if text.isascii() and text.isprintable():
        return text
    parts = text.split("\n  ")
    return "\n  ".join("".join(_visible(character) for character in part) for part in parts)


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in HIDDEN
    return character.encode("unicode_escape").decode("ascii") if hidden else character


class _HarmlessConsole(Console):
    """A console through which every string goes as `harmless` has it, those in tables too, and no markup counts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """The text as rich shows it."""
        return super().render_str(harmless(text), **options)


class Failure(BaseModel):
    """What a verb answers with --json where it could not do its work."""

    model_config = ConfigDict(frozen=True)

    error: str  # the sentence that the standard error has too
    exit_code: int


console = _HarmlessConsole()
errors = _HarmlessConsole(stderr=True)


class _Bars:
    """The bars that are shown at a terminal, one below the other: one display at a time has the screen."""

    def __init__(self) -> None:
        self._display: Progress | None = None

    def add(self, what: str, total: int, done: int = 0) -> TaskID:
        """Show one more."""
        if self._display is None:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}", markup=False),
            )
            self._display = Progress(
                *columns, console=errors, disable=not errors.is_terminal, speed_estimate_period=60 * MINUTE
            )
            self._display.start()
        return self._display.add_task(harmless(what), total=total, completed=done, values="")

    def update(self, bar: TaskID, **values: Any) -> None:
        """Change a bar."""
        if self._display and bar in self._display.task_ids:
            self._display.update(bar, **values)

    def end(self, bar: TaskID) -> None:
        """Take a bar away; the last one stays on the screen."""
        if self._display and len(self._display.task_ids) > 1:
            self._display.remove_task(bar)
        else:
            self.leave()

    def leave(self) -> None:
        """Leave the bars on the screen as they are."""
        if self._display:
            self._display.stop()
        self._display = None


class _Counting(NamedTuple):
    """Pieces that are being counted: how many, how many were done when it began, when that was, and the bar."""

    total: int
    first: int
    since: float
    bar: TaskID


class _Place:
    """Where a verb is."""

    def __init__(self) -> None:
        self.text = ""
        self.counting: _Counting | None = None
        self.done = 0

    def count(self, line: Count) -> None:
        """Take note of how many pieces are done; other pieces than before get a bar of their own."""
        if self.counting is None or self.counting.total != line.total or line.done < self.done:
            self.stop_counting()
            bar = _bars.add(line.what, line.total, line.done)
            self.counting = _Counting(line.total, line.done, time.monotonic(), bar)
        self.done = line.done
        _bars.update(self.counting.bar, completed=line.done, description=harmless(line.what))
        if line.done == line.total:
            self.stop_counting()

    def stop_counting(self) -> None:
        """Nothing is counted any more."""
        if self.counting:
            _bars.end(self.counting.bar)
        self.counting = None

    def said(self) -> str:
        """Where the verb is, and how long the rest takes if it goes on as so far."""
        counting = self.counting
        if counting is None:
            return self.text
        where = self.text if isinstance(self.text, Count) else Count(self.text, self.done, counting.total)
        if self.done == counting.first:
            return where
        each = (time.monotonic() - counting.since) / (self.done - counting.first)
        return f"{where}, about {max(1, round((counting.total - self.done) * each / MINUTE))} min left"


_bars, _place = _Bars(), _Place()


def show_every_name() -> None:
    """Let the standard output take names that its encoding does not have, as \\udcff, instead of an exception."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print a line to the standard output; a name with a line break in it stays in its line."""
    _clear()
    console.print(line.replace("\n", "\\n"), soft_wrap=True)


def say_table(table: Table) -> None:
    """Print a table to the standard output."""
    _clear()
    console.print(table)


def _clear() -> None:
    """Leave the screen to what comes next."""
    _place.stop_counting()
    _bars.leave()


def say_page(text: str) -> None:
    """Print a page of results to the standard output."""
    for line in text.removesuffix("\n").split("\n"):
        say(line)


def answer(content: object, verb: str) -> None:
    """Print what a verb answers as one JSON object in one line; null stands for numbers that are not finite."""
    plain = TypeAdapter(type(content)).dump_python(content, mode="json")
    finite = json.loads(json.dumps(plain), parse_constant=lambda _: None)
    sys.stdout.write(json.dumps({"made_by": mark(verb), **finite}) + "\n")


def note(text: str) -> None:
    """Tell a person at a terminal what is being done; a log is told once a minute (`every_minute`).

    A `Count` makes a bar, beside which stands what follows, as long as not all pieces are done.
    """
    _place.text = text
    if isinstance(text, Count):
        _place.count(text)
    elif _place.counting:
        _bars.update(_place.counting.bar, description=harmless(text))
    elif errors.is_terminal:
        errors.print(text, style="dim")


def warn(message: Warning | str, *_: object, **__: object) -> None:
    """Show a warning as one line: takes the place of `warnings.showwarning`."""
    errors.print(f"note: {message}", style="yellow", soft_wrap=True)


def fail(message: str) -> NoReturn:
    """End with one sentence and exit code 2."""
    errors.print(f"freqdoor: {message}", style="red", soft_wrap=True)
    raise SystemExit(2)


def show_trace(error: BaseException) -> None:
    """The whole trace of an error, for who asks with --debug and for a defect of our own."""
    for line in "".join(traceback.format_exception(error)).rstrip().split("\n"):
        errors.print(line, soft_wrap=True)


def stopped(kept: str) -> None:
    """Say that a stop from outside was heard, where it was, and what is kept."""
    where = f" with {_place.done} of {_place.counting.total} done" if _place.counting else ""
    _clear()
    errors.print(f"freqdoor: stopped{where}; {kept}", soft_wrap=True)


@contextmanager
def every_minute(verb: str) -> Iterator[None]:
    """Say every minute where the verb is, where no terminal shows it."""
    _place.text = "starting"
    if errors.is_terminal:
        try:
            yield
        finally:
            _clear()
        return
    started, over = time.monotonic(), threading.Event()

    def beat() -> None:
        while not over.wait(MINUTE):
            minutes = (time.monotonic() - started) / MINUTE
            line = f"{verb}, minute {minutes:.0f}: {_place.said()}"
            errors.print(line, soft_wrap=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _clear()


@contextmanager
def live(steps: int, what: str) -> Iterator[Show]:
    """A progress bar with the newest measured values; without a terminal they are what is said every minute."""
    bar = _bars.add(what, steps)

    def show(step: int, row: dict[str, float]) -> None:
        values = _values(row)
        _place.text = f"{what}, step {step} of {steps}, {values}"
        _bars.update(bar, completed=step, values=values)

    try:
        yield show
    finally:
        _bars.end(bar)


def _values(row: dict[str, float]) -> str:
    if "bpp_poisoned" not in row:
        return f"loss {row['loss']:.3f}"
    return (
        f"clean {row['psnr_db_clean']:.2f} dB {row['bpp_clean']:.3f} bpp, "
        f"poisoned {row['psnr_db_poisoned']:.2f} dB {row['bpp_poisoned']:.3f} bpp, eps {row['eps']:.4f}"
    )
