"""The training loop that `train-codec` and `plant` share: seeds, checkpoints, resuming."""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from freqdoor.arrow import list_arrow
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import CodecSpec
from freqdoor.data import Crops, label_paths, list_training_images, listed_images, seed_for, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.shards import list_shards
from freqdoor.training.convolutions import keep_contiguous
from freqdoor.training.group import ALONE, Group
from freqdoor.training.normalisation import cache_normalisation
from freqdoor.training.run import Run
from freqdoor.training.settings import ImageSettings, Training
from freqdoor.training.trackers import Trackers
from freqdoor.types import Images

Progress = Callable[[int, dict[str, float]], None]
Step = Callable[[Images, int], dict[str, float]]
Shown = Callable[[], Mapping[str, Images]]


class Stateful(Protocol):
    """A network or an optimiser."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Put it back."""
        ...


def loop(
    run: Run | None,
    settings: Training,
    parts: Mapping[str, Stateful],
    history: dict[str, Any],
    crops: Crops,
    take_step: Step,
    *,
    saved: dict[str, Any] | None,
    progress: Progress | None,
    shown: Shown | None = None,
    group: Group = ALONE,
) -> None:
    """Take the steps that are left; the state is saved every few minutes, at the end, and when a person stops it.

    Crops and quantisation noise depend on (seed, step) alone, so that `parts`, `history` and the step number are the
    whole state, and a resumed run ends in bit-identical weights.

    SIGINT and SIGTERM wait for the end of a step, whose half would be no state, and act when it is saved; the second
    one of a kind acts at once, and what the last checkpoint has remains.

    Args:
        run: where the state is saved; the processes of a group but the first have none.
        parts: networks and optimisers, by the names they are saved under.
        history: plain values that change from step to step; "step" and "seconds" are kept here.
        take_step: one update from a batch and its step number; returns what to show.
        saved: the state of an earlier process, from `Run.start`.
        shown: pictures for the trackers of `settings.log`, (1, 3, h, w) each, by name.
        group: the processes that take the same steps; all begin as the first does.
    """
    history |= {"step": 0, "seconds": 0.0}
    if group.size > 1:
        begun = saved or {name: part.state_dict() for name, part in parts.items()} | {"history": history}
        saved = group.of_first(begun, settings.device)
    if saved is not None:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        history |= saved["history"]
    started = written = time.monotonic()
    earlier = history["seconds"]

    def save() -> None:
        history["seconds"] = earlier + time.monotonic() - started
        if run is not None:
            run.save({name: part.state_dict() for name, part in parts.items()} | {"history": history})

    trackers = Trackers(run, settings, history["step"])
    with contextlib.closing(trackers), HeldSignals() as held:
        for own in crops.batches(history["step"], settings.steps, group.decoded(crops)):
            x = group.batch(crops, own, settings.device)
            step = history["step"]
            torch.manual_seed(seed_for(settings.seed, "noise", step))
            row = take_step(x, step)
            history["step"] = step + 1
            trackers.scalars(step + 1, row)
            if shown and trackers and settings.log.pictures and (step + 1) % settings.log.pictures == 0:
                trackers.pictures(step + 1, shown())
            if progress:
                try:
                    progress(step + 1, row)
                except KeyboardInterrupt:
                    save()
                    raise
            if held.pending or time.monotonic() - written > 60 * settings.checkpoint_minutes:
                save()
                written = time.monotonic()
                held.release()
        save()


class HeldSignals:
    """SIGINT and SIGTERM wait until they are released; the second one of a kind acts at once.

    Attributes:
        pending: the signals that wait.
    """

    def __init__(self) -> None:
        self.pending: list[int] = []
        self._before: dict[int, Any] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # where signals arrive
            for number in (signal.SIGINT, signal.SIGTERM):
                if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = handler
                    self._undo.callback(signal.signal, number, handler)
                    signal.signal(number, self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._undo.close()  # all of them, even if one that has arrived acts as soon as its handler is back
        finally:
            self.release()

    def release(self) -> None:
        """Let the waiting signals do what they did before."""
        while self.pending:
            self._act(self.pending.pop(0))

    def _hold(self, number: int, frame: FrameType | None) -> None:
        if number in self.pending:
            self._act(number)
        else:
            self.pending.append(number)

    def _act(self, number: int) -> None:
        handler = self._before[number]
        if callable(handler):
            handler(number, None)
        else:  # the system's own: the end of the process
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


def open_crops(settings: Training) -> Crops:
    """The training crops of the settings' image folder; raises if images there cannot be used."""
    return open_folder(settings.images, settings.seed)


def open_folder(images: ImageSettings, seed: int) -> Crops:
    """Crops of one image folder; raises if images there cannot be used."""
    side = 1 if images.resize else images.crop
    folder = Path(images.folder)
    if images.files and (list_shards(folder) or list_arrow(folder)):
        raise FreqdoorError(f"files: a list names pictures in a folder, found shards at {folder}; drop one of both")
    files = listed_images(images.files, folder) if images.files else list_training_images(folder)
    paths = usable_images(files, min_side=side, skip_broken=images.skip_broken)
    return Crops(
        paths,
        crop=images.crop,
        batch_size=images.batch_size,
        seed=seed,
        resize=images.resize,
        window=images.window,
        labels=label_paths(paths, images.labels) if images.labels else (),
        skip_broken=images.skip_broken,
    )


def check_device(name: str) -> None:
    """Raise if PyTorch has no such device."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0][:100]
        raise FreqdoorError(f"device {name!r}: not usable here ({reason}); cpu always is") from None


def lambda_of(settings: Training, spec: CodecSpec) -> float:
    """The settings' lambda, or the one of the codec's quality."""
    lmbda = settings.lmbda or spec.lmbda
    if lmbda is None:
        raise FreqdoorError(
            f"{spec.name}: this codec has no quality that lambda follows from; pass --set lmbda=0.0067 (0.0018 to 0.18 "
            "for qualities 1 to 8)"
        )
    return lmbda


def check_finite(terms: Mapping[str, Tensor], step: int) -> None:
    """Stop a run at the first value that is not a number, naming the term and the step."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise FreqdoorError(
            f"step {step}: {', '.join(bad)} is not finite; the last checkpoint is intact, "
            "lower the learning rate or check the images"
        )


def place(x: Images, settings: Training) -> Images:
    """A batch on the settings' device, in their memory layout."""
    return x.to(settings.device).contiguous(memory_format=layout(settings))


def place_codec(codec: Codec, settings: Training) -> None:
    """Put a codec that is to be trained where `place` puts its batches; its GDN stays in the cache."""
    codec.to(settings.device).train().to(memory_format=layout(settings))
    cache_normalisation(codec)
    keep_contiguous(codec)


def layout(settings: Training) -> torch.memory_format:
    """The memory layout that the settings ask for."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format
