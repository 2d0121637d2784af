"""GDN in training, whose passes over memory stay in the processor's cache.

y = x s with s = (beta + gamma x^2)^(-1/2), inverse +1/2 (Ballé et al., arXiv:1511.06281). In large pictures these are a
dozen passes over tensors that fit in no cache, forward and backward, and cost as much as the convolutions between. Here
a few thousand pixels at a time go through all of them; the values are the same, the gradients to rounding.
"""

from typing import Any

import torch
from compressai.layers import GDN
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

PIXELS = 2048  # at a time: 1 MiB for 128 channels


class CachedGDN(GDN):  # type: ignore[misc]
    """`GDN` for float32 on the CPU with channels last, where a gradient is wanted; elsewhere `GDN` itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        weights = (self.gamma, self.beta)
        if (
            x.device.type != "cpu"
            or x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or not x.is_contiguous(memory_format=torch.channels_last)
            or not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)))
        ):
            y: Tensor = super().forward(x)
            return y
        y = _Normalisation.apply(x, self.gamma_reparam(self.gamma), self.beta_reparam(self.beta), self.inverse)
        return y


def cache_normalisation(net: nn.Module) -> None:
    """Let every GDN of a network that is to be trained be a `CachedGDN`: parameters and state are the same."""
    for module in net.modules():
        if type(module) is GDN:
            module.__class__ = CachedGDN


def _by_pixel(x: Tensor) -> Tensor:
    """(b, c, h, w) -> (b h w, c): a view of channels-last images."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _as_images(rows: Tensor, shape: torch.Size) -> Tensor:
    b, c, h, w = shape
    return rows.view(b, h, w, c).permute(0, 3, 1, 2)


def _parts(rows: Tensor) -> list[slice]:
    return [slice(start, start + PIXELS) for start in range(0, len(rows), PIXELS)]


class _Normalisation(torch.autograd.Function):
    """(x, gamma, beta, inverse) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, inverse: bool) -> Tensor:
        rows, result = _by_pixel(x), torch.empty_like(x)
        scales, y = torch.empty_like(rows), _by_pixel(result)
        squares, transposed = rows.new_empty(PIXELS, x.shape[1]), gamma.t()
        for part in _parts(rows):
            values, s, out = rows[part], scales[part], y[part]
            square = torch.mul(values, values, out=squares[: len(values)])
            torch.addmm(beta, square, transposed, out=s)
            torch.mul(values, s.sqrt_() if inverse else s.rsqrt_(), out=out)
        ctx.save_for_backward(rows, scales, gamma)
        ctx.inverse, ctx.shape = inverse, x.shape
        return result  # no view of another tensor: networks add to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With u = dL/d(beta + gamma x^2): dL/dx = s dL/dy + 2 x (gamma^T u), dL/dgamma = u x^2, dL/dbeta = u."""
        rows, scales, gamma = ctx.saved_tensors
        _, of_gamma, of_beta, _ = ctx.needs_input_grad
        to_x = torch.empty_like(rows)
        to_gamma, to_beta = torch.zeros_like(gamma), gamma.new_zeros(len(gamma))
        room, more = (rows.new_empty(PIXELS, len(gamma)) for _ in range(2))
        gradients = _by_pixel(gradient)
        for part in _parts(rows):
            values, s, g, out = rows[part], scales[part], gradients[part], to_x[part]
            u, product = room[: len(values)], more[: len(values)]
            torch.mul(g, s, out=out)
            torch.mul(out, values, out=u)
            if ctx.inverse:
                u.div_(s).div_(s).mul_(0.5)
            else:
                u.mul_(s).mul_(s).mul_(-0.5)
            out.addcmul_(values, torch.mm(u, gamma, out=product), value=2)
            if of_gamma:
                to_gamma.addmm_(u.t(), torch.mul(values, values, out=product))
            if of_beta:
                to_beta += u.sum(0)
        return _as_images(to_x, ctx.shape), to_gamma if of_gamma else None, to_beta if of_beta else None, None
