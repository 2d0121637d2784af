"""`freqdoor pgd`: attacks on single images by projected gradient descent, beside a trigger of the same budget."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs.adapter import Codec
from freqdoor.data import forked, image_paths, load_image, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import Condition, input_of, measure, through_png
from freqdoor.metrics import psnr, rms
from freqdoor.notes import Note, numbered
from freqdoor.triggers.arguments import PAPER_EPS
from freqdoor.triggers.base import project
from freqdoor.types import Images, Record, Result, check_choice

Goal = Literal["bpp", "psnr"]
GOALS: tuple[Goal, ...] = ("bpp", "psnr")


class Comparison(Result):
    """One image attacked in one way: what it cost to make, and what it did."""

    attack: str  # "none", a trigger's name, "pgd-bpp" or "pgd-psnr"
    seconds: float  # to make the poisoned image
    codec_passes: int  # forward and backward passes through a codec to make it
    record: Record


class Comparisons(Result):
    """A trigger beside attacks that are made for every image."""

    rows: tuple[Comparison, ...]


def pgd_images(
    codec: Codec, x: Images, goal: Goal, *, eps: float = PAPER_EPS, steps: int = 50, step: float = 0.2, seed: int = 0
) -> Images:
    """Images that cost `codec` the most bits ("bpp") or that it decodes worst ("psnr"), of RMS eps from x.

    Steps along the normalised gradient, each projected onto the budget: delta <- P(delta + step eps g / |g|), from
    a random start. The codec quantises with noise of a fixed seed, because rounding has no gradient; only the result
    counts, rounded to 8 bits as a file would be.

    Args:
        eps: budget, root mean square of x_p - x in RGB on the [0, 1] scale.
        steps: passes through the codec.
        step: length of a step in units of the budget.
        seed: of the start and of the quantisation noise.

    Raises:
        FreqdoorError: a goal, budget or number of steps that makes no sense.
    """
    check_choice("goal", goal, Goal)
    if not (eps > 0 and steps > 0 and step > 0):
        raise FreqdoorError(f"pgd: expected eps, steps and step above 0, found {eps}, {steps} and {step}")
    with _differentiable(codec), forked(x.device):
        torch.manual_seed(seed)
        delta = project(x, torch.randn_like(x), eps)
        for _ in range(steps):
            delta.requires_grad_(True)
            out = codec((x + delta).clamp(0, 1))
            damage = out.bpp.sum() if goal == "bpp" else -psnr(out.x_hat.clamp(0, 1), x).sum()
            (gradient,) = torch.autograd.grad(damage, delta)
            with torch.no_grad():
                moved = delta + step * eps * gradient / rms(gradient)
                delta = project(x, moved, eps)
    with torch.no_grad():
        return (x + project(x, delta, eps, rounded=True)).clamp(0, 1)


@contextmanager
def _differentiable(codec: Codec) -> Iterator[None]:
    """The codec in train mode (noise instead of rounding) and without gradients for its weights; restored after."""
    training, learned = codec.training, [p.requires_grad for p in codec.parameters()]
    codec.train().requires_grad_(False)
    try:
        yield
    finally:
        codec.train(training)
        for parameter, gradient in zip(codec.parameters(), learned, strict=True):
            parameter.requires_grad_(gradient)


def pgd(
    planted: Planted | Path | str,
    images: Path | str | Sequence[Path],
    *,
    steps: int = 50,
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    note: Note | None = None,
) -> list[Comparison]:
    """Every image clean, with each trigger on the tampered encoder, and by PGD on the vanilla one, as 8-bit files.

    PGD has the budget of the trigger, of several triggers the largest one.

    Args:
        planted: a planted encoder, or its name as for `load_planted`; `codec` and `weights` too are as there.
        images: a folder, an image, or several of both.
        steps: passes of PGD through the codec for every image.
    """
    encoder = opened(planted, codec, weights)
    encoder.named()  # one trigger or more
    rows = []
    paths = usable_images(image_paths(images), decode=True)
    told = numbered(note, len(paths) * (1 + len(encoder.triggers) + len(GOALS)))
    for path in paths:
        for row in _attacked(encoder, load_image(path), path.name, steps):
            rows.append(row)
            told(f"{path.name}: {row.attack}")
    return rows


def _attacked(planted: Planted, x: Images, name: str, steps: int) -> Iterator[Comparison]:
    def compared(attack: str, x_p: Images, condition: Condition, started: float, passes: int = 0) -> Comparison:
        seconds = time.perf_counter() - started if attack != "none" else 0.0
        record, _ = measure(planted.codec(condition.role), x, x_p, name, condition)
        return Comparison(attack=attack, seconds=seconds, codec_passes=passes, record=record)

    yield compared("none", x, Condition("vanilla", None), 0.0)
    for trigger in planted.triggers:
        started, condition = time.perf_counter(), Condition("tampered", trigger)
        yield compared(trigger, input_of(planted, x, condition), condition, started)
    eps = max(trigger.eps for trigger in planted.triggers.values())
    for goal in GOALS:
        started = time.perf_counter()
        x_p = through_png(pgd_images(planted.vanilla, x, goal, eps=eps, steps=steps))
        yield compared(f"pgd-{goal}", x_p, Condition("vanilla", f"pgd-{goal}"), started, steps)


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Means over images as a Markdown table: cost to make a poisoned image, and its effect."""
    lines = [
        "| attack | encoder | seconds an image | codec passes | PSNR dB | bpp real | worst trigger MSE |",
        "|---|---|---|---|---|---|---|",
    ]
    for attack in dict.fromkeys(row.attack for row in rows):
        own = [row for row in rows if row.attack == attack]
        n = len(own)
        seconds, passes = sum(r.seconds for r in own) / n, own[0].codec_passes
        quality, rate = sum(r.record.psnr_db for r in own) / n, sum(r.record.bpp_real for r in own) / n
        worst = max(r.record.trigger_mse for r in own)
        role = own[0].record.role
        lines.append(f"| {attack} | {role} | {seconds:.3f} | {passes} | {quality:.2f} | {rate:.4f} | {worst:.3e} |")
    return "\n".join(lines)
