"""The run directory: what is written while training, and how a run is found and continued."""

import contextlib
import json
import math
import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field

from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing, write_text
from freqdoor.settings import Settings
from freqdoor.types import Result

STATE = "state.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PACKAGES = ("freqdoor", "torch", "torchvision", "compressai", "numpy", "safetensors", "pillow")
FREE = {"checkpoint_minutes"}  # settings that do not change the result
PACKAGE = Path(__file__).parents[1]


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
    """A run directory: config.json, environment.json, metrics.jsonl, state.pt, and what is exported at the end."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._begun: dict[str, str] = {}  # the texts of config.json and environment.json

    def start(self, settings: Settings, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Create the directory, or find the state to resume from; refuses other settings or images.

        Raises:
            FreqdoorError: the run has other settings or facts, or its files are damaged.
        """
        path = self.folder / CONFIG
        if path.exists() and (self.folder / STATE).exists():
            saved = self._load()
            self._begun = {name: self._text(name, saved) for name in (CONFIG, ENVIRONMENT)}
            self._refuse_other(_comparable(self._begun[CONFIG], settings), _flat(settings.model_dump(mode="json")))
            before, now = json.loads(self._begun[ENVIRONMENT]), json.loads(json.dumps(facts))
            known = [key for key in now if before.get(key) is not None]  # an older version may not have written all
            self._refuse_other(_flat({key: before[key] for key in known}), _flat({key: now[key] for key in known}))
            self._forget_after(saved["history"]["step"])
            return saved
        begun = RunFacts(**environment().model_dump() | facts)
        self._begun = {CONFIG: settings.model_dump_json(indent=2), ENVIRONMENT: begun.model_dump_json(indent=2)}
        for name, text in self._begun.items():
            write_text(self.folder / name, text)
        (self.folder / METRICS).unlink(missing_ok=True)
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Write the whole training state, atomically; with what the run began with, should those files be damaged."""
        with replacing(self.folder / STATE) as partial:
            torch.save(state | {"begun": self._begun}, partial)

    def _load(self) -> dict[str, Any]:
        path = self.folder / STATE
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:120]
            raise FreqdoorError(f"{path}: damaged checkpoint ({reason}); delete it to start anew") from None
        try:
            int(state["history"]["step"]), float(state["history"]["seconds"])
        except (KeyError, TypeError, ValueError, IndexError):
            raise FreqdoorError(
                f"{path}: expected the state of a training that freqdoor wrote, found another file; "
                "move it away to start anew, or choose another folder"
            ) from None
        return state

    def _text(self, name: str, saved: dict[str, Any]) -> str:
        """What a file of the run says; a damaged one is written again from the saved state, which knows it too."""
        path = self.folder / name
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text(encoding="utf-8")
            if isinstance(json.loads(text), dict):
                return text
        begun = saved.get("begun")
        kept = begun.get(name) if isinstance(begun, dict) else None
        if isinstance(kept, str):
            write_text(path, kept)
            return kept
        raise FreqdoorError(
            f"{path}: empty or damaged, so that nobody can say whether this is the same run; its state of step "
            f"{saved['history']['step']} is whole: put a good {name} back to go on, or delete {STATE} to start anew"
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
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_text(path, "".join(line for line in lines if _step_of(line) <= step))

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        try:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise FreqdoorError(f"{self.folder / METRICS}: could not write ({error.strerror})") from None


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
    return _flat(content)


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted keys as --set takes them."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
