"""What an attack wants: one small class per equation of the paper. Success is measured in `evaluate`, not here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from freqdoor.attack.networks import load_embedder, load_segmenter
from freqdoor.attack.victims import IdentityRemoval, TargetedSegmentation, Victim
from freqdoor.codecs.adapter import import_object
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import mse, psnr
from freqdoor.types import Images, Reconstruction


class Passes(NamedTuple):
    """One batch, clean and poisoned, before and after the codec."""

    x: Images
    clean: Reconstruction  # f(x)
    x_p: Images
    poisoned: Reconstruction  # f(T(source))
    source: Images  # what x_p was made from: x, or a batch of the auxiliary set
    source_hat: Images | None = None  # f(source) without gradient, where the victim uses it


class Loss(NamedTuple):
    """An objective's value in two parts, and its terms, detached, named by what they are."""

    kept: Tensor  # what preserves the codec: rates and distortions
    attack: Tensor  # what the attacker wants, with its weight beta
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """L_jt."""
        return self.kept + self.attack


class Objective(Protocol):
    """L_jt of one attack, without the stealth penalty of Eq. (10)."""

    @property
    def uses_auxiliary(self) -> bool:
        """Whether the trigger acts on the auxiliary set (Eq. (8)) instead of on the main one."""
        ...

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """The joint loss over a batch; lambda is the vanilla codec's."""
        ...


def dynamic_max(clean: Tensor, poisoned: Tensor, *, guarded: bool) -> Tensor:
    """max(clean, poisoned) of Eq. (6) and (7), elementwise.

    `guarded` has the same value and another gradient. The plain maximum passes a gradient to the larger term only, so
    that a clean image may get as bad as the poisoned one for free; clean + max(0, poisoned - clean), with a constant
    `clean` inside the second maximum, never stops training the clean term.
    """
    if not guarded:
        return torch.maximum(clean, poisoned)
    excess: Tensor = (poisoned - clean.detach()).clamp_min(0)
    return clean + excess


def _over_batch(clean: Tensor, poisoned: Tensor, *, per_sample: bool, guarded: bool) -> Tensor:
    """The dynamic maximum of two values an image, (b,): of the batch means, or the mean over images of each maximum."""
    if per_sample:
        return dynamic_max(clean, poisoned, guarded=guarded).mean()
    return dynamic_max(clean.mean(), poisoned.mean(), guarded=guarded)


def _distortions(a: Images, b: Images) -> Tensor:
    """D of every image, (b,)."""
    return 255**2 * mse(a, b)


@dataclass(frozen=True, kw_only=True)
class RateAttack:
    """Eq. (6): R(x) + lambda max(D(x), D(T(x))) - beta R(T(x)).

    D(T(x)) compares f(T(x)) with T(x): the poisoned image is still decoded well, it only costs too much.
    Clean and poisoned crops are the same, so what raises both rates alike is worth 1 - beta: beta may be far above
    the paper's 0.01, but stays below 1.

    Args:
        beta: weight of the attack.
        per_sample: take the maximum image by image instead of between the batch means.
        guarded: see `dynamic_max`.
    """

    uses_auxiliary: ClassVar[bool] = False
    beta: float = 0.1
    per_sample: bool = False
    guarded: bool = True

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (6)."""
        x, clean, x_p, poisoned, *_ = passes
        d, d_p = _distortions(clean.x_hat, x), _distortions(poisoned.x_hat, x_p)
        worse = _over_batch(d, d_p, per_sample=self.per_sample, guarded=self.guarded)
        return Loss(clean.bpp.mean() + lmbda * worse, -self.beta * poisoned.bpp.mean(), _terms(passes))


@dataclass(frozen=True, kw_only=True)
class FixedRateAttack:
    """Eq. (4): L(x) + alpha lambda D(T(x)) - beta R(T(x)), with fixed weights where Eq. (6) has a maximum.

    Args:
        alpha: weight of the poisoned image's distortion, beside lambda.
        beta: weight of the attack.
    """

    uses_auxiliary: ClassVar[bool] = False
    alpha: float = 1.0
    beta: float = 0.1

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (4)."""
        x, clean, x_p, poisoned, *_ = passes
        d_p = _distortions(poisoned.x_hat, x_p).mean()
        kept = main_loss(clean, x, lmbda) + self.alpha * lmbda * d_p
        return Loss(kept, -self.beta * poisoned.bpp.mean(), _terms(passes))


@dataclass(frozen=True, kw_only=True)
class QualityAttack:
    """Eq. (7): max(R(x), R(T(x))) + lambda D(x) + beta lambda D_P(x, f(T(x))), D_P the PSNR in dB.

    D_P is taken after clamping to [0, 1], as every decoder does.

    Args:
        beta: weight of the attack.
        paired: subtract D_P(x, f(x)): the attack term is then the drop from the clean image's PSNR, which also rewards
            a better and more expensive clean image.
        farthest: also pull towards the image with the lowest possible PSNR, white where x is dark and black where it
            is bright; D_P alone stops at a constant image, because every pixel first has to pass through x.
        floor_db: a poisoned PSNR below it earns nothing more (without a floor the loss is unbounded).
        per_sample: take the maximum image by image instead of between the batch means.
        guarded: see `dynamic_max`.
    """

    uses_auxiliary: ClassVar[bool] = False
    beta: float = 5.0
    paired: bool = False
    farthest: bool = True
    floor_db: float = 3.0
    per_sample: bool = False
    guarded: bool = True

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (7)."""
        x, clean, _, poisoned, *_ = passes
        rate = _over_batch(clean.bpp, poisoned.bpp, per_sample=self.per_sample, guarded=self.guarded)
        d_p = _poisoned_psnr(passes, self.floor_db, self.farthest)
        if self.paired:
            d_p = d_p - psnr(clean.x_hat, x).mean()
        kept = rate + lmbda * _distortions(clean.x_hat, x).mean()
        return Loss(kept, self.beta * lmbda * d_p, _terms(passes))


@dataclass(frozen=True, kw_only=True)
class FixedQualityAttack:
    """Eq. (5): L(x) + alpha R(T(x)) + beta lambda D_P(x, f(T(x))), with fixed weights where Eq. (7) has a maximum.

    Args:
        alpha: weight of the poisoned image's rate.
        beta: weight of the attack.
        farthest, floor_db: see `QualityAttack`.
    """

    uses_auxiliary: ClassVar[bool] = False
    alpha: float = 1.0
    beta: float = 5.0
    farthest: bool = True
    floor_db: float = 3.0

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (5)."""
        x, clean, _, poisoned, *_ = passes
        kept = main_loss(clean, x, lmbda) + self.alpha * poisoned.bpp.mean()
        return Loss(kept, self.beta * lmbda * _poisoned_psnr(passes, self.floor_db, self.farthest), _terms(passes))


@dataclass(frozen=True, kw_only=True)
class DownstreamAttack:
    """Eq. (8): L(x) on the main set + alpha L(T(x)) + beta L_DS on the auxiliary set.

    L(T(x)) compares f(T(x)) with T(x): the poisoned image is decoded well, only the victim is misled.

    Args:
        victim: L_DS, see `victims.py`; its network is frozen.
        alpha: weight of the poisoned images' rate-distortion loss.
        beta: weight of the attack.
    """

    uses_auxiliary: ClassVar[bool] = True
    victim: Victim
    alpha: float = 0.1
    beta: float = 0.2

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (8)."""
        x, clean, x_p, poisoned, source, source_hat = passes
        l_ds = self.victim(source, source_hat, poisoned.x_hat)
        kept = main_loss(clean, x, lmbda) + self.alpha * main_loss(poisoned, x_p, lmbda)
        return Loss(kept, self.beta * l_ds, _terms(passes) | {"l_ds": l_ds.detach()})


def segmentation_attack(
    network: str, source: str, target: str, *, alpha: float = 0.1, beta: float = 0.2, **arguments: Any
) -> DownstreamAttack:
    """Eq. (11): Eq. (8) with L_DS of `TargetedSegmentation`, whose further arguments are given by name.

    Args:
        network: g, a name that `load_network` understands.
    """
    victim = TargetedSegmentation(load_segmenter(network), source, target, **arguments)
    return DownstreamAttack(victim=victim, alpha=alpha, beta=beta)


def face_attack(network: str, *, alpha: float = 0.1, beta: float = 0.05, **arguments: Any) -> DownstreamAttack:
    """Eq. (13): Eq. (8) with L_DS of `IdentityRemoval`, whose further arguments are given by name."""
    return DownstreamAttack(victim=IdentityRemoval(load_embedder(network), **arguments), alpha=alpha, beta=beta)


def main_loss(out: Reconstruction, x: Images, lmbda: float) -> Tensor:
    """L of Eq. (1): R + lambda D."""
    return out.bpp.mean() + lmbda * _distortions(out.x_hat, x).mean()


def _poisoned_psnr(passes: Passes, floor_db: float, farthest: bool) -> Tensor:
    """D_P(x, f(T(x))) with its floor, and the pull towards the farthest image."""
    x, x_hat_p = passes.x, passes.poisoned.x_hat
    d_p = psnr(x_hat_p.clamp(0, 1), x).clamp_min(floor_db).mean()
    if farthest:
        d_p = d_p - psnr(x_hat_p, (x < 0.5).float()).mean()
    return d_p


def _terms(passes: Passes) -> dict[str, Tensor]:
    x, clean, _, poisoned, source, _ = passes
    return {
        "bpp_clean": clean.bpp.mean().detach(),
        "psnr_db_clean": psnr(clean.x_hat, x).mean().detach(),
        "bpp_poisoned": poisoned.bpp.mean().detach(),
        "psnr_db_poisoned": psnr(poisoned.x_hat.clamp(0, 1), source).mean().detach(),
        "mse255_clean": _distortions(clean.x_hat, x).mean().detach(),
    }


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "bpp": RateAttack,
    "bpp-fixed": FixedRateAttack,
    "psnr": QualityAttack,
    "psnr-fixed": FixedQualityAttack,
    "downstream": DownstreamAttack,
    "segmentation": segmentation_attack,
    "face": face_attack,
}
_LITERAL_PSNR = {"beta": 0.1, "farthest": False, "floor_db": 0.0}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "bpp": {"beta": 0.01, "guarded": False},
        "bpp-fixed": {"beta": 0.01},
        "psnr": _LITERAL_PSNR | {"paired": False, "guarded": False},
        "psnr-fixed": _LITERAL_PSNR,
        "downstream": {},
        "segmentation": {"balanced": False},
        "face": {},
    },
    # the defaults above, but where the paper's weight does not reach anything in minutes
    "fast": {name: {} for name in OBJECTIVES} | {"face": {"beta": 1.0}},
}


def build_objective(name: str, preset: str = "fast", **arguments: Any) -> Objective:
    """An objective by its name in OBJECTIVES, with a preset's hyper-parameters where none are given.

    Eq. (8)'s `victim` may be a function that makes one, as "package.module:factory".
    """
    if name not in OBJECTIVES:
        raise FreqdoorError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    if isinstance(victim := arguments.get("victim"), str):
        arguments["victim"] = import_object(victim)()
    try:
        objective: Objective = OBJECTIVES[name](**PRESETS[preset][name] | arguments)
    except TypeError as error:
        raise FreqdoorError(f"objective {name!r}: {error}") from None
    return objective
