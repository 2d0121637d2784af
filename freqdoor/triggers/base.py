"""What every trigger has in common: strength, mask, the stealth budget and 8-bit rounding."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from freqdoor.codecs.sides import check_padded
from freqdoor.metrics import mse, rms
from freqdoor.parts import parts
from freqdoor.triggers.arguments import TriggerArguments
from freqdoor.types import Images, Masks, from_uint8, round8, to_uint8

ROUNDING_MSE = 1 / (12 * 255**2)  # of a uniform error of one grey level
NEAR, AIM = 0.998, 0.9995  # of the budget: what a step by the model is content with, and goes for, to end below
MODEL_STEPS, BISECTIONS = 4, 14  # at most


class Trigger(nn.Module, ABC):
    """T(x | theta_t). A subclass writes `perturb`; strength, mask, budget and range are the same for all.

    Args:
        settings: the constructor's arguments, checked; they are kept for `arguments`.
    """

    def __init__(self, settings: TriggerArguments) -> None:
        super().__init__()
        self.settings = settings
        self.eps, self.project, self.multiple = settings.eps, settings.project, settings.multiple

    @abstractmethod
    def perturb(self, x: Images) -> Images:
        """The perturbation of every image before strength, mask and budget, (b, 3, h, w), RGB."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments as plain values: what a file needs to rebuild the trigger."""
        return self.settings.model_dump(mode="json")

    def forward(
        self,
        x: Images,
        *,
        strength: float = 1.0,
        mask: Masks | None = None,
        eps: float | None = None,
        rounded: bool = False,
    ) -> Images:
        """The poisoned image x_p, in [0, 1].

        Args:
            strength: factor on the perturbation (Table 6 uses 3: the budget becomes (3 eps)^2).
            mask: (b, 1, h, w), where T(x) takes the place of x: (1 - M) x + M T(x) (Eq. (11)).
            eps: another budget than the trigger's own, while training anneals it.
            rounded: round to 8 bits with a straight-through gradient, as a file would.

        Raises:
            FreqdoorError: images that are padded to too many pixels.
        """
        check_padded(x.shape[-2], x.shape[-1], self.multiple)
        delta = self.perturb(x)
        if self.project:
            delta = project(x, delta, (self.eps if eps is None else eps) * strength, rounded=rounded)
        else:
            delta = delta * strength
        whole: list[Images] = []
        for rows in parts(x.shape):
            added = delta[..., rows, :]
            if mask is not None:
                added = added * mask[..., rows, :]  # last: (1 - M) x + M T(x), and no budget moves from outside it
            x_p = (x[..., rows, :] + added).clamp(0, 1)
            whole.append(round8(x_p) if rounded else x_p)
        return whole[0] if len(whole) == 1 else torch.cat(whole, -2)


def project(x: Images, delta: Images, eps: float, *, rounded: bool = False) -> Images:
    """Scale each image's delta so that what reaches the codec has RMS eps, and never more.

    What reaches it is clamp(x + delta), `rounded` to 8 bits if a file lies between. Rounding adds 1/12 of a squared
    grey level, which the scale leaves room for; clamping takes some away, which up to twice the scale gives back.
    """
    unit = delta / rms(delta)
    return unit * _scale(x, unit.detach(), eps, rounded=rounded)


@torch.no_grad()
def _scale(x: Images, unit: Images, eps: float, *, rounded: bool) -> Tensor:
    """The scale of every image's unit, (b, 1, 1, 1): by steps that take the squared error to grow as the scale's square
    does, and by bisection where rounding and clamping defeat these."""
    noise = ROUNDING_MSE if rounded else 0.0
    plain = math.sqrt(max(eps**2 - noise, (0.2 * eps) ** 2))
    scale = torch.full_like(unit[:, :1, :1, :1], plain)
    low, high = 0 * scale, 2 * scale  # nothing added is never too much
    done = torch.zeros_like(scale, dtype=torch.bool)  # image by image: none depends on those beside it
    for i in range(MODEL_STEPS + BISECTIONS):
        over = (error := _error(x, unit, scale, rounded=rounded)) > eps**2
        low, high = torch.where(over, low, scale), torch.where(over, scale, high)
        enough = NEAR if 0 < i < MODEL_STEPS else 0.99
        done |= ~over & ((error >= (enough * eps) ** 2) | (scale >= 2 * plain))
        if bool(done.all()):
            break
        by_model = (scale * (((AIM * eps) ** 2 - noise) / (error - noise)).sqrt()).clamp_max(2 * plain)
        other = torch.where((i < MODEL_STEPS) & (low < by_model) & (by_model <= high), by_model, (low + high) / 2)
        scale = torch.where(done, low, other)
    return low


def _error(x: Images, unit: Images, scale: Tensor, *, rounded: bool) -> Tensor:
    """The mean squared error of what reaches the codec, (b, 1, 1, 1)."""
    error = x.new_zeros(len(x))
    for rows in parts(x.shape):  # which stay in the processor's cache
        clean = x[..., rows, :]
        x_p = torch.addcmul(clean, scale, unit[..., rows, :]).clamp_(0, 1)
        error += mse(from_uint8(to_uint8(x_p)) if rounded else x_p, clean) * (clean.shape[-2] / x.shape[-2])
    return error.reshape(scale.shape)


def budget_penalty(x: Images, x_p: Images, *, gamma: float, eps: float) -> Tensor:
    """Second term of Eq. (10): gamma max(MSE(x, T(x)), eps^2), over the batch."""
    penalty: Tensor = gamma * (x_p - x).square().mean().clamp_min(eps**2)
    return penalty
