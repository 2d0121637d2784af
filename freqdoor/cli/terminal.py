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
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from freqdoor.files import mark

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
_place = {"text": ""}  # where the verb is


def show_every_name() -> None:
    """Let the standard output take names that its encoding does not have, as \\udcff, instead of an exception."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(line: str) -> None:
    """Print a line to the standard output; a name with a line break in it stays in its line."""
    console.print(line.replace("\n", "\\n"), soft_wrap=True)


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
    """Tell a person at a terminal what is being done; a log is told once a minute (`every_minute`)."""
    _place["text"] = text
    if errors.is_terminal:
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


def stopped(sentence: str) -> None:
    """Say that a stop from outside was heard."""
    errors.print(f"freqdoor: {sentence}", soft_wrap=True)


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
            errors.print(line, soft_wrap=True)

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
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}", markup=False),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        task = bar.add_task(harmless(what), total=steps, values="")

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
