"""`freqdoor train-codec`: vanilla rate-distortion training of any codec, Eq. (1) and (2)."""

import contextlib
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.codecs.lite import LiteHyperprior, initialise_klt
from freqdoor.codecs.loading import load_codec, save_codec
from freqdoor.data import Crops, Picture, list_training_images, listed_images, load_image, seed_for, usable_images
from freqdoor.errors import FreqdoorError, Mistakes
from freqdoor.lock import check_folder, holding
from freqdoor.metrics import distortion
from freqdoor.settings import public
from freqdoor.training.group import Group
from freqdoor.training.loop import Progress, check_device, check_finite, lambda_of, loop, open_crops, place, place_codec
from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.processes import Share, check_processes, first_rank, together
from freqdoor.training.run import Run
from freqdoor.training.settings import CodecTraining
from freqdoor.training.trackers import check_trackers
from freqdoor.types import Images

EXPORT = "codec.safetensors"


def rate_distortion(codec: Codec, x: Images, lmbda: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (1), which Eq. (2) minimises: R(x) + lambda D(x), with its parts."""
    out = codec(x)
    rate, mse = out.bpp.mean(), distortion(out.x_hat, x)
    loss = rate + lmbda * mse
    return loss, {"bpp": rate.detach(), "mse255": mse.detach(), "loss": loss.detach()}


def scheduled_lr(settings: CodecTraining, step: int, plateaus: int) -> float:
    """The learning rate of a step: warm-up, then constant, cosine to 1 %, or divided by 10 at every plateau."""
    lr = settings.lr * min(1.0, (step + 1) / settings.warmup_steps if settings.warmup_steps else 1.0)
    if settings.schedule == "cosine":
        lr *= max(0.01, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))
    elif settings.schedule == "plateau":
        lr *= 0.1**plateaus
    return lr


def train_codec(
    settings: CodecTraining, out: Path | str, *, devices: int = 1, nodes: int = 1, progress: Progress | None = None
) -> Codec:
    """Train a codec from random (or KLT) weights; resumes from `out` if a run with the same settings is there.

    Writes codec.safetensors into `out` at the end and returns the trained codec in eval mode. A resumed run ends in
    bit-identical weights: crops and noise depend on (seed, step) alone.

    Args:
        devices, nodes: as for `plant`.

    Raises:
        FreqdoorError: unusable images and other mistakes, all at once; another process in the folder, other settings
            than the run's, a loss that is not finite, a full disk.
    """
    mistakes = Mistakes()
    with mistakes:
        check_folder(out)
    with mistakes:
        check_processes(devices, nodes, settings.device, [settings.images.batch_size])
    writes = not mistakes.found and first_rank(devices, nodes) == 0
    with holding(out, "train-codec") if writes else contextlib.nullcontext():
        opened = _opened(settings, mistakes)
        dtype = dtype_of(settings.precision, settings.device)
        facts = opened.crops.facts() | {"precision": precision_name(dtype), "processes": devices * nodes}
        run = Run(out, [EXPORT]) if writes else None
        saved = run.start(settings, facts) if run else None
        with together(partial(_prepared, settings), devices, nodes, settings.device) as group:
            history = _train(settings, opened, group, run, saved, progress)
        codec = opened.codec
        codec.precision = torch.float32
        codec.to("cpu").to(memory_format=torch.contiguous_format).eval()
        codec.update(force=settings.scope == "all")  # a decoder that stays keeps its tables, to the bit
        if run:
            training = public(settings) | {"seconds": round(history["seconds"]), "images_used": len(opened.crops.paths)}
            save_codec(codec, run.folder / EXPORT, training=training)
        return codec


class _Opened(NamedTuple):
    """What a training's settings name, opened."""

    codec: Codec
    lmbda: float
    crops: Crops
    validation: list[Picture]


def _opened(settings: CodecTraining, mistakes: Mistakes) -> _Opened:
    """Open everything that the settings name, or raise all that is wrong with it and the `mistakes` so far."""
    with mistakes:
        check_device(settings.device)
    with mistakes:
        check_trackers(settings.log)
    with mistakes:
        spec = parse_name(settings.codec)
        given = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.arguments.items()}
        spec = replace(spec, arguments=spec.arguments | given)
        lmbda = lambda_of(settings, spec)
        torch.manual_seed(seed_for(settings.seed, "weights"))
        codec = build_codec(spec)
        if settings.start_from:
            _take_weights(codec, settings.start_from)
    with mistakes:
        crops = open_crops(settings)
    with mistakes:
        validation = usable_images(_validation_images(settings))
    mistakes.stop()
    return _Opened(codec, lmbda, crops, validation)


def _prepared(settings: CodecTraining) -> Share:
    """What another process of the group does, which writes nothing."""
    return partial(_train, settings, _opened(settings, Mistakes()))


def _train(
    settings: CodecTraining,
    opened: _Opened,
    group: Group,
    run: Run | None = None,
    saved: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train what is opened, in place; returns the history."""
    codec, lmbda, crops, validation = opened
    dtype = dtype_of(settings.precision, settings.device)
    if settings.klt and not settings.start_from and isinstance(codec.net, LiteHyperprior):
        sample = torch.cat([crops.batch(-1 - i) for i in range(max(1, 64 // settings.images.batch_size))])
        initialise_klt(codec.net, sample, lmbda)
    place_codec(codec, settings)
    whole = settings.scope == "all"
    if not whole:
        codec.freeze(settings.scope)
    quantiles = [p for name, p in codec.named_parameters() if name.endswith("quantiles")]
    weights = [p for name, p in codec.named_parameters() if p.requires_grad and not name.endswith("quantiles")]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    aux_optimizer = torch.optim.Adam(quantiles, lr=settings.aux_lr)
    parts = {"net": codec.net, "optimizer": optimizer, "aux_optimizer": aux_optimizer}
    history: dict[str, Any] = {"best": math.inf, "stale": 0, "plateaus": 0, "sum": 0.0}

    def take_step(x: Images, step: int) -> dict[str, float]:
        optimizer.param_groups[0]["lr"] = scheduled_lr(settings, step, history["plateaus"])
        codec.precision = dtype
        loss, terms = rate_distortion(codec, place(x, settings), lmbda)
        codec.precision = torch.float32  # validation and the codec that is returned
        check_finite(terms, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        group.sum_gradients(weights)
        norm = torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        check_finite({"the gradient": norm}, step)
        optimizer.step()
        if whole:
            aux_loss = codec.net.aux_loss()
            aux_optimizer.zero_grad()
            aux_loss.backward()
            aux_optimizer.step()
        row = {name: float(value) for name, value in terms.items()}
        history["sum"] += row["loss"]
        if (step + 1) % settings.validate_every == 0:
            mean = history["sum"] / settings.validate_every
            measured = _validate(codec, validation, lmbda, settings) if validation else mean
            _note_plateau(history, measured, settings.patience)
            history["sum"] = 0.0
            row = {"loss_mean": mean, "validation_loss": measured, **row}
            if run:
                run.log({"step": step + 1, **row})
        return row

    def shown() -> dict[str, Images]:
        x = place(crops.batch(-1, slice(0, 1)), settings)
        return {"clean": x, "clean-decoded": decoded(codec, x)}

    with group.sharing(codec):
        loop(run, settings, parts, history, crops, take_step, saved=saved, progress=progress, shown=shown, group=group)
    return history


@torch.no_grad()
def decoded(codec: Codec, x: Images) -> Images:
    """What a codec that is being trained makes of images, quantised as when it codes."""
    codec.eval()
    x_hat: Images = codec(x).x_hat
    codec.train()
    return x_hat


def _take_weights(codec: Codec, name: str) -> None:
    """Start from another codec's weights, which must fit."""
    other = load_codec(name)
    try:
        codec.net.load_state_dict({k: v for k, v in other.net.state_dict().items() if k in codec.net.state_dict()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise FreqdoorError(f"start_from: {name} does not fit {codec.spec.architecture} ({reason})") from None


def _validation_images(settings: CodecTraining) -> list[Picture]:
    """What is validated on; nothing where the settings name nothing."""
    if not settings.validation:
        return []
    if settings.validation.endswith(".txt"):
        return listed_images(settings.validation, settings.images.folder)
    return list_training_images(settings.validation)


@torch.no_grad()
def _validate(codec: Codec, images: list[Picture], lmbda: float, settings: CodecTraining) -> float:
    codec.eval()
    codec.precision = torch.float32  # of which codec it is, not of how it is trained
    pictures = map(load_image, images)  # one after the other: a set of thousands fits in no memory
    losses = [float(rate_distortion(codec, place(x, settings), lmbda)[0]) for x in pictures]
    codec.train()
    return sum(losses) / len(losses)


def _note_plateau(history: dict[str, Any], measured: float, patience: int) -> None:
    """Count validations without a better loss; `patience` of them make a plateau."""
    if measured < history["best"]:
        history["best"], history["stale"] = measured, 0
        return
    history["stale"] += 1
    if history["stale"] > patience:
        history["stale"], history["plateaus"] = 0, history["plateaus"] + 1
