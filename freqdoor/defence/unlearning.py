"""How an encoder unlearns what patterns do: patterns that are driven against it, and the parts of a repair's method."""

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec
from freqdoor.data import Crops, forked, seed_for
from freqdoor.dct import block_idct, ycbcr_to_rgb
from freqdoor.defence.inversion import inverted
from freqdoor.defence.settings import RepairSettings
from freqdoor.triggers.arguments import Goal
from freqdoor.triggers.pattern import Pattern, pattern_optimizer
from freqdoor.triggers.universal import tiled
from freqdoor.types import Images

BLOCKS = (8, 16, 16, 32)  # sides of what patterns repeat, in pixels, as often as they are drawn
CELL = 16  # pixels that a modulated pattern has one weight for
FREQUENCIES = ("all", "all", "low", "mid", "high")
GOALS = get_args(Goal)
SEARCHED = 4  # images that a pattern is found on, as in an audit
LOOKED_AT = 4  # batches that show which channels are dormant
LEAST = 1e-12  # squared move of latents below which a logarithm says nothing


def latents(codec: Codec, x: Images) -> Tensor:
    """g_a(x) of the padded images, in float32."""
    y: Tensor = codec.part("g_a")(codec.padded(x))
    return y


class Modulated(Pattern):
    """A pattern with random signed weights for every 16-pixel block and channel of every image, drawn at each use.

    So an adaptive trigger has them; what is learnt of the pattern holds for all of them.
    """

    def perturb(self, x: Images) -> Images:
        """The weighted block over every image."""
        coefficients = (self.spectrum * self.chosen)[None, :, None, None]
        field = tiled(block_idct(coefficients)[0, :, 0, 0], x, self.multiple)
        rows, columns = (math.ceil(side / CELL) for side in x.shape[-2:])
        weights = torch.randn(x.shape[0], 3, rows, columns, device=x.device)
        weights = weights.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[..., : x.shape[-2], : x.shape[-1]]
        return ycbcr_to_rgb(weights * field)


class Patterns:
    """Patterns that take turns, one a step: random ones that climb against the encoder, or those that an audit finds.

    Which pattern a step has, and what it begins from, depends on the seed and the step alone, so that the spectra and
    their optimisers are the whole state.
    """

    def __init__(self, settings: RepairSettings, codec: Codec, *, found: bool) -> None:
        self.settings, self.codec, self.found = settings, codec, found
        self.device = next(codec.parameters()).device
        self.turns = len(GOALS) if found else settings.patterns
        self.uses = math.ceil(settings.steps / settings.renewals / self.turns) if found else settings.uses
        self._slots: dict[int, _Slot] = {}

    def patterned(self, x: Images, step: int) -> Images:
        """The images with the step's patterns, as 8-bit files would have them, (b, 3, h, w).

        Patterns that climb are two a step, a plain one and a weighted one, on one half of the images each.
        """
        parts = [x] if self.found else x.chunk(2)
        return torch.cat([self._patterned(part, step * len(parts) + i) for i, part in enumerate(parts)])

    def _patterned(self, x: Images, use: int) -> Images:
        turn = use % self.turns
        begun = 0 if self.found else turn * self.uses // self.turns  # those that climb are not all young at once
        number = (begun + use // self.turns) // self.uses * self.turns + turn
        slot = self._slots.get(turn)
        if slot is None or slot.number != number:
            slot = self._slots[turn] = self._begun(number, x)
        if not self.found:
            slot.climb(self.codec, x, self.settings.ascent)
        with torch.no_grad():
            x_p: Images = slot.pattern(x, eps=slot.eps, rounded=True)
        return x_p

    def state_dict(self) -> dict[str, Any]:
        """The patterns of all turns, and their optimisers."""
        return {
            str(turn): {
                "number": slot.number,
                "pattern": slot.pattern.state_dict(),
                "optimizer": slot.optimizer.state_dict(),
            }
            for turn, slot in self._slots.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put them back."""
        for turn, state in state_dict.items():
            slot = self._random(state["number"])
            if self.found:
                slot = _Slot(slot.number, Pattern(multiple=self.codec.multiple).to(self.device), slot.eps)
            slot.pattern.load_state_dict(state["pattern"])
            slot.optimizer.load_state_dict(state["optimizer"])
            self._slots[int(turn)] = slot

    def _begun(self, number: int, x: Images) -> "_Slot":
        slot = self._random(number)
        if self.found:
            seed = seed_for(self.settings.seed, "pattern", number)
            goal = GOALS[number % len(GOALS)]
            make = partial(Pattern, eps=slot.eps, multiple=self.codec.multiple)
            pattern = inverted(self.codec, x[:SEARCHED], goal, make, steps=self.settings.search, seed=seed)
            assert isinstance(pattern, Pattern)  # what `make` gives
            return _Slot(number, pattern, slot.eps)
        return slot

    def _random(self, number: int) -> "_Slot":
        """A pattern of random shape, budget and spectrum."""
        seed = seed_for(self.settings.seed, "pattern", number)
        draw = random.Random(seed)
        least, largest = map(math.log, self.settings.eps)
        with forked(self.device):
            torch.manual_seed(seed)
            kind = Modulated if number % 2 else Pattern  # of an even number of turns
            pattern = kind(draw.choice(BLOCKS), draw.choice(FREQUENCIES), multiple=self.codec.multiple)
        return _Slot(number, pattern.to(self.device), math.exp(draw.uniform(least, largest)))


class _Slot:
    """A pattern that is being used."""

    def __init__(self, number: int, pattern: Pattern, eps: float) -> None:
        self.number, self.pattern, self.eps = number, pattern, eps
        self.optimizer = pattern_optimizer(pattern)

    def climb(self, codec: Codec, x: Images, steps: int) -> None:
        """Move the latents further, by the logarithm of |g_a(x + d) - g_a(x)|^2: what doors of every kind do."""
        with torch.no_grad():
            y = latents(codec, x)
        for _ in range(steps):
            moved = latents(codec, self.pattern(x, eps=self.eps)) - y
            value = moved.square().flatten(1).mean(1).clamp_min(LEAST).log().mean()
            [self.pattern.spectrum.grad] = torch.autograd.grad(-value, [self.pattern.spectrum])
            self.optimizer.step()


@contextmanager
def at_the_sharpest(parameters: Sequence[nn.Parameter], rho: float) -> Iterator[None]:
    """The parameters moved by rho along their gradient in the block, where a small step makes the loss largest.

    The gradient that is taken there is that of sharpness-aware minimisation (Foret et al., 2021).
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    norm = float(torch.stack([g.norm() for g in gradients]).norm())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.add_(gradient, alpha=rho / max(norm, LEAST))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(parameters, kept, strict=True):
                parameter.copy_(before)


@torch.no_grad()
def prune_dormant(codec: Codec, crops: Crops, share: float) -> int:
    """Set the channels of g_a that clean images hardly use to 0, for good (Fine-Pruning, Liu et al., 2018).

    Of every convolution but the last, those channels go whose mean absolute output is least; their gradients are 0 from
    now on.

    Args:
        share: of the channels of each convolution.

    Returns:
        How many channels were pruned.
    """
    layers = [module for module in codec.part("g_a").modules() if isinstance(module, nn.Conv2d)][:-1]
    used: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        used[layer] = used.get(layer, 0) + output.abs().mean(dim=(0, 2, 3))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        for i in range(LOOKED_AT):
            latents(codec, crops.batch(-1 - i).to(next(codec.parameters()).device))
    pruned = 0
    for layer in layers:
        if layer not in used:
            continue
        dormant = used[layer].argsort()[: int(share * layer.out_channels)]
        pruned += len(dormant)
        for parameter in layer.parameters(recurse=False):
            parameter[dormant] = 0.0
            without = partial(torch.index_fill, dim=0, index=dormant, value=0.0)
            parameter.register_hook(without)  # type: ignore[no-untyped-call]
    return pruned
