"""What is measured so far, picture by picture, so that a measurement that was stopped goes on where it was."""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError
from freqdoor.notes import Count, Note
from freqdoor.training.run import environment

SCHEMA = 1  # of a journal's lines
T = TypeVar("T")


class Journal:
    """A file with a line for every picture that is measured, in their order; the first says what is measured, of what.

    Whoever writes holds the folder (`lock.holding`). A line that a kill has cut off is dropped, and its picture
    measured again; a journal of something else is begun anew.

    Args:
        path: the file; the first picture makes it. None keeps nothing.
        identity: all that the results depend on, from `fingerprint`.
        note: told when results of something else are dropped, with how many pictures this one begins, and which one is
            measured.
    """

    def __init__(self, path: Path | None, identity: str = "", note: Note | None = None) -> None:
        self.path, self._identity, self._note = path, identity, note
        self._rows: list[Any] = []
        if path is not None and os.path.lexists(path):
            self._go_on(path)

    @property
    def known(self) -> int:
        """How many pictures are measured already."""
        return len(self._rows)

    def each(self, pictures: Sequence[T], measure: Callable[[T], Any]) -> Iterator[Any]:
        """What `measure` gives of every picture, as JSON has it; of those in the file what stands there."""
        known, total = len(self._rows), len(pictures)
        for index, picture in enumerate(pictures):
            if index < len(self._rows):
                yield self._rows[index]
                continue
            name = getattr(picture, "name", str(picture))
            if self._note:
                self._note(Count(name, index, total))
            line = json.dumps(measure(picture))
            self._append(line)
            self._rows.append(json.loads(line))
            yield self._rows[index]
        if self._note and known < total:
            self._note(Count(name, total, total))

    def remove(self) -> None:
        """Remove the file: its results are written elsewhere now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _go_on(self, path: Path) -> None:
        """Take the rows of the file, and drop what is damaged or of another identity."""
        try:
            self._rows, size = self._whole(path.read_bytes())
            if size:
                os.truncate(path, size)
            else:
                path.unlink()
        except OSError as error:
            raise FreqdoorError(f"{path}: could not go on from it ({error.strerror}); move it away") from None
        if self._note:
            known = f"{len(self._rows)} measured already, going on after them"
            what = known if size else "this was of another measurement; measuring anew"
            self._note(f"{path.name}: {what}")

    def _whole(self, content: bytes) -> tuple[list[Any], int]:
        """The rows of a file's content, and its length in bytes up to the last whole one; none of another identity."""
        rows: list[Any] = []
        size = 0
        for number, line in enumerate(content.splitlines(keepends=True)):
            text, _, digest = line.removesuffix(b"\n").rpartition(b"\t")
            if not line.endswith(b"\n") or digest != _digest(text) or (number == 0 and text != self._first()):
                break
            rows += [json.loads(text)] if number else []
            size += len(line)
        return rows, size

    def _first(self) -> bytes:
        return json.dumps({"journal": SCHEMA, "identity": self._identity}).encode()

    def _append(self, text: str) -> None:
        if self.path is None:
            return
        new = [text.encode()] if self._rows else [self._first(), text.encode()]
        content = b"".join(line + b"\t" + _digest(line) + b"\n" for line in new)
        try:
            with self.path.open("ab", buffering=0) as file:  # at once: nothing waits for the end of the process
                while content:
                    content = content[file.write(content) :]
        except OSError as error:
            raise FreqdoorError(
                f"{self.path}: could not write ({error.strerror}); the same command goes on from what is there"
            ) from None


def _digest(text: bytes) -> bytes:
    """What tells a whole line from a damaged one."""
    return hashlib.sha256(text).hexdigest()[:16].encode()


def fingerprint(planted: Planted, triggers: Sequence[str], *more: Any) -> str:
    """A hash of all that results depend on: encoders, triggers, this machine, its libraries, and what `more` says."""
    codec = planted.vanilla
    encoder = [codec.spec.name, codec.multiple, codec.module_hashes(), planted.tampered.module_hashes()]
    facts = [encoder, [trigger_facts(planted, name) for name in triggers], environment().model_dump(), *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def trigger_facts(planted: Planted, name: str) -> list[Any]:
    """All of a trigger that scores depend on."""
    trigger = planted.triggers[name]
    objective = planted.objective(name).model_dump()
    return [name, type(trigger).__name__, trigger.arguments, hash_state(trigger), objective]


def packed(x: Tensor) -> str:
    """A vector in float32 as text, every bit of it."""
    return base64.b64encode(x.float().cpu().numpy().astype("<f4").tobytes()).decode()


def unpacked(text: str) -> Tensor:
    """The vector that `packed` has written."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
