"""Where a training's steps are shown beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow."""

import contextlib
import importlib.util
import json
import os
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from freqdoor.errors import FreqdoorError
from freqdoor.files import write_text
from freqdoor.settings import flat, public
from freqdoor.training.run import Run
from freqdoor.training.settings import LogSettings, Training
from freqdoor.types import Images, as_picture

NAMES = "tracking.json"  # what a run is called where it is shown
PROJECT = "freqdoor"


class Tracker(Protocol):
    """What a training's steps are written to; a step of a run that goes on may come twice, with the same values."""

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Take a step's measured values, by name; the first step is 1."""
        ...

    def pictures(self, step: int, pictures: Mapping[str, Images]) -> None:
        """Take pictures, (1, 3, h, w) in [0, 1], by name."""
        ...

    def close(self) -> None:
        """End: nothing follows from this process."""
        ...


class TensorBoard:
    """Event files in `tensorboard`; of steps that a run takes again, TensorBoard shows the later ones."""

    def __init__(self, folder: Path, settings: Training, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Take a step's values, and write them: a killed process loses none that its state knows."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def pictures(self, step: int, pictures: Mapping[str, Images]) -> None:
        """Take pictures."""
        for name, x in pictures.items():
            self._writer.add_image(name, x[0].float().clamp(0, 1).cpu(), step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of W&B, which passes over steps that it has; WANDB_MODE=offline writes it to the folder `wandb` alone."""

    def __init__(self, folder: Path, settings: Training, step: int) -> None:
        import wandb

        self._image = wandb.Image
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=_name(folder, "wandb", lambda: secrets.token_hex(8)),
            resume="allow",
            dir=str(folder),
            config=public(settings),
        )

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Take a step's values."""
        self._run.log(dict(row), step=step)

    def pictures(self, step: int, pictures: Mapping[str, Images]) -> None:
        """Take pictures."""
        self._run.log({name: self._image(as_picture(x)) for name, x in pictures.items()}, step=step)

    def close(self) -> None:
        """End the run, once all is sent."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in files in the folder `mlruns`; steps that it has are passed over."""

    def __init__(self, folder: Path, settings: Training, step: int) -> None:
        place = os.environ.get("MLFLOW_TRACKING_URI")
        if not place:
            place = (folder / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # later versions ask before they write files
        import mlflow

        client = self._client = mlflow.MlflowClient(place)
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)

        def begin() -> str:
            found = client.get_experiment_by_name(project)
            number = found.experiment_id if found else client.create_experiment(project)
            return str(client.create_run(number, run_name=folder.resolve().name).info.run_id)

        self._id = _name(folder, "mlflow", begin)
        self._seen = max((metric.step for metric in client.get_metric_history(self._id, "loss")), default=0)
        if not self._seen:
            for key, value in flat(public(settings)).items():
                client.log_param(self._id, key, value)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Take a step's values."""
        if step > self._seen:
            for name, value in row.items():
                self._client.log_metric(self._id, name, value, step=step)

    def pictures(self, step: int, pictures: Mapping[str, Images]) -> None:
        """Take pictures, files among the run's artifacts."""
        for name, x in pictures.items():
            self._client.log_image(self._id, as_picture(x), f"pictures/{name}-{step:07d}.png")

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


class _Kind(NamedTuple):
    """A kind of tracker: how it is opened from a run's folder, its settings and the steps it has, what that needs."""

    opened: Callable[[Path, Training, int], Tracker]
    package: str
    extra: str


KINDS = {  # by the setting of the table `log` that asks for it
    "tensorboard": _Kind(TensorBoard, "tensorboard", "tensorboard"),
    "wandb": _Kind(WeightsAndBiases, "wandb", "wandb"),
    "mlflow": _Kind(MLflow, "mlflow", "mlflow"),
}


def check_trackers(settings: LogSettings) -> None:
    """Raise if a package is not installed that the settings need."""
    for name, kind in _asked(settings).items():
        if importlib.util.find_spec(kind.package) is None:
            raise FreqdoorError(
                f"log.{name}: expected the package {kind.package}, found none; install it with pip install "
                f"'freqdoor[{kind.extra}]', or leave log.{name} out"
            )


class Trackers:
    """All trackers of a run. One that fails on the way is named in a warning and left out: the training goes on.

    Args:
        run: None for a process that writes nothing.
        step: how many steps the run has taken already.

    Raises:
        FreqdoorError: one could not be opened.
    """

    def __init__(self, run: Run | None, settings: Training, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        if run is None:
            return
        for name, kind in _asked(settings.log).items():
            try:
                self._open[name] = kind.opened(run.folder, settings, step)
            except Exception as error:
                self.close()
                raise FreqdoorError(
                    f"log.{name}: could not begin ({_reason(error)}); mend that, or leave log.{name} out"
                ) from error

    def __bool__(self) -> bool:
        return bool(self._open)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Give all of them a step's values."""
        self._tell(lambda tracker: tracker.scalars(step, row))

    def pictures(self, step: int, pictures: Mapping[str, Images]) -> None:
        """Give all of them pictures."""
        self._tell(lambda tracker: tracker.pictures(step, pictures))

    def close(self) -> None:
        """End all of them."""
        self._tell(lambda tracker: tracker.close())
        self._open = {}

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                say(tracker)
            except Exception as error:
                del self._open[name]
                warnings.warn(f"log.{name}: left out from here on ({_reason(error)})", stacklevel=3)


def _asked(settings: LogSettings) -> dict[str, _Kind]:
    return {name: kind for name, kind in KINDS.items() if getattr(settings, name)}


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _name(folder: Path, tracker: str, begin: Callable[[], str]) -> str:
    """What the run is called in a tracker: as before where it goes on, by `begin` where it is new there."""
    path, names = folder / NAMES, {}
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        names = content if isinstance(content, dict) else {}
    if not isinstance(names.get(tracker), str):
        names[tracker] = begin()
        write_text(path, json.dumps(names))
    return str(names[tracker])
