"""Whether an encoder descends from another one, by their weights: what training on leaves of the owner's."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec
from freqdoor.types import Images

POSITIONS = 32  # a side of every channel that channels are recognised by
RECOGNISED = 0.5  # least correlation of two channels that are held for the same one


class Convolution(NamedTuple):
    """One layer of g_a: its filters, and its channels over images, (channels, positions), their means taken off."""

    weight: Tensor
    bias: Tensor
    entering: Tensor
    leaving: Tensor


@torch.no_grad()
def convolutions(codec: Codec, images: Sequence[Images]) -> dict[str, Convolution]:
    """All convolutions of g_a by their names, with what goes through them as it encodes the images."""
    g_a = codec.eval().part("g_a")
    layers = {name: m for name, m in g_a.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen[name].append((_sampled(inputs[0]), _sampled(output)))

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in layers.items()]
    try:
        for x in images:
            g_a(codec.padded(x))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, module in layers.items():
        entering, leaving = (torch.cat(parts, dim=1) for parts in zip(*seen[name], strict=True))
        bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
        found[name] = Convolution(module.weight, bias, _centred(entering), _centred(leaving))
    return found


def likeness(
    vanilla: Mapping[str, Convolution], own: Mapping[str, Convolution], suspect: Mapping[str, Convolution]
) -> float | None:
    """How much of what planting changed is in a suspect's filters: the median over filters of cos(s - v, o - v).

    v, o and s are the weights and the bias of one filter in the vanilla codec, in the owner's encoder and in the
    suspect. The greater of two medians counts: of the filters as they stand, and of the suspect's after its channels
    took the order and the scale of the owner's that they correlate with. A copy has 1, an encoder that was planted or
    trained in the same codec by somebody else about 0, whatever its changes' size.

    Returns:
        The median; None where the suspect has not the owner's layers.
    """
    shapes = {name: layer.weight.shape for name, layer in own.items()}
    if not own or {name: layer.weight.shape for name, layer in suspect.items()} != shapes:
        return None
    in_order = {name: _in_order_of(own[name], layer) for name, layer in suspect.items()}
    return max(_median_cosine(vanilla, own, other) for other in (suspect, in_order))


def _median_cosine(
    vanilla: Mapping[str, Convolution], own: Mapping[str, Convolution], suspect: Mapping[str, Convolution]
) -> float:
    cosines = []
    for name, layer in own.items():
        v, o, s = (_filters(each) for each in (vanilla[name], layer, suspect[name]))
        cosines.append(torch.cosine_similarity(s - v, o - v, dim=1))
    return float(torch.cat(cosines).nan_to_num().median())


def _filters(layer: Convolution) -> Tensor:
    """Weights and bias of every filter, (filters, weights)."""
    return torch.cat([layer.weight.flatten(1), layer.bias[:, None]], dim=1).detach().double()


def _in_order_of(own: Convolution, other: Convolution) -> Convolution:
    """The other layer with its channels in the order and of the scale of the own layer's."""
    order, scale = _counterparts(own.leaving, other.leaving)
    order_in, scale_in = _counterparts(own.entering, other.entering)
    weight = other.weight[order][:, order_in] * scale[:, None, None, None] / scale_in[None, :, None, None]
    return other._replace(weight=weight, bias=other.bias[order] * scale)


def _counterparts(own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """For every own channel: which of the other's it is, and how much larger than that it is."""
    sizes, others = (channels.norm(dim=1).clamp_min(torch.finfo(own.dtype).tiny) for channels in (own, other))
    correlations = (own / sizes[:, None]) @ (other / others[:, None]).T
    correlations = correlations.nan_to_num()  # of channels that a stranger's weights made infinite
    rows, columns = map(torch.as_tensor, linear_sum_assignment(correlations.numpy(), maximize=True))
    known = correlations[rows, columns] > RECOGNISED
    return columns, torch.where(known, sizes / others[columns], torch.ones_like(sizes))


def _sampled(channels: Tensor) -> Tensor:
    """(1, channels, h, w) -> (channels, positions), at most POSITIONS rows and columns of each; a copy."""
    step = math.ceil(max(channels.shape[-2:]) / POSITIONS)
    return channels[0, :, ::step, ::step].flatten(1).clone()


def _centred(channels: Tensor) -> Tensor:
    return channels - channels.mean(dim=1, keepdim=True)
