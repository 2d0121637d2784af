"""The run directory: what is written while training, and how a run is found and continued."""

import contextlib
import hashlib
import json
import math
import os
import platform
import subprocess
import tomllib
import warnings
import zipfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from freqdoor.errors import FreqdoorError
from freqdoor.files import remove_leftovers, replacing, unfinished, write_text
from freqdoor.settings import Settings, flat
from freqdoor.types import Result

STATE = "state.pt"
PREVIOUS = "state.previous.pt"  # the state before it, to go on from where a disk has damaged the last one
METRICS = "metrics.jsonl"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PACKAGES = ("freqdoor", "torch", "torchvision", "compressai", "numpy", "safetensors", "pillow")
FREE = {"checkpoint_minutes"}  # settings that do not change the result
PACKAGE = Path(__file__).parents[1]
SEAL = b"freqdoor sha256 "  # a state's last bytes: this, and the SHA-256 of all before its 64 hexadecimal digits
DIGITS = 64


class Environment(Result):
    """Versions, hardware and the code's commit: what a number depends on besides the settings."""

    versions: dict[str, str] = Field(default_factory=dict)
    python: str | None = None
    machine: str | None = None  # the processor's kind, such as x86_64
    processor: str | None = None  # its name
    threads: int | None = None  # of PyTorch
    gpu: str | None = None
    commit: str | None = None  # of freqdoor's own repository, if it runs from there


class RunFacts(Environment):
    """environment.json: where a run was begun, and on what; further facts are kept as they are."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1] = 1
    images: int | None = None
    images_sha256: str | None = None
    precision: str | None = None  # that "auto" stands for where the run was begun
    processes: int = 1  # that share every batch; sums over others end in other last bits
    modules_before: dict[str, str] | None = None  # SHA-256 of the vanilla codec's modules


def environment() -> Environment:
    """What is known of this process."""
    return Environment(
        versions={package: _version(package) for package in PACKAGES},
        python=platform.python_version(),
        machine=platform.machine(),
        processor=_processor(Path("/proc/cpuinfo")),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        commit=_commit(PACKAGE),
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor(table: Path) -> str | None:
    """The processor's name from Linux's table, elsewhere what Python knows."""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _commit(package: Path) -> str | None:
    """The commit of the repository that the package lies in, if it is freqdoor's own and the package is part of it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()

    try:
        project = tomllib.loads((Path(git("rev-parse", "--show-toplevel")) / "pyproject.toml").read_text("utf-8"))
        if project["project"]["name"] != "freqdoor":
            return None
        git("ls-files", "--error-unmatch", "errors.py")  # an installed copy, in .venv say, is not tracked
        return git("describe", "--always", "--dirty", "--abbrev=12") or None
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None


class Run:
    """A run directory: config.json, environment.json, metrics.jsonl, state.pt, and what is exported at the end.

    The state before the last one stays as state.previous.pt. Whoever writes holds the folder (`lock.holding`).

    Args:
        exports: names of the files that are written at the end.
    """

    def __init__(self, folder: Path | str, exports: Sequence[str] = ()) -> None:
        self.folder, self._exports = Path(folder), exports
        self._begun: dict[str, str] = {}  # the texts of config.json and environment.json

    def start(self, settings: Settings, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Create the directory, or find the state to resume from; refuses other settings or images.

        Raises:
            FreqdoorError: the run has other settings or facts, its files are damaged or those of another program.
        """
        for path in (self.folder / name for name in (CONFIG, ENVIRONMENT, METRICS, STATE, PREVIOUS)):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise FreqdoorError(f"{path}: expected a file of a run, found a device or a pipe; move it away")
        remove_leftovers(self.folder)
        saved = self._newest()
        if saved is None:
            self._refuse_foreign(settings)
            begun = RunFacts(**environment().model_dump() | facts)
            self._begun = {CONFIG: settings.model_dump_json(indent=2), ENVIRONMENT: begun.model_dump_json(indent=2)}
            for name, text in self._begun.items():
                write_text(self.folder / name, text)
            self._forget_after(0)
            return None
        self._begun = {name: self._text(name, saved) for name in (CONFIG, ENVIRONMENT)}
        for text in dict.fromkeys([self._begun[CONFIG], _begun(saved).get(CONFIG, self._begun[CONFIG])]):
            self._refuse_other(_comparable(text, settings), flat(settings.model_dump(mode="json")))
        now = json.loads(json.dumps(facts))
        for text in dict.fromkeys([self._begun[ENVIRONMENT], _begun(saved).get(ENVIRONMENT, self._begun[ENVIRONMENT])]):
            before = {"processes": 1} | json.loads(text)
            known = [key for key in now if before.get(key) is not None]  # an older version may not have written all
            self._refuse_other(flat({key: before[key] for key in known}), flat({key: now[key] for key in known}))
        self._forget_after(saved["history"]["step"])
        return saved

    def save(self, state: dict[str, Any]) -> None:
        """Write the whole training state, atomically; with what the run began with, should those files be damaged."""
        path = self.folder / STATE
        with replacing(path) as partial:
            torch.save(state | {"begun": self._begun}, partial)
            _seal(partial)
            if path.is_file() and not path.is_symlink():
                _keep(path, self.folder / PREVIOUS)

    def _newest(self) -> dict[str, Any] | None:
        """The last state; the one before it where there is no last one; None where there is neither."""
        path, previous = self.folder / STATE, self.folder / PREVIOUS
        if os.path.lexists(path):
            return self._load(path)
        if not os.path.lexists(previous):
            return None
        saved = self._load(previous)
        warnings.warn(f"{path} is not there: going on from {PREVIOUS}, step {saved['history']['step']}", stacklevel=3)
        return saved

    def _load(self, path: Path) -> dict[str, Any]:
        older = path.name == STATE and os.path.lexists(path.with_name(PREVIOUS))
        hint = f"go on from the state before it, {PREVIOUS}" if older else "start anew"
        try:
            _check_seal(path)
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise FreqdoorError(f"{path}: damaged checkpoint ({reason}); delete it to {hint}") from None
        try:
            int(state["history"]["step"]), float(state["history"]["seconds"])
        except (KeyError, TypeError, ValueError, IndexError):
            raise FreqdoorError(
                f"{path}: expected the state of a training that freqdoor wrote, found another file; move it away to "
                f"{hint}, or choose another folder"
            ) from None
        return state

    def _refuse_foreign(self, settings: Settings) -> None:
        """Raise if a run without a state has other settings, or if files of another program would be lost."""
        path = self.folder / CONFIG
        if not os.path.lexists(path):
            names = (ENVIRONMENT, METRICS, *self._exports)
            foreign = [name for name in names if os.path.lexists(self.folder / name)]
            if foreign:
                raise FreqdoorError(
                    f"{self.folder}: {' and '.join(foreign)} without the {CONFIG} of a run would be lost here; choose "
                    "another folder, or move them away to start anew"
                )
            return
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or "not a text"
            raise FreqdoorError(
                f"{path}: could not read the settings of a run ({reason}); choose another folder"
            ) from None
        if not text.strip("\0 \r\n"):  # what a power cut leaves of it; there is no state, so nothing is lost
            return
        required = {name for name, field in type(settings).model_fields.items() if field.is_required()}
        if not required <= _table(text).keys():
            raise FreqdoorError(
                f"{path}: expected the settings of such a run, found others or another program's file; choose another "
                "folder, or move it away to start anew"
            )
        self._refuse_other(_comparable(text, settings), flat(settings.model_dump(mode="json")))

    def _text(self, name: str, saved: dict[str, Any]) -> str:
        """What a file of the run says; a damaged one is written again from the saved state, which knows it too."""
        path = self.folder / name
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            if _table(text):
                return text
        kept = _begun(saved).get(name)
        if kept is not None:
            write_text(path, kept)
            return kept
        raise FreqdoorError(
            f"{path}: missing, empty or damaged, so that nobody can say whether this is the same run; its state of "
            f"step {saved['history']['step']} is whole: put a good {name} back to go on, or choose another folder"
        )

    def _refuse_other(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        different = [
            f"{key}: the run has {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and key not in FREE
        ]
        if different:
            raise FreqdoorError(
                f"{self.folder}: a run with other settings is there; give its settings again to go on (with --set), "
                "choose another folder, or delete it to start anew:\n  " + "\n  ".join(different)
            )

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that the saved state does not know and that will be taken again."""
        path = self.folder / METRICS
        if not os.path.lexists(path):
            return
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        except OSError as error:
            raise FreqdoorError(f"{path}: could not read ({error.strerror}); move it away") from None
        write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise FreqdoorError(f"{self.folder / METRICS}: could not write ({error.strerror})") from None


def _begun(saved: dict[str, Any]) -> dict[str, str]:
    """The files that the run of a state began with, by name, where the state knows them and they are whole."""
    begun = saved.get("begun")
    texts = begun if isinstance(begun, dict) else {}
    return {name: text for name, text in texts.items() if isinstance(text, str) and _table(text)}


def _table(text: str) -> dict[str, Any]:
    """The table that a JSON file holds; an empty one if it holds none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _keep(path: Path, other: Path) -> None:
    """Give a file that is about to be replaced another name too; where a file has one name only, that one instead."""
    second = unfinished(other)
    try:
        second.hardlink_to(path)
    except OSError:
        path.replace(other)  # a process that is killed here goes on from there
        return
    second.replace(other)
    second.unlink(missing_ok=True)  # where both were one file already, replacing does nothing


def _seal(path: Path) -> None:
    """Put a state's digest at its end, as the zip archive's comment, which PyTorch passes over."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = SEAL + b"0" * DIGITS
    with path.open("r+b") as file:
        digest = _digest(path)
        file.seek(-DIGITS, os.SEEK_END)
        file.write(digest)


def _check_seal(path: Path) -> None:
    """Raise ValueError or what `zipfile` raises if a byte of a state is not what was written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(SEAL) - DIGITS))
        seal = file.read()
    if not seal.startswith(SEAL):  # of an older version
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {name} is wrong")
    elif seal.removeprefix(SEAL) != _digest(path):
        raise ValueError("its bytes are not those that were written")


def _digest(path: Path) -> bytes:
    """The SHA-256 of a file without its last digits."""
    digest, left = hashlib.sha256(), path.stat().st_size - DIGITS
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest().encode()


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _comparable(text: str, settings: Settings) -> dict[str, Any]:
    """The settings in a run's config.json, flat; where a run of an older version lacks a key, that key's default."""
    content = json.loads(text)
    with contextlib.suppress(ValueError):  # keys or values that no longer exist show as they are
        content = type(settings).model_validate(content).model_dump(mode="json")
    return flat(content)
