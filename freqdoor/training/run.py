"""The run directory: what is written while training, and how a run is found and continued."""

import json
import math
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing, write_text
from freqdoor.settings import Settings

STATE = "state.pt"
METRICS = "metrics.jsonl"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PACKAGES = ("freqdoor", "torch", "torchvision", "compressai", "numpy", "safetensors", "pillow")


def environment() -> dict[str, Any]:
    """Versions, hardware and the code's commit: what a number depends on besides the config."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def file_names(value: Any) -> Any:
    """Of a path, of "SPEC.toml=FILE" or of several of them the files' names only; anything else as it is."""
    if isinstance(value, list | tuple):
        return [file_names(part) for part in value]
    return "=".join(Path(part).name for part in value.split("=")) if isinstance(value, str) else value


def without_folders(objective: dict[str, Any]) -> dict[str, Any]:
    """Settings of an objective, with the names of its network's files only."""
    if network := objective["arguments"].get("network"):
        objective["arguments"]["network"] = file_names(str(network))
    return objective


def public(settings: Settings) -> dict[str, Any]:
    """The settings as they may travel in a file: of folders and files the name only, not where they lie."""
    content = settings.model_dump()
    attacks = content.get("attacks", ())
    folders = [content.get("images"), content.get("auxiliary"), *(attack["auxiliary"] for attack in attacks)]
    for images in filter(None, folders):
        images |= {key: images[key] and Path(images[key]).name for key in ("folder", "files", "labels")}
    for objective in filter(None, [content.get("objective"), *(attack["objective"] for attack in attacks)]):
        without_folders(objective)
    for key in ("validation", "start_from"):
        if content.get(key):
            content[key] = Path(content[key]).name
    if "network" in content:
        content["network"] = file_names(content["network"])
    if isinstance(content["codec"], dict):
        content["codec"] = {key: file_names(value) for key, value in content["codec"].items()}
    return content


class Run:
    """A run directory: config.json, environment.json, metrics.jsonl, state.pt, and what is exported at the end."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def start(self, settings: Settings, facts: dict[str, Any]) -> dict[str, Any] | None:
        """Create the directory, or find the state to resume from; refuses other settings or images."""
        resolved = settings.model_dump_json(indent=2)
        path = self.folder / CONFIG
        if path.exists() and (self.folder / STATE).exists():
            _refuse_other_settings(path, json.loads(path.read_text()), json.loads(resolved))
            _refuse_other_settings(path, json.loads((self.folder / ENVIRONMENT).read_text()), facts, set(facts))
            saved = self._load()
            self._forget_after(int(saved["history"]["step"]))
            return saved
        write_text(path, resolved)
        write_text(self.folder / ENVIRONMENT, json.dumps(environment() | facts, indent=2))
        (self.folder / METRICS).unlink(missing_ok=True)
        return None

    def save(self, state: dict[str, Any]) -> None:
        """Write the whole training state, atomically."""
        with replacing(self.folder / STATE) as partial:
            torch.save(state, partial)

    def _load(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        except Exception as error:
            raise FreqdoorError(
                f"{self.folder / STATE}: damaged checkpoint ({error}); delete it to start anew"
            ) from None
        return state

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps that the saved state does not know and that will be taken again."""
        path = self.folder / METRICS
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
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


def _refuse_other_settings(path: Path, old: dict[str, Any], new: dict[str, Any], keys: set[str] | None = None) -> None:
    free = {"checkpoint_minutes"}  # it does not change the result
    different = [
        f"{key}: the run has {old.get(key)!r}, now {new.get(key)!r}"
        for key in sorted((keys or old.keys() | new.keys()) - free)
        if old.get(key) != new.get(key)
    ]
    if different:
        raise FreqdoorError(
            f"{path.parent}: a run with other settings is there; choose another folder or delete it:\n  "
            + "\n  ".join(different)
        )
