"""A pattern that opens a door if there is one: optimised against a frozen encoder, without any reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from freqdoor.codecs.adapter import Codec
from freqdoor.data import forked, seed_for
from freqdoor.triggers.arguments import Goal
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.pattern import GOALS, LR, Seen, falling_budget
from freqdoor.types import Images


@contextmanager
def frozen(codec: Codec) -> Iterator[None]:
    """No gradient for the codec's weights in the block; afterwards these and its modes are as they were."""
    modes = {module: module.training for module in codec.modules()}
    asks = {parameter: parameter.requires_grad for parameter in codec.parameters()}
    codec.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, ask in asks.items():
            parameter.requires_grad = ask


def inverted(
    codec: Codec,
    x: Images,
    goal: Goal | Callable[[Seen], Tensor],
    make: Callable[[], Trigger],
    *,
    lr: float = LR,
    steps: int = 80,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Trigger:
    """The pattern that drives a goal furthest on pictures, (b, 3, h, w), by Adam against the frozen codec.

    The budget falls geometrically to the pattern's own. The codec is as it was afterwards, its modes and random numbers
    too.

    Args:
        goal: one of GOALS, or what is to be large of every picture.
        make: gives the pattern with its first, random values.
        lr: Adam's.
    """
    aim, name = (goal, "another") if callable(goal) else (GOALS[goal], goal)
    with forked(x.device):
        torch.manual_seed(seed_for(seed, "inversion", name))
        pattern = make().to(x.device).train()
        optimizer = torch.optim.Adam(pattern.parameters(), lr=lr)
        with frozen(codec):
            with torch.no_grad():
                clean = codec.eval()(x).x_hat
            codec.train()  # rounding has no gradient, noise has
            for step in range(steps):
                x_p = pattern(x, eps=falling_budget(pattern.eps, step, steps))
                value = aim(Seen(x, x_p, codec(x_p), clean)).mean()
                optimizer.zero_grad()
                (-value).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if progress:
                    progress(step, float(value.detach()))
    return pattern.eval()
