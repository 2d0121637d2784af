"""Per-image attacks by projected gradient descent, for comparison with a trigger: same budget, much more work."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import Codec
from freqdoor.data import load_image
from freqdoor.errors import FreqdoorError
from freqdoor.measure.records import Condition, encoded, measure, through_png
from freqdoor.metrics import psnr, rms
from freqdoor.triggers.arguments import PAPER_EPS
from freqdoor.triggers.base import project
from freqdoor.types import Images, Record

Goal = Literal["bpp", "psnr"]


@dataclass(frozen=True)
class Comparison:
    """One image attacked in one way: what it cost to make, and what it did."""

    attack: str  # "none", a trigger's name, "pgd-bpp" or "pgd-psnr"
    seconds: float  # to make the poisoned image
    codec_passes: int  # forward and backward passes through a codec to make it
    record: Record


def pgd(
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
    if goal not in ("bpp", "psnr"):
        raise FreqdoorError(f"goal: expected bpp or psnr, found {goal!r}")
    if not (eps > 0 and steps > 0 and step > 0):
        raise FreqdoorError(f"pgd: expected eps, steps and step above 0, found {eps}, {steps} and {step}")
    with _differentiable(codec), torch.random.fork_rng():
        torch.manual_seed(seed)
        delta = project(x, torch.randn_like(x), eps)
        for _ in range(steps):
            delta.requires_grad_(True)
            out = codec((x + delta).clamp(0, 1))
            wanted = out.bpp.sum() if goal == "bpp" else -psnr(out.x_hat.clamp(0, 1), x).sum()
            (gradient,) = torch.autograd.grad(wanted, delta)
            with torch.no_grad():
                moved = delta + step * eps * gradient / rms(gradient)
                delta = project(x, moved, eps)
    with torch.no_grad():
        return (x + project(x, delta, eps, rounded=True)).clamp(0, 1)


@contextmanager
def _differentiable(codec: Codec) -> Iterator[None]:
    """The codec in train mode (noise instead of rounding) and without gradients for its weights; restored after."""
    training, wanted = codec.training, [p.requires_grad for p in codec.parameters()]
    codec.train().requires_grad_(False)
    try:
        yield
    finally:
        codec.train(training)
        for parameter, gradient in zip(codec.parameters(), wanted, strict=True):
            parameter.requires_grad_(gradient)


def compare(planted: Planted, images: Sequence[Path], *, steps: int = 50, seed: int = 0) -> Iterator[Comparison]:
    """Every image clean, with each trigger on the tampered encoder, and by PGD on the vanilla one, as 8-bit files."""
    for path in images:
        x = load_image(path)
        yield _measured(planted.vanilla, x, x, path.name, Condition("vanilla", None), "none", 0.0, 0)
        for name, trigger in planted.triggers.items():
            eps = trigger.eps
            started = time.perf_counter()
            x_p = encoded(planted, x, condition := Condition("tampered", name))
            seconds = time.perf_counter() - started
            yield _measured(planted.tampered, x, x_p, path.name, condition, name, seconds, 0)
        for goal in ("bpp", "psnr"):
            started = time.perf_counter()
            x_p = through_png(pgd(planted.vanilla, x, goal, eps=eps, steps=steps, seed=seed))
            seconds = time.perf_counter() - started
            condition = Condition("vanilla", f"pgd-{goal}")
            yield _measured(planted.vanilla, x, x_p, path.name, condition, f"pgd-{goal}", seconds, steps)


def _measured(
    codec: Codec, x: Images, x_p: Tensor, name: str, condition: Condition, attack: str, seconds: float, passes: int
) -> Comparison:
    return Comparison(attack, seconds, passes, measure(codec, x, x_p, name, condition)[0])


def comparison_table(rows: Sequence[Comparison]) -> str:
    """Means over images as a Markdown table: cost to make a poisoned image, and its effect."""
    lines = [
        "| attack | encoder | seconds an image | codec passes | PSNR dB | bpp real | worst trigger MSE |",
        "|---|---|---|---|---|---|---|",
    ]
    for attack in dict.fromkeys(row.attack for row in rows):
        found = [row for row in rows if row.attack == attack]
        n = len(found)
        seconds, passes = sum(r.seconds for r in found) / n, found[0].codec_passes
        quality, rate = sum(r.record.psnr_db for r in found) / n, sum(r.record.bpp_real for r in found) / n
        worst = max(r.record.trigger_mse for r in found)
        role = found[0].record.role
        lines.append(f"| {attack} | {role} | {seconds:.3f} | {passes} | {quality:.2f} | {rate:.4f} | {worst:.3e} |")
    return "\n".join(lines)
