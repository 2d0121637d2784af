"""g_a and g_s of large pictures in strips, so that no activation at a picture's full resolution is ever whole.

Every layer of a ladder (`nn.Sequential`) sees so many rows around those that it gives, and no more; how many is found
with a row of numbers that are none. A layer keeps the rows of its input that it needs again, so that next to nothing is
computed twice. Whether a network then gives the same is tried once; where it does not, because it has sums over the
whole picture or windows that lie elsewhere, it runs whole. Latents are equal up to the last bits of a convolution. A
decoder computes the same tables' rows as the encoder: those come from h_s and context models, which see the whole
picture.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STRIP = 2**20  # pixels of a strip, about: a network of 192 channels keeps 0.8 GiB of it
PROBE, ACROSS = 64, 16  # rows and columns of what layers are tried with
UNITS = 6  # that a whole network is tried with
NOISE = 1e-4  # of the largest value: convolutions of other sizes may sum in another order


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else in the block."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class Stage(NamedTuple):
    """A layer, and which blocks of its input each block of its output needs; a block is the least that divides both."""

    layer: nn.Module
    rows_in: int  # of a block
    rows_out: int
    before: int  # blocks
    after: int


class _Flow:
    """Strips through one stage: rows in, the rows out that are known by then."""

    def __init__(self, stage: Stage, axis: int) -> None:
        self.stage, self.axis = stage, axis
        self.held: Tensor | None = None
        self.start = self.given = 0  # blocks: the first one that is held, and those that were given

    def push(self, rows: Tensor, last: bool) -> Tensor | None:
        """What follows from some more rows, and at the end from the border behind them."""
        layer, rows_in, rows_out, before, after = self.stage
        held = rows if self.held is None else torch.cat([self.held, rows], self.axis)
        end = self.start + held.shape[self.axis] // rows_in
        upto = end if last else end - after
        if upto <= self.given:
            self.held = held
            return None
        keep = max(upto - before, self.start)
        dropped = (keep - self.start) * rows_in
        # copied before the layer runs, which may write to its input; and a view would hold on to all of it
        self.held = held.narrow(self.axis, dropped, held.shape[self.axis] - dropped).clone()
        out: Tensor = layer(held.narrow(self.axis, 0, (end - self.start) * rows_in))
        out = out.narrow(self.axis, (self.given - self.start) * rows_out, (upto - self.given) * rows_out)
        self.start, self.given = keep, upto
        return out


class Ladder:
    """g_a or g_s, which works in strips while it is told to.

    Args:
        module: the transform, whose forward is another one meanwhile.
        name: what it is called, for the sentence where it has to run whole.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._known: dict[tuple[int, int, int], tuple[Stage, ...] | None] = {}

    @contextmanager
    def in_strips(self, size: Sequence[int], multiple: int, codec: str) -> Iterator[None]:
        """Work in strips in the block.

        Args:
            size: (b, 3, height, width) of the padded pictures.
            multiple: what their sides are multiples of; strips begin there.
            codec: what the user calls it.
        """
        if "forward" in vars(self.module):  # something stands in for it already
            yield
            return
        axis = -2 if size[-2] >= size[-1] else -1  # along the longer side, so that little is computed twice
        across = size[0] * size[-1 if axis == -2 else -2]
        units, each = size[axis] // multiple, max(1, STRIP // (across * multiple))
        plain = self.module.forward

        def forward(*inputs: Any, **named: Any) -> Any:
            x = inputs[0] if inputs else None
            if len(inputs) != 1 or named or not isinstance(x, Tensor) or x.ndim != 4 or x.shape[axis] % units:
                return plain(*inputs, **named)
            rows = x.shape[axis] // units
            key = (x.shape[1], rows, axis)
            if key not in self._known:
                self._known[key] = stages = _stages(self.module, x, rows, axis)
                if stages is None:
                    warnings.warn(
                        f"{codec}: {self.name} does not give the same in strips; large pictures go through it whole, "
                        "which takes memory",
                        stacklevel=2,
                    )
            stages = self._known[key]
            return plain(x) if stages is None else _through(stages, x, each * rows, axis)

        with replaced(self.module, forward):
            yield


def _through(stages: Sequence[Stage], x: Tensor, rows: int, axis: int) -> Tensor:
    """x through all stages, so many rows at a time."""
    flows = [_Flow(stage, axis) for stage in stages]
    length, whole, filled = Fraction(x.shape[axis]), None, 0
    for stage in stages:
        length *= Fraction(stage.rows_out, stage.rows_in)
    for start in range(0, x.shape[axis], rows):
        out: Tensor | None = x.narrow(axis, start, min(rows, x.shape[axis] - start))
        for flow in flows:
            out = None if out is None else flow.push(out, start + rows >= x.shape[axis])
        if out is None:
            continue
        if whole is None:
            shape = list(out.shape)
            shape[axis] = int(length)
            whole = out.new_empty(shape)
        whole.narrow(axis, filled, out.shape[axis]).copy_(out)
        filled += out.shape[axis]
    assert whole is not None
    return whole


def _stages(module: nn.Module, x: Tensor, unit: int, axis: int) -> tuple[Stage, ...] | None:
    """The stages of a network; None where it does not give the same in strips of `unit` rows."""
    layers = list(module) if type(module) is nn.Sequential else [module]
    stages = []
    try:
        with torch.autocast(x.device.type, enabled=False):
            probe = x.new_zeros(_shape(axis, x.shape[1], PROBE, ACROSS))
            for layer in layers:
                stage, channels = _stage(layer, probe, axis)
                if stage is None:
                    return None
                stages.append(stage)
                probe = x.new_zeros(_shape(axis, channels, PROBE, ACROSS))
            values = torch.Generator().manual_seed(0)
            trial = torch.rand(_shape(axis, x.shape[1], UNITS * unit, unit), generator=values).to(x.device, x.dtype)
            expected = type(module).forward(module, trial.clone())
            found = _through(stages, trial, unit, axis)
    except Exception:  # a stranger's layers may raise anything at sizes that they do not take; whole they say it
        return None
    same = expected.shape == found.shape and bool((found - expected).abs().max() <= NOISE * expected.abs().max())
    return tuple(stages) if same else None


def _stage(layer: nn.Module, probe: Tensor, axis: int) -> tuple[Stage | None, int]:
    """The stage of a layer, unless its rows depend on rows from afar, and the channels that it gives."""
    length = probe.shape[axis]
    ratio = Fraction(layer(probe.clone()).shape[axis], length)
    block = length // ratio.denominator // 2
    probe.narrow(axis, block * ratio.denominator, ratio.denominator).fill_(torch.nan)
    out: Tensor = layer(probe)
    others = [dimension for dimension in range(4) if dimension != axis % 4]
    reached = out.isnan().sum(others).nonzero().flatten() // ratio.numerator
    if not len(reached) or reached[0] == 0 or reached[-1] == out.shape[axis] // ratio.numerator - 1:
        return None, 0
    before, after = max(0, int(reached[-1]) - block), max(0, block - int(reached[0]))
    return Stage(layer, ratio.denominator, ratio.numerator, before, after), out.shape[1]


def _shape(axis: int, channels: int, along: int, across: int) -> tuple[int, ...]:
    return (1, channels, along, across) if axis == -2 else (1, channels, across, along)
