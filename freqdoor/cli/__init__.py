"""The command line: every verb is a thin shell around the Python function of the same name."""

import sys
import warnings
from contextlib import nullcontext

from freqdoor.cli import attack, codec, defence, downstream, research, watermark, web
from freqdoor.cli.options import app
from freqdoor.cli.terminal import fail, show_every_name, show_trace, warn
from freqdoor.errors import defect, sentence_of
from freqdoor.limits import max_memory

__all__ = ["app", "attack", "codec", "defence", "downstream", "main", "research", "watermark", "web"]

MEMORY = "--max-memory"


def main() -> None:
    """Run a command; every expected failure ends in one sentence and exit code 2."""
    show_every_name()
    warnings.showwarning = warn
    debug = "--debug" in sys.argv
    try:
        words, size = _without_memory([word for word in sys.argv[1:] if word != "--debug"])
        with nullcontext() if size is None else max_memory(size):
            app(args=words)
    except Exception as error:
        sentence = sentence_of(error)
        if debug or sentence is None:
            show_trace(error)
        fail(sentence or defect(error))


def _without_memory(words: list[str]) -> tuple[list[str], str | None]:
    """The command without --max-memory SIZE, which may stand anywhere before a lone --, and the last such size."""
    end = words.index("--") if "--" in words else len(words)
    rest, size = [], None
    before = iter(words[:end])
    for word in before:
        option, equals, value = word.partition("=")
        if option == MEMORY:
            size = value if equals else next(before, "")
        else:
            rest.append(word)
    return rest + words[end:], size
