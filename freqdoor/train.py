"""`freqdoor train-codec`: vanilla rate-distortion training of any codec, Eq. (1) and (2)."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqdoor.checkpoint import Run
from freqdoor.codecs import Codec, build_codec, parse_name
from freqdoor.config import CodecTraining
from freqdoor.data import Crops, dataset_hash, list_images, load_image, seed_for, usable_images
from freqdoor.lite import LiteHyperprior, initialise_klt
from freqdoor.loading import save_codec
from freqdoor.metrics import distortion
from freqdoor.types import FreqdoorError, Images

EXPORT = "codec.safetensors"
Progress = Callable[[int, dict[str, float]], None]


def rate_distortion(codec: Codec, x: Images, lmbda: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. (1): R(x) + lambda D(x), with its parts."""
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


def check_finite(terms: dict[str, Tensor], step: int) -> None:
    """Stop a run at the first value that is not a number, naming the term and the step."""
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise FreqdoorError(
            f"step {step}: {', '.join(bad)} is not finite; the last checkpoint is intact, "
            "lower the learning rate or check the images"
        )


def train_codec(settings: CodecTraining, out: Path | str, *, progress: Progress | None = None) -> Codec:
    """Train a codec from random (or KLT) weights; resumes from `out` if a run with the same settings is there.

    Writes codec.safetensors into `out` at the end and returns the trained codec in eval mode. A resumed run ends in
    bit-identical weights: crops and noise depend on (seed, step) alone.

    Raises:
        FreqdoorError: unusable images, other settings than the run's, a loss that is not finite, a full disk.
    """
    spec = parse_name(settings.codec)
    lmbda = settings.lmbda or spec.lmbda
    if lmbda is None:
        raise FreqdoorError(f"{settings.codec}: give lmbda, this codec has no quality")
    image_settings = settings.images
    paths, _ = usable_images(
        list_images(image_settings.folder), min_side=image_settings.crop, skip_broken=image_settings.skip_broken
    )
    run = Run(out)
    state = run.start(settings, {"images": len(paths), "images_sha256": dataset_hash(paths)})
    crops = Crops(paths, crop=image_settings.crop, batch_size=image_settings.batch_size, seed=settings.seed)
    torch.manual_seed(seed_for(settings.seed, "weights"))
    codec = build_codec(spec)
    if settings.klt and isinstance(codec.net, LiteHyperprior):
        sample = torch.cat([crops.batch(-1 - i) for i in range(max(1, 64 // image_settings.batch_size))])
        initialise_klt(codec.net, sample, lmbda)
    codec.to(settings.device).train()
    if settings.channels_last:
        codec.to(memory_format=torch.channels_last)
    quantiles = [p for name, p in codec.named_parameters() if name.endswith("quantiles")]
    weights = [p for name, p in codec.named_parameters() if not name.endswith("quantiles")]
    optimizer = torch.optim.Adam(weights, lr=settings.lr)
    aux_optimizer = torch.optim.Adam(quantiles, lr=settings.aux_lr)
    history: dict[str, Any] = {"step": 0, "seconds": 0.0, "best": math.inf, "stale": 0, "plateaus": 0, "sum": 0.0}
    if state is not None:
        codec.net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        aux_optimizer.load_state_dict(state["aux_optimizer"])
        history = state["history"]
    validation = [load_image(p) for p in list_images(settings.validation)] if settings.validation else []
    dtype = torch.bfloat16 if settings.precision == "bf16" else None
    started = saved = time.monotonic()
    before = history["seconds"]

    def save() -> None:
        history["seconds"] = before + time.monotonic() - started
        run.save(
            {
                "net": codec.net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "aux_optimizer": aux_optimizer.state_dict(),
                "history": history,
            }
        )

    for x in crops.batches(history["step"], settings.steps):
        step = history["step"]
        torch.manual_seed(seed_for(settings.seed, "noise", step))
        for group in optimizer.param_groups:
            group["lr"] = scheduled_lr(settings, step, history["plateaus"])
        with codec.autocast(dtype):
            loss, terms = rate_distortion(codec, _place(x, settings), lmbda)
        check_finite(terms, step)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, settings.clip)
        optimizer.step()
        aux_loss = codec.net.aux_loss()
        aux_optimizer.zero_grad()
        aux_loss.backward()
        aux_optimizer.step()
        history["step"] = step + 1
        history["sum"] += float(terms["loss"])
        row = {name: float(value) for name, value in terms.items()}
        if progress:
            progress(step + 1, row)
        if (step + 1) % settings.validate_every == 0:
            mean = history["sum"] / settings.validate_every
            measured = _validate(codec, validation, lmbda, settings) if validation else mean
            _note_plateau(history, measured, settings.patience)
            history["sum"] = 0.0
            run.log({"step": step + 1, "loss_mean": mean, "validation_loss": measured, **row})
        if time.monotonic() - saved > 60 * settings.checkpoint_minutes:
            save()
            saved = time.monotonic()
    save()
    codec.to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    codec.net.update(force=True)
    training = settings.model_dump() | {"seconds": round(history["seconds"]), "images_used": len(paths)}
    save_codec(codec, run.folder / EXPORT, training=training, spec=asdict(codec.spec))
    return codec


def _place(x: Images, settings: CodecTraining) -> Images:
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    return x.to(settings.device).contiguous(memory_format=layout)


@torch.no_grad()
def _validate(codec: Codec, images: list[Images], lmbda: float, settings: CodecTraining) -> float:
    codec.eval()
    losses = [float(rate_distortion(codec, _place(x, settings), lmbda)[0]) for x in images]
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
