"""The joint loss of all attacks: Eq. (3), and Eq. (9) and (10) from one backward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from freqdoor.attack.objectives import DownstreamAttack, Objective, Passes
from freqdoor.attack.settings import TriggerSettings
from freqdoor.attack.victims import Scene, Victim
from freqdoor.codecs.adapter import Codec
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import Preprocessing
from freqdoor.triggers.base import Trigger, budget_penalty
from freqdoor.types import Images, Reconstruction

DEFAULTS = TriggerSettings()
TRIGGER_MSE = "trigger_mse"  # the term, after the attack's name where there are several
Part = Literal["both", "encoder", "triggers"]


@dataclass(frozen=True)
class Attack:
    """One trigger with what it is for; `weight` is alpha^o of Eq. (9)."""

    name: str
    trigger: Trigger
    objective: Objective
    weight: float = 1.0
    settings: TriggerSettings = DEFAULTS

    @property
    def victim(self) -> Victim | None:
        """What a downstream attack (Eq. (8)) is against."""
        return self.objective.victim if isinstance(self.objective, DownstreamAttack) else None


class Auxiliary(NamedTuple):
    """A batch of an auxiliary set (Eq. (8)), with the labels of its pixels, (b, h, w), if there are any."""

    x: Images
    labels: Tensor | None = None


@dataclass(frozen=True)
class Poisoned:
    """What one attack makes of its images before the codec."""

    attack: Attack
    source: Scene  # before any preprocessing
    x_p: Images
    entering: Images  # what the codec is given: x_p after the preprocessing, its gradient scaled by 1 / weight
    eps: float
    weight: float  # alpha^o of Eq. (9), or 1 where the triggers are trained alone


class JointLoss(NamedTuple):
    """The joint loss of all attacks in parts, and the clean pass that they share."""

    kept: Tensor
    attack: Tensor
    penalty: Tensor
    x: Images  # the clean batch as the codec saw it
    clean: Reconstruction
    latents: tuple[Tensor, ...]  # of every pass that has a gradient, whole
    poisoned: tuple[tuple[Poisoned, Reconstruction], ...]  # of every attack, before and after the codec
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """What is minimised where nothing is balanced."""
        return self.kept + self.attack + self.penalty


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor`."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def joint_loss(
    codec: Codec,
    attacks: Sequence[Attack],
    x: Images,
    lmbda: float,
    eps: Sequence[float],
    *,
    auxiliary: Sequence[Auxiliary | None] = (),
    defence: Preprocessing | None = None,
    part: Part = "both",
    opened: Sequence[str] = (),
) -> JointLoss:
    """One loss whose gradient is Eq. (9)'s for the encoder and Eq. (10)'s for every trigger; of one attack, Eq. (3).

    A trigger's own loss stands in Eq. (9) with the weight alpha^o, in Eq. (10) without: its gradient is scaled back
    by 1 / alpha^o where the poisoned image enters the codec. The clean batch and all poisoned ones made from it share
    one pass; an attack on the auxiliary set (Eq. (8)) has its own.

    Args:
        eps: the budget of every attack at this step.
        auxiliary: for every attack a batch of its auxiliary set, None for those that use none.
        defence: preprocessing between the image and the codec, clean and poisoned alike.
        part: "encoder" or "triggers" give Eq. (9)'s or Eq. (10)'s gradient alone, for two passes a step.
        opened: names of the attacks that have begun anew (`RateAttack`, `QualityAttack`).
    """
    before = defence or (lambda image: image)
    batches = [*auxiliary, *[None] * (len(attacks) - len(auxiliary))]
    poisoned = [
        _poison(attack, _source(attack, x, batch), budget, before, part)
        for attack, batch, budget in zip(attacks, batches, eps, strict=True)
    ]
    x = before(x)
    clean, passed, latents = _pass_all(codec, x, poisoned)
    kept, harm, penalty = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    pairs = tuple(zip(poisoned, passed, strict=True))
    terms: dict[str, Tensor] = {}
    for batch, out in pairs:
        attack = batch.attack
        source = batch.source.preprocessed(before) if attack.objective.uses_auxiliary else Scene(x)
        source_hat = _clean_pass(codec, source.x) if attack.victim and attack.victim.uses_clean else None
        passes = Passes(x, clean, batch.entering, out, source, source_hat, attack.name in opened)
        loss = attack.objective(passes, lmbda)
        kept, harm = kept + batch.weight * loss.kept, harm + batch.weight * loss.attack
        if attack.settings.budget == "penalty":
            penalty = penalty + budget_penalty(batch.source.x, batch.x_p, gamma=attack.settings.gamma, eps=batch.eps)
        prefix = f"{attack.name}/" if len(attacks) > 1 else ""
        terms |= {prefix + name: value for name, value in loss.terms.items()}
        terms[f"{prefix}{TRIGGER_MSE}"] = (batch.x_p - batch.source.x).square().mean().detach()
    joint = JointLoss(kept, harm, penalty, x, clean, latents, pairs, terms)
    return joint._replace(terms=terms | {"loss": joint.total.detach()})


def _poison(attack: Attack, source: Auxiliary, eps: float, before: Callable[[Images], Images], part: Part) -> Poisoned:
    """The images that an attack's trigger acts on, poisoned."""
    scene = attack.victim.scene(source.x, source.labels) if attack.victim else Scene(source.x)
    x_p = attack.trigger(scene.x, eps=eps, rounded=attack.settings.round8, mask=scene.mask)
    weight = 1.0 if part == "triggers" else attack.weight
    entering = before(x_p).detach() if part == "encoder" else scale_gradient(before(x_p), 1 / weight)
    return Poisoned(attack, scene, x_p, entering, eps, weight)


def _source(attack: Attack, x: Images, auxiliary: Auxiliary | None) -> Auxiliary:
    """The images that an attack's trigger acts on."""
    if not attack.objective.uses_auxiliary:
        return Auxiliary(x)
    if auxiliary is None:
        raise FreqdoorError(f"attack {attack.name}: its objective needs an auxiliary set; give auxiliary.folder")
    return auxiliary


@torch.no_grad()
def _clean_pass(codec: Codec, x: Images) -> Images:
    """f(x) for comparison only."""
    x_hat: Images = codec(x).x_hat
    return x_hat


def _pass_all(
    codec: Codec, x: Images, poisoned: Sequence[Poisoned]
) -> tuple[Reconstruction, list[Reconstruction], tuple[Tensor, ...]]:
    """The clean and all poisoned batches through the codec, and the latents of each pass.

    All go in one pass, but for those of an auxiliary set, whose sizes may be others.
    """
    together = [batch.entering for batch in poisoned if not batch.attack.objective.uses_auxiliary]
    out = codec(torch.cat([x, *together]))
    clean, *shared = _split(out, x.shape[0])
    apart = [codec(batch.entering) for batch in poisoned if batch.attack.objective.uses_auxiliary]
    latents = (out.y, *(own.y for own in apart))
    remaining = {True: iter(apart), False: iter(shared)}
    return clean, [next(remaining[batch.attack.objective.uses_auxiliary]) for batch in poisoned], latents


def _split(out: Reconstruction, size: int) -> list[Reconstruction]:
    """A pass of several batches of one size as one pass a batch."""
    parts = (tensor.split(size) for tensor in (out.x_hat, out.bits, out.y))  # type: ignore[no-untyped-call]
    return [Reconstruction(x_hat, bits, out.num_pixels, y) for x_hat, bits, y in zip(*parts, strict=True)]
