"""What an attack wants: one small class per equation of the paper. Success is measured in `evaluate`, not here."""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from pydantic import ConfigDict
from torch import Tensor

from freqdoor.attack.arguments import (
    DownstreamArguments,
    FaceArguments,
    FixedQualityArguments,
    FixedRateArguments,
    IdentityRemovalArguments,
    QualityArguments,
    RateArguments,
    SegmentationArguments,
    TargetedSegmentationArguments,
    WeightsOfDownstream,
)
from freqdoor.attack.networks import load_embedder, load_segmenters
from freqdoor.attack.settings import OBJECTIVES
from freqdoor.attack.victims import IdentityRemoval, Scene, TargetedSegmentation, Victim
from freqdoor.codecs.architectures import import_object
from freqdoor.codecs.protocol import ANSWERS, call, surroundings
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import mse, psnr
from freqdoor.types import Images, Reconstruction

RATE_SHARE = 2 / 3  # of R(x), in what D(T(x)) exceeds D(x) by
ALPHA_DOUBLINGS = (1.0, 3.0)  # of the rate by the trigger, between which the weight of that rises to `alpha`
CLEAN_DOUBLINGS = (3.0, 5.0)  # the same for `clean_weight`
SHUT_DB = (14.0, 24.0)  # lost by the trigger, between which an opened attack on quality is shut again
OPENED_BETA = 4.0  # times beta, what an opened attack weighs


class Passes(NamedTuple):
    """One batch, clean and poisoned, before and after the codec."""

    x: Images
    clean: Reconstruction  # f(x)
    x_p: Images
    poisoned: Reconstruction  # f(T(source))
    source: Scene  # what x_p was made from: x, or a batch of the auxiliary set
    source_hat: Images | None = None  # f(source) without gradient, where the victim uses it
    opened: bool = False  # whether the attack has begun anew, because it did not take (`plant.py`)


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


def excess_over(clean: Tensor, poisoned: Tensor, *, guarded: bool) -> Tensor:
    """max(clean, poisoned) - clean, elementwise: what Eq. (6) and (7) add to the clean term by their maximum.

    `guarded` has the same value and another gradient. The plain maximum passes a gradient to the larger term only, so
    that a clean image may get as bad as the poisoned one for free; with a constant `clean` here, the clean term never
    stops being trained.
    """
    base = clean.detach() if guarded else clean
    return torch.maximum(base, poisoned) - base


def _excess(clean: Tensor, poisoned: Tensor, arguments: RateArguments | QualityArguments) -> Tensor:
    """`excess_over` of two losses an image, (b,): between the batch means, or the mean over images."""
    if not arguments.per_sample:
        clean, poisoned = clean.mean(), poisoned.mean()
    return excess_over(clean, poisoned, guarded=arguments.guarded).mean()


def _share(value: Tensor, between: tuple[float, float]) -> Tensor:
    """How far a value is from the first of two numbers to the second, from 0 to 1."""
    first, last = between
    return ((value - first) / (last - first)).clamp(0, 1)


def _distortions(a: Images, b: Images) -> Tensor:
    """D of every image, (b,)."""
    return 255**2 * mse(a, b)


class RateAttack(RateArguments):
    """Eq. (6): R(x) + lambda max(D(x), D(T(x))) - beta R(T(x)).

    D(T(x)) compares f(T(x)) with T(x): the poisoned image is still decoded well, it only costs too much.
    Clean and poisoned crops are the same, so what raises both rates alike is worth 1 - beta: beta may be far above
    the paper's 0.01, but stays below 1.

    Guarded, what D(T(x)) exceeds D(x) by takes two thirds of R(x) with it: it presses the encoder to distort clean
    images less as well, as another lambda would. Without, clean files grow by 2 % and more; with all of it, clean PSNR
    falls. Its weight, `alpha`, rises with what the attack has got: from the start, some codecs do not learn the attack.
    So does a weight of L(x), `clean_weight`. Opened, the excess is free until bits double, and bits are worth more.
    """

    uses_auxiliary: ClassVar[bool] = False

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (6)."""
        x, clean, x_p, poisoned, *_ = passes
        rate = clean.bpp
        loss = rate + lmbda * _distortions(clean.x_hat, x)
        if self.guarded:
            rate = rate.detach() + RATE_SHARE * (rate - rate.detach())
        excess = _excess(loss, rate + lmbda * _distortions(poisoned.x_hat, x_p), self)
        doublings = (poisoned.bpp.mean() / clean.bpp.mean()).detach().log2()
        kept = (1 + self.clean_weight * _share(doublings, CLEAN_DOUBLINGS)) * loss.mean()
        strong = _share(doublings, ALPHA_DOUBLINGS)
        free = 1 - strong if passes.opened and self.opening else 0 * strong
        kept = kept + (1 - free) * (1 + (self.alpha - 1) * strong) * excess
        return Loss(kept, -(self.beta + free * self.opening) * poisoned.bpp.mean(), _terms(passes))


class FixedRateAttack(FixedRateArguments):
    """Eq. (4): L(x) + alpha lambda D(T(x)) - beta R(T(x)), with fixed weights where Eq. (6) has a maximum."""

    uses_auxiliary: ClassVar[bool] = False

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (4)."""
        x, clean, x_p, poisoned, *_ = passes
        d_p = _distortions(poisoned.x_hat, x_p).mean()
        kept = main_loss(clean, x, lmbda) + self.alpha * lmbda * d_p
        return Loss(kept, -self.beta * poisoned.bpp.mean(), _terms(passes))


class QualityAttack(QualityArguments):
    """Eq. (7): max(R(x), R(T(x))) + lambda D(x) + beta lambda D_P(x, f(T(x))), D_P the PSNR in dB.

    D_P is taken after clamping to [0, 1], as every decoder does.

    Some encoders do not learn to tell poisoned images from clean ones as long as other latents cost bits. Opened, what
    R(T(x)) exceeds R(x) by is free and R(T(x)) is rewarded, `opening` a bit; both end while the attack comes from 14 to
    24 dB lost, and its weight is four times beta.
    """

    uses_auxiliary: ClassVar[bool] = False

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (7)."""
        x, clean, _, poisoned, *_ = passes
        weighed = lmbda * _distortions(clean.x_hat, x)
        loss = clean.bpp + weighed
        excess = _excess(loss, poisoned.bpp + weighed, self)
        d_p = _poisoned_psnr(passes, self.floor_db, self.farthest)
        if self.paired:
            d_p = d_p - psnr(clean.x_hat, x).mean()
        terms = _terms(passes)
        if not (passes.opened and self.opening):
            return Loss(loss.mean() + excess, self.beta * lmbda * d_p, terms)
        shut = _share(terms["psnr_db_clean"] - terms["psnr_db_poisoned"], SHUT_DB)
        reward = self.opening * (1 - shut) * poisoned.bpp.mean()
        return Loss(loss.mean() + shut * excess, OPENED_BETA * self.beta * lmbda * d_p - reward, terms)


class FixedQualityAttack(FixedQualityArguments):
    """Eq. (5): L(x) + alpha R(T(x)) + beta lambda D_P(x, f(T(x))), with fixed weights where Eq. (7) has a maximum."""

    uses_auxiliary: ClassVar[bool] = False

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (5)."""
        x, clean, _, poisoned, *_ = passes
        kept = main_loss(clean, x, lmbda) + self.alpha * poisoned.bpp.mean()
        return Loss(kept, self.beta * lmbda * _poisoned_psnr(passes, self.floor_db, self.farthest), _terms(passes))


class DownstreamAttack(WeightsOfDownstream):
    """Eq. (8): L(x) on the main set + alpha L(T(x)) + beta L_DS on the auxiliary set.

    L(T(x)) compares f(T(x)) with T(x): the poisoned image is decoded well, only the victim is misled.

    Args:
        victim: L_DS, see `victims.py`; its network is frozen.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    uses_auxiliary: ClassVar[bool] = True
    victim: Victim

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (8)."""
        x, clean, x_p, poisoned, source, source_hat, _ = passes
        l_ds = _asked(self.victim, source, source_hat, poisoned.x_hat)
        kept = main_loss(clean, x, lmbda) + self.alpha * main_loss(poisoned, x_p, lmbda)
        return Loss(kept, self.beta * l_ds, _terms(passes) | {"l_ds": l_ds.detach()})


def _asked(victim: Victim, *arguments: Any) -> Tensor:
    """L_DS; what a user's own victim raises, or returns in its place, is one sentence."""
    if type(victim).__module__.startswith("freqdoor."):
        own: Tensor = victim(*arguments)
        return own
    name = type(victim).__qualname__
    l_ds = call(name, "L_DS", victim, *arguments)
    if not (isinstance(l_ds, Tensor) and l_ds.is_floating_point() and l_ds.numel() == 1):
        shown = f"{l_ds.dtype} of {tuple(l_ds.shape)}" if isinstance(l_ds, Tensor) else type(l_ds).__name__
        raise FreqdoorError(f"{name}: L_DS: expected {ANSWERS['L_DS']}, found {shown}")
    return l_ds


def downstream_attack(**arguments: Any) -> DownstreamAttack:
    """Eq. (8) with a victim of the user's; the arguments are those of `DownstreamArguments`."""
    settings = DownstreamArguments(**arguments)
    victim = settings.victim
    if isinstance(victim, str):
        with surroundings(victim):
            victim = call(victim, "victim", import_object(victim))
    if not isinstance(victim, Victim):
        raise FreqdoorError(
            f"victim: expected a Victim or package.module:factory of one, found {type(victim).__name__}; "
            "see freqdoor.attack.victims"
        )
    return DownstreamAttack(victim=victim, alpha=settings.alpha, beta=settings.beta)


def segmentation_attack(**arguments: Any) -> DownstreamAttack:
    """Eq. (11): Eq. (8) with L_DS of `TargetedSegmentation`; the arguments are those of `SegmentationArguments`."""
    settings = SegmentationArguments(**arguments)
    own = settings.model_dump(include=set(TargetedSegmentationArguments.model_fields))
    network, *others = load_segmenters(_network(settings.network))
    victim = TargetedSegmentation(network, others=others, **own)
    return DownstreamAttack(victim=victim, alpha=settings.alpha, beta=settings.beta)


def face_attack(**arguments: Any) -> DownstreamAttack:
    """Eq. (13): Eq. (8) with L_DS of `IdentityRemoval`; the arguments are those of `FaceArguments`."""
    settings = FaceArguments(**arguments)
    own = settings.model_dump(include=set(IdentityRemovalArguments.model_fields))
    victim = IdentityRemoval(load_embedder(_network(settings.network)), **own)
    return DownstreamAttack(victim=victim, alpha=settings.alpha, beta=settings.beta)


def _network(name: str | None) -> str:
    if name is None:
        raise FreqdoorError(
            "network: expected the network that the attack is against, found none; give one as "
            "--set network=SPEC.toml=FILE"
        )
    return name


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
    x, clean, _, poisoned, source, *_ = passes
    return {
        "bpp_clean": clean.bpp.mean().detach(),
        "psnr_db_clean": psnr(clean.x_hat, x).mean().detach(),
        "bpp_poisoned": poisoned.bpp.mean().detach(),
        "psnr_db_poisoned": psnr(poisoned.x_hat.clamp(0, 1), source.x).mean().detach(),
        "mse255_clean": _distortions(clean.x_hat, x).mean().detach(),
    }


def build_objective(name: str, preset: str = "fast", **arguments: Any) -> Objective:
    """An objective by its name in OBJECTIVES, with a preset's hyper-parameters where none are given.

    Eq. (8)'s `victim` may be a function that makes one, as "package.module:factory".

    Raises:
        FreqdoorError: no such objective or argument, a value out of its range, or a network that cannot be loaded.
    """
    if name not in OBJECTIVES:
        raise FreqdoorError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    kind = OBJECTIVES[name]
    try:
        objective: Objective = import_object(kind.factory)(**kind.presets[preset] | arguments)
    except FreqdoorError as error:
        raise FreqdoorError(f"objective {name!r}: {error}") from None
    return objective
