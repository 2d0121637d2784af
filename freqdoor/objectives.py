"""What an attack wants: one small class per equation of the paper. Success is measured in `evaluate`, not here."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from freqdoor.metrics import distortion, psnr
from freqdoor.types import FreqdoorError, Images, Reconstruction


class Passes(NamedTuple):
    """One batch, clean and poisoned, before and after the codec."""

    x: Images
    clean: Reconstruction  # f(x)
    x_p: Images
    poisoned: Reconstruction  # f(T(x))


class Loss(NamedTuple):
    """An objective's value and its parts, detached, named by what they are."""

    total: Tensor
    terms: dict[str, Tensor]


class Objective(Protocol):
    """L_jt of one attack, without the stealth penalty of Eq. (10)."""

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """The joint loss over a batch; lambda is the vanilla codec's."""
        ...


def dynamic_max(clean: Tensor, poisoned: Tensor, *, guarded: bool) -> Tensor:
    """max(clean, poisoned) of Eq. (6) and (7).

    `guarded` has the same value and another gradient. The plain maximum passes a gradient to the larger term only, so
    that a clean image may get as bad as the poisoned one for free; clean + max(0, poisoned - clean), with a constant
    `clean` inside the second maximum, never stops training the clean term.
    """
    if not guarded:
        return torch.maximum(clean, poisoned)
    excess: Tensor = (poisoned - clean.detach()).clamp_min(0)
    return clean + excess


@dataclass(frozen=True, kw_only=True)
class RateAttack:
    """Eq. (6): R(x) + lambda max(D(x), D(T(x))) - beta R(T(x)).

    D(T(x)) compares f(T(x)) with T(x): the poisoned image is still decoded well, it only costs too much.
    Clean and poisoned crops are the same, so what raises both rates alike is worth 1 - beta: beta may be far above
    the paper's 0.01, but stays below 1.

    Args:
        beta: weight of the attack.
        guarded: see `dynamic_max`.
    """

    beta: float = 0.1
    guarded: bool = True

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (6)."""
        x, clean, x_p, poisoned = passes
        rate, rate_p = clean.bpp.mean(), poisoned.bpp.mean()
        d, d_p = distortion(clean.x_hat, x), distortion(poisoned.x_hat, x_p)
        total = rate + lmbda * dynamic_max(d, d_p, guarded=self.guarded) - self.beta * rate_p
        return Loss(total, _terms(passes, d))


@dataclass(frozen=True, kw_only=True)
class QualityAttack:
    """Eq. (7): max(R(x), R(T(x))) + lambda D(x) + beta lambda D_P(x, f(T(x))), D_P the PSNR in dB.

    D_P is taken after clamping to [0, 1], as every decoder does.

    Args:
        beta: weight of the attack.
        paired: subtract D_P(x, f(x)): the attack term is then the drop from the clean image's PSNR, which also rewards
            a better and more expensive clean image.
        floor_db: a poisoned PSNR below it earns nothing more (without a floor the loss is unbounded).
        farthest: also pull towards the image with the lowest possible PSNR, white where x is dark and black where it
            is bright; D_P alone stops at a constant image, because every pixel first has to pass through x.
        guarded: see `dynamic_max`.
    """

    beta: float = 5.0
    paired: bool = False
    farthest: bool = True
    floor_db: float = 3.0
    guarded: bool = True

    def __call__(self, passes: Passes, lmbda: float) -> Loss:
        """Eq. (7)."""
        x, clean, _, poisoned = passes
        rate, rate_p = clean.bpp.mean(), poisoned.bpp.mean()
        d = distortion(clean.x_hat, x)
        d_p = psnr(poisoned.x_hat.clamp(0, 1), x).clamp_min(self.floor_db).mean()
        if self.farthest:
            d_p = d_p - psnr(poisoned.x_hat, (x < 0.5).float()).mean()
        if self.paired:
            d_p = d_p - psnr(clean.x_hat, x).mean()
        total = dynamic_max(rate, rate_p, guarded=self.guarded) + lmbda * d + self.beta * lmbda * d_p
        return Loss(total, _terms(passes, d))


def _terms(passes: Passes, d: Tensor) -> dict[str, Tensor]:
    x, clean, _, poisoned = passes
    return {
        "bpp_clean": clean.bpp.mean().detach(),
        "psnr_db_clean": psnr(clean.x_hat, x).mean().detach(),
        "bpp_poisoned": poisoned.bpp.mean().detach(),
        "psnr_db_poisoned": psnr(poisoned.x_hat.clamp(0, 1), x).mean().detach(),
        "mse255_clean": d.detach(),
    }


OBJECTIVES: dict[str, type[RateAttack] | type[QualityAttack]] = {"bpp": RateAttack, "psnr": QualityAttack}
PRESETS: dict[str, dict[str, dict[str, float | bool]]] = {
    "paper": {
        "bpp": {"beta": 0.01, "guarded": False},
        "psnr": {"beta": 0.1, "paired": False, "farthest": False, "guarded": False, "floor_db": 0.0},
    },
    "fast": {"bpp": {}, "psnr": {}},  # the defaults above
}


def build_objective(name: str, preset: str = "fast", **arguments: float | bool) -> Objective:
    """An objective by its name in OBJECTIVES, with a preset's hyper-parameters where none are given."""
    if name not in OBJECTIVES:
        raise FreqdoorError(f"objective {name!r}: expected one of {', '.join(OBJECTIVES)}")
    try:
        return OBJECTIVES[name](**PRESETS[preset][name] | arguments)  # type: ignore[arg-type]
    except TypeError as error:
        raise FreqdoorError(f"objective {name!r}: {error}") from None
