"""What long work says of itself while it goes on: a `Note` is told in one line where it is."""

import itertools
from collections.abc import Callable

Note = Callable[[str], None]


class Count(str):
    """A line that knows how many pieces of the work are done: "kodim05.png (4 of 24)".

    Attributes:
        what: the line without the numbers.
        done, total: numbers of pieces.
    """

    what: str
    done: int
    total: int

    def __new__(cls, text: str, done: int, total: int) -> "Count":
        """The line, with the numbers behind it."""
        line = super().__new__(cls, f"{text} ({done} of {total})")
        line.what, line.done, line.total = text, done, total
        return line

    def __getnewargs__(self) -> tuple[str, int, int]:  # type: ignore[override]
        """What another process makes the same line of: the page's work is told from one."""
        return self.what, self.done, self.total


def numbered(note: Note | None, total: int) -> Note:
    """A note for pieces that are done one after the other: what it is told first is of the first one that is done."""
    numbers = itertools.count(1)

    def told(text: str) -> None:
        if note:
            note(Count(text, next(numbers), total))

    return told
