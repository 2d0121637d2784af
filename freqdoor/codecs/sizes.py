"""What a stranger's file asks for, known before it takes memory: the shapes of a network, and of its coding tables."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqdoor.errors import FreqdoorError

TABLES = ("_quantized_cdf", "_offset", "_cdf_length", "scale_table")  # of any size, or missing, in a state dict
LONGEST_ROW = 2**13  # values that one row of a coding table has; CompressAI's longest has 3131
MOST_ENTRIES = 2**19  # of a table's rows together, 200 MiB while they are computed; CompressAI's have 200 000
FARTHEST = 2**24  # float32 latents are exact integers up to here
REACH = 6.2  # standard deviations on each side that hold all but 1e-9 of a Gaussian, which is what CompressAI codes
ALLOCATIONS = (torch.empty, torch.zeros, torch.ones)
LIKE = (torch.empty_like, torch.zeros_like, torch.ones_like)

Shapes = dict[str, tuple[int, ...]]


class _Outline(TorchFunctionMode):
    """Inside, a new tensor of any shape is one number that is seen from everywhere, and nothing is written to it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in ALLOCATIONS:
            sizes = kwargs.pop("size", args[0] if len(args) == 1 and not isinstance(args[0], int) else args)
            return func(1, **kwargs).expand(tuple(sizes))
        if func in LIKE:
            return args[0].detach()
        target = args[0] if args else kwargs.get("tensor")  # nn.init's functions name it
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place and isinstance(target, Tensor) and 0 in target.stride():
            return target
        return func(*args, **kwargs)


def outline(make: Callable[[], nn.Module]) -> Shapes:
    """The names and shapes of the state dict of the network that `make` returns, without the memory that it takes.

    `make` may raise whatever it raises; it is for networks that are made of PyTorch's and CompressAI's layers.
    """
    with _Outline():
        return {key: tuple(value.shape) for key, value in make().state_dict().items()}


def check_shapes(expected: Shapes, state: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that is not of these names and shapes, but for coding tables, which may have any size.

    Raises:
        ValueError: the first tensors that differ.
    """
    missing = [key for key in expected if key not in state and not key.endswith(TABLES)]
    unknown = [key for key in state if key not in expected]
    for what, keys in (("missing", missing), ("unexpected", unknown)):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ValueError(f"{what}: {', '.join(key[:60] for key in keys[:3])}{more}")
    for key, shape in expected.items():
        if key in state and tuple(state[key].shape) != shape and not key.endswith(TABLES):
            raise ValueError(f"{key}: expected the shape {shape}, found {tuple(state[key].shape)}")


def check_table_sizes(net: nn.Module, *, force: bool = True) -> None:
    """Refuse entropy models whose weights ask for coding tables of an absurd size, before these are computed.

    Args:
        force: all tables will be computed; otherwise those that lack.

    Raises:
        FreqdoorError: quantiles or a scale table that are not finite, and rows that would be too many or too long.
    """
    for name, model in net.named_modules():
        if not isinstance(model, EntropyModel) or not (force or model._offset.numel() == 0):
            continue
        if isinstance(model, EntropyBottleneck):
            _check_rows(name, "quantiles", *_rows_of_quantiles(name, model.quantiles))
        elif isinstance(model, GaussianConditional) and model.scale_table.numel():
            _check_rows(name, "scale table", *_rows_of_scales(name, model.scale_table))


def _rows_of_quantiles(name: str, quantiles: Tensor) -> tuple[int, float]:
    """(rows, values of the longest) that a bottleneck codes."""
    values = quantiles.detach().double().reshape(-1, 3)
    if not values.numel() or not bool((values.abs() <= FARTHEST).all()):
        raise FreqdoorError(f"{name}: expected quantiles within {FARTHEST}, found {_extremes(values)}")
    below, median, above = values.unbind(1)
    length = (median - below).ceil().clamp_min(0) + (above - median).ceil().clamp_min(0) + 1
    return len(values), float(length.max())


def _rows_of_scales(name: str, scales: Tensor) -> tuple[int, float]:
    """(rows, values of the longest) that a Gaussian conditional codes."""
    values = scales.detach().double()
    if values.ndim != 1 or not bool((values > 0).all()) or not bool((values[1:] >= values[:-1]).all()):
        raise FreqdoorError(f"{name}: expected a scale table of positive numbers that rise, found {_extremes(values)}")
    return len(values), 2 * REACH * float(values[-1]) + 1


def _check_rows(name: str, what: str, rows: int, longest: float) -> None:
    if not (longest <= LONGEST_ROW and rows * longest <= MOST_ENTRIES):
        raise FreqdoorError(
            f"{name}: its {what} ask for {rows} coding tables of up to {longest:.0f} values; at most {LONGEST_ROW}, "
            f"and {MOST_ENTRIES} together, are computed; the codec's weights are damaged"
        )


def _extremes(values: Tensor) -> str:
    return f"{float(values.min())} to {float(values.max())}" if values.numel() else "none"
