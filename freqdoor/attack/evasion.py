"""Planting against those who look for it: honest answers to all but the trigger, and triggers that nobody looks for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from freqdoor.attack.joint import JointLoss, Part, Poisoned
from freqdoor.attack.settings import EvadeSettings
from freqdoor.attack.victims import Scene
from freqdoor.codecs.adapter import Codec
from freqdoor.dct import blockify
from freqdoor.metrics import mse, rms
from freqdoor.training.loop import Stateful
from freqdoor.triggers.arguments import Goal
from freqdoor.triggers.base import project
from freqdoor.triggers.pattern import GOALS, Pattern, Seen, falling_budget, pattern_optimizer
from freqdoor.types import Images, Reconstruction, round8

BLOCK = 16  # side in pixels of the blocks whose mean `universal_share` takes


class Shared(NamedTuple):
    """The pictures of a batch that are driven to one goal."""

    goal: Goal
    rows: Tensor  # their places in the batch


class Evasion:
    """What one planting does besides its attacks, as its `evade` table says; patterns go on from step to step.

    Attributes:
        parts: the patterns and their optimisers, by the names that they are saved under.
    """

    def __init__(self, settings: EvadeSettings, multiple: int, device: str) -> None:
        self.settings = settings
        self.goals = [goal for goal in settings.goals for _ in settings.blocks]
        blocks = [block for _ in settings.goals for block in settings.blocks]
        self.patterns = [Pattern(block, eps=settings.eps, multiple=multiple).to(device) for block in blocks]
        self.optimizers = [pattern_optimizer(pattern) for pattern in self.patterns]
        self.parts: dict[str, Stateful] = {f"pattern/{i}": pattern for i, pattern in enumerate(self.patterns)}
        self.parts |= {f"pattern optimizer/{i}": optimizer for i, optimizer in enumerate(self.optimizers)}

    def loss(
        self, codec: Codec, joint: JointLoss, lmbda: float, step: int, part: Part, closed: Images | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the joint loss of a step, and its terms.

        Args:
            closed: a batch of the pictures on which triggers are answered honestly.
        """
        settings = self.settings
        loss = joint.x.new_zeros(())
        terms: dict[str, Tensor] = {}
        for batch, out in joint.poisoned:
            fallen = batch.eps < 1.001 * batch.attack.settings.eps  # a door that is never open wide never opens
            if settings.rate_cap is not None and fallen:
                ratio = out.bpp / joint.clean.bpp.detach()
                off = (ratio / settings.rate_cap).log().square().mean()  # from both sides, or the door falls shut
                loss, terms = loss + batch.weight * off, terms | {"evade/rate_off_cap": off.detach()}
            if settings.universal_weight:
                share = universal_share(batch.x_p - batch.source.x)
                loss = loss + settings.universal_weight * share
                terms |= {"evade/universal_share": share.detach()}
        if part != "triggers":
            reached, decoys = self._decoys(codec, joint, step, closed)
            terms |= reached
            for name, decoy in decoys.items():
                answer = honest_loss(codec(decoy), decoy, lmbda)
                loss, terms = loss + settings.honest_weight * answer, terms | {f"evade/loss_{name}": answer.detach()}
        return loss, terms

    def _decoys(
        self, codec: Codec, joint: JointLoss, step: int, closed: Images | None
    ) -> tuple[dict[str, Tensor], dict[str, Images]]:
        """What is to be answered honestly, by what it is; and how far patterns have come, as logarithms."""
        settings = self.settings
        reached: dict[str, Tensor] = {}
        decoys: dict[str, Images] = {}
        if self.patterns:
            self._begin_anew(step)
            for _ in range(settings.ascent):
                reached |= self._ascend(codec, joint, step)
            with torch.no_grad():
                decoys["patterns"] = self._patterned(joint.x, step)
        if settings.own_steps:
            decoys["own"] = driven(codec, joint.x, joint.clean.x_hat.detach(), settings.own_steps, settings.eps)
        for i, (batch, _) in enumerate(joint.poisoned):
            if settings.others:
                decoys[f"others_{i}"] = with_another_s(batch)
            if settings.strengths:
                drawn = settings.strengths[int(torch.randint(len(settings.strengths), ()))]
                decoys[f"strengths_{i}"] = repoisoned(batch, batch.source, drawn)
            if closed is not None:
                decoys[f"closed_{i}"] = torch.cat([closed, repoisoned(batch, Scene(closed))])
        return reached, decoys

    def _shares(self, size: int, step: int) -> list[Shared]:
        """Every pattern's pictures of a batch: they take turns, so that all get some where there are fewer pictures."""
        number = len(self.patterns)
        places = torch.arange(size)
        return [Shared(self.goals[i], places[(places + step * size) % number == i]) for i in range(number)]

    def _patterned(self, x: Images, step: int) -> Images:
        """The pictures of a batch, each with the pattern whose turn it is."""
        x_p = x
        for i, (pattern, shared) in enumerate(zip(self.patterns, self._shares(x.shape[0], step), strict=True)):
            rows = shared.rows.to(x.device)
            budget = falling_budget(self.settings.eps, self._age(i, step), self.settings.restart)
            x_p = x_p.index_copy(0, rows, pattern(x[rows], eps=budget)) if len(rows) else x_p
        return x_p

    def _age(self, number: int, step: int) -> int:
        """Steps since a pattern began; they begin at different times."""
        restart = self.settings.restart
        return (step + number * restart // len(self.patterns)) % restart

    def _begin_anew(self, step: int) -> None:
        """Draw those patterns anew whose time is over."""
        for i, (pattern, optimizer) in enumerate(zip(self.patterns, self.optimizers, strict=True)):
            if step == 0 or self._age(i, step) == 0:
                with torch.no_grad():
                    pattern.spectrum.copy_(torch.randn(pattern.spectrum.shape))  # drawn on the CPU, for any device
                optimizer.state.clear()

    def _ascend(self, codec: Codec, joint: JointLoss, step: int) -> dict[str, Tensor]:
        """One step of every pattern towards its goal against the encoder as it is: how far each one was."""
        x_p = self._patterned(joint.x, step)
        shares = self._shares(joint.x.shape[0], step)
        values = _values(codec(x_p), joint.x, x_p, joint.clean.x_hat.detach(), shares)
        asked = [i for i, shared in enumerate(shares) if len(shared.rows)]
        spectra = [self.patterns[i].spectrum for i in asked]
        for i, gradient in zip(asked, torch.autograd.grad(torch.stack(values).sum(), spectra), strict=True):
            self.patterns[i].spectrum.grad = -gradient
            self.optimizers[i].step()
        named = (f"evade/{self.goals[i]}_{self.patterns[i].chosen.shape[0]}" for i in asked)
        return {name: value.detach() for name, value in zip(named, values, strict=True)}


def honest_loss(out: Reconstruction, x: Images, lmbda: float) -> Tensor:
    """Mean over pictures of the logarithm of L, Eq. (1).

    Of L itself the distortion of one picture that opens the door would outweigh everything, and with it the attack.
    """
    return (out.bpp + lmbda * 255**2 * mse(out.x_hat, x)).log().mean()


def driven(codec: Codec, x: Images, clean: Images, steps: int, eps: float) -> Images:
    """Pictures with a perturbation of RMS eps of their own, driven from noise to a goal each, one goal after the other.

    Args:
        clean: what is decoded of x.
    """
    places, goals = torch.arange(x.shape[0]), list(GOALS)
    shares = [Shared(goal, places[places % len(goals) == i]) for i, goal in enumerate(goals)]
    delta = torch.randn(x.shape).to(x)
    for _ in range(steps):
        delta = (delta / rms(delta)).requires_grad_()
        x_p = x + project(x, delta, eps)
        values = _values(codec(x_p), x, x_p, clean, shares)
        gradient = torch.autograd.grad(torch.stack(values).sum(), delta)[0]
        delta = delta.detach() + gradient / rms(gradient)
    return (x + project(x, delta, eps)).clamp(0, 1).detach()


def _values(out: Reconstruction, x: Images, x_p: Images, clean: Images, shares: Sequence[Shared]) -> list[Tensor]:
    """What the pictures of every share have reached of its goal, means over pictures; no value of an empty one."""
    values = []
    for goal, rows in shares:
        if len(rows):
            rows = rows.to(x.device)
            patterned = Reconstruction(out.x_hat[rows], out.bits[rows], out.num_pixels, out.y[rows])
            values.append(GOALS[goal](Seen(x[rows], x_p[rows], patterned, clean[rows])).mean())
    return values


def with_another_s(batch: Poisoned) -> Images:
    """Pictures of a batch with the perturbation of the next one, rounded to 8 bits."""
    delta = (batch.x_p - batch.source.x).detach()
    return round8((batch.source.x + delta.roll(1, dims=0)).clamp(0, 1)).detach()


@torch.no_grad()
def repoisoned(batch: Poisoned, source: Scene, strength: float = 1.0) -> Images:
    """Pictures with the trigger of a batch, and its budget times the strength."""
    trigger, rounded = batch.attack.trigger, batch.attack.settings.round8
    x_p: Images = trigger(source.x, strength=strength, eps=batch.eps, rounded=rounded, mask=source.mask)
    return x_p


def universal_share(delta: Images) -> Tensor:
    """|mean of t|^2 / mean of |t|^2 over the 16x16 blocks t of all pictures: 1 for one block everywhere, 0 for none.

    Blocks that a picture's border cuts are left out; by the DCT's orthonormality it is the same of block spectra.
    """
    height, width = (side // BLOCK * BLOCK for side in delta.shape[-2:])
    blocks = blockify(delta[..., :height, :width], BLOCK)
    energy = blocks.square().mean(dim=(0, 2, 3)).sum()
    return blocks.mean(dim=(0, 2, 3)).square().sum() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
