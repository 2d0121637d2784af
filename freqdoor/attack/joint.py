"""The joint loss of all attacks: Eq. (3), and Eq. (9) and (10) from one backward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from freqdoor.attack.objectives import DownstreamAttack, Objective, Passes
from freqdoor.attack.settings import TriggerSettings
from freqdoor.attack.victims import Victim
from freqdoor.codecs.adapter import Codec
from freqdoor.errors import FreqdoorError
from freqdoor.preprocessing import Preprocessing
from freqdoor.triggers import Trigger, budget_penalty
from freqdoor.types import Images, Reconstruction

DEFAULTS = TriggerSettings()


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


class JointLoss(NamedTuple):
    """The joint loss of all attacks in parts, and the clean pass that they share."""

    kept: Tensor
    attack: Tensor
    penalty: Tensor
    x: Images  # the clean batch as the codec saw it
    clean: Reconstruction
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
    part: Literal["both", "encoder", "triggers"] = "both",
) -> JointLoss:
    """One loss whose gradient is Eq. (9)'s for the encoder and Eq. (10)'s for every trigger.

    A trigger's own loss stands in Eq. (9) with the weight alpha^o, in Eq. (10) without: its gradient is scaled back
    by 1 / alpha^o where the poisoned image enters the codec. The clean batch and all poisoned ones made from it share
    one pass; an attack on the auxiliary set (Eq. (8)) has its own.

    Args:
        eps: the budget of every attack at this step.
        auxiliary: for every attack a batch of its auxiliary set, None for those that use none.
        defence: preprocessing between the image and the codec, clean and poisoned alike.
        part: "encoder" or "triggers" give Eq. (9)'s or Eq. (10)'s gradient alone, for two passes a step.
    """
    before = defence or (lambda image: image)
    given = [*auxiliary, *[None] * (len(attacks) - len(auxiliary))]
    batches = [_source(attack, x, batch) for attack, batch in zip(attacks, given, strict=True)]
    sources = [batch.x for batch in batches]
    poisoned = [
        attack.trigger(
            batch.x,
            eps=budget,
            rounded=attack.settings.round8,
            mask=attack.victim.mask(batch.x, batch.labels) if attack.victim else None,
        )
        for attack, batch, budget in zip(attacks, batches, eps, strict=True)
    ]
    weights = [1.0 if part == "triggers" else attack.weight for attack in attacks]
    entering = [
        before(x_p).detach() if part == "encoder" else scale_gradient(before(x_p), 1 / weight)
        for x_p, weight in zip(poisoned, weights, strict=True)
    ]
    x = before(x)
    clean, passed = _pass_all(codec, x, entering, [attack.objective.uses_auxiliary for attack in attacks])
    kept, wanted, penalty = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    terms: dict[str, Tensor] = {}
    for i, attack in enumerate(attacks):
        source = before(sources[i]) if attack.objective.uses_auxiliary else x
        source_hat = _clean_pass(codec, source) if attack.victim and attack.victim.uses_clean else None
        loss = attack.objective(Passes(x, clean, entering[i], passed[i], source, source_hat), lmbda)
        kept, wanted = kept + weights[i] * loss.kept, wanted + weights[i] * loss.attack
        if attack.settings.budget == "penalty":
            penalty = penalty + budget_penalty(sources[i], poisoned[i], gamma=attack.settings.gamma, eps=eps[i])
        prefix = f"{attack.name}/" if len(attacks) > 1 else ""
        terms |= {prefix + name: value for name, value in loss.terms.items()}
        terms[f"{prefix}trigger_mse"] = (poisoned[i] - sources[i]).square().mean().detach()
    joint = JointLoss(kept, wanted, penalty, x, clean, terms)
    return joint._replace(terms=terms | {"loss": joint.total.detach()})


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
    codec: Codec, x: Images, entering: Sequence[Images], apart: Sequence[bool]
) -> tuple[Reconstruction, list[Reconstruction]]:
    """The clean and all poisoned batches through the codec: in one pass, but for those that are `apart`."""
    together = [x_p for x_p, alone in zip(entering, apart, strict=True) if not alone]
    out = codec(torch.cat([x, *together]))
    size = x.shape[0]
    parts = [
        Reconstruction(x_hat, bits, out.num_pixels, y)
        for x_hat, bits, y in zip(out.x_hat.split(size), out.bits.split(size), out.y.split(size), strict=True)
    ]
    clean, rest = parts[0], iter(parts[1:])
    return clean, [codec(x_p) if alone else next(rest) for x_p, alone in zip(entering, apart, strict=True)]
