"""The command line: every verb is a thin shell around the Python function of the same name."""

import sys
import warnings
from contextlib import nullcontext

from freqdoor.cli import attack, codec, defence, downstream, listing, research, watermark, web
from freqdoor.cli.options import app
from freqdoor.cli.terminal import Failure, answer, fail, harmless, show_every_name, show_trace, warn
from freqdoor.errors import defect, sentence_of
from freqdoor.limits import max_memory

__all__ = ["app", "attack", "codec", "defence", "downstream", "listing", "main", "research", "watermark", "web"]

MEMORY = "--max-memory"


def main() -> None:
    """Run a command; every expected failure ends in one sentence and exit code 2, with --json in a JSON object too."""
    show_every_name()
    warnings.showwarning = warn
    debug = "--debug" in sys.argv
    as_json, verb = False, ""
    try:
        words, size = _without_memory([word for word in sys.argv[1:] if word != "--debug"])
        as_json, verb = _asked_for_json(words)
        with nullcontext() if size is None else max_memory(size):
            sys.exit(app(args=words, standalone_mode=not as_json))
    except Exception as error:
        sentence = sentence_of(error)
        if as_json and hasattr(error, "format_message"):  # typer has no public name for its errors of a command line
            sentence = str(error.format_message())
        if debug or sentence is None:
            show_trace(error)
        sentence = sentence or defect(error)
        if as_json:
            answer(Failure(error=harmless(sentence), exit_code=2), verb)
        fail(sentence)


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


def _asked_for_json(words: list[str]) -> tuple[bool, str]:
    """Whether --json stands before a lone --, and the verb that it stands behind."""
    end = words.index("--") if "--" in words else len(words)
    verbs = (word for word in words if not word.startswith("-"))
    return "--json" in words[:end], next(verbs, "")
