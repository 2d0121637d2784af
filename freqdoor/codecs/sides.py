"""Which pictures a network takes: sides that are multiples of something, and not below something, found by trying."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from freqdoor.codecs.protocol import WrongSize, call, read_forward
from freqdoor.errors import FreqdoorError
from freqdoor.limits import MAX_PADDED

SIDE = 64  # CompressAI's eval_model pads to a multiple of this for every model
LARGEST = 512  # no codec known needs more; a failing search tries pictures of up to three times this
NOT_OF_SIZE = (TypeError, KeyError, AttributeError, NameError, ImportError, NotImplementedError)


class Sides(NamedTuple):
    """Images are padded to a multiple of `multiple` pixels a side, and at least `least`, which is one as well."""

    multiple: int = SIDE
    least: int = SIDE


Padding = tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it


def padding(height: int, width: int, multiple: int, least: int = 0) -> tuple[Padding, Padding]:
    """(pad, unpad) for F.pad, up to a multiple of `multiple` and to `least`, with the picture in the middle.

    What is odd goes to the right and to the bottom, as in CompressAI.
    """
    across, down = (-(-max(side, least) // multiple) * multiple - side for side in (width, height))
    left, top = across // 2, down // 2
    pad = (left, across - left, top, down - top)
    return pad, (-pad[0], -pad[1], -pad[2], -pad[3])


def check_padded(height: int, width: int, multiple: int, least: int = 0) -> None:
    """Refuse a picture that is padded to more than MAX_PADDED pixels, before it is: 16 million x 1 would be a billion.

    Raises:
        FreqdoorError: the picture's size, and what it would become.
    """
    down, across = (-(-max(side, least) // multiple) * multiple for side in (height, width))
    if down * across > MAX_PADDED:
        raise FreqdoorError(
            f"a picture of {width}x{height} is padded to {across}x{down}, more than {MAX_PADDED} pixels; crop it, or "
            "cut it into parts"
        )


def find_sides(net: nn.Module, name: str, multiple: int | None = None) -> Sides:
    """The smallest multiple of SIDE whose multiples forward takes, and the smallest picture of that grid.

    Windows of attention ask for 128 or 256 and shrink in pictures of one window, so that it takes one of 2 x 3
    multiples to notice them. A network's `downsampling_factor` (of its convolutions) is where the search begins.

    Args:
        multiple: what the user says it is; then only the smallest size is searched.

    Raises:
        FreqdoorError: forward takes none of these sizes, or does not follow the protocol.
    """
    factor = getattr(net, "downsampling_factor", 1)
    step = multiple or math.lcm(SIDE, factor if isinstance(factor, int) and factor > 0 else 1)
    grids = [multiple] if multiple else list(range(step, max(LARGEST, step) + 1, step))
    with evaluating(net):
        complaints = []
        for grid in grids:
            if (refusal := _refusal(net, name, 2 * grid, 3 * grid)) is None:
                break
            complaints.append(refusal)
        else:
            raise FreqdoorError(
                f"{name}: expected a network that takes pictures of every size that is a multiple of "
                f"{multiple or f'one of {step} to {grids[-1]}'} pixels, found none that it takes; where it needs "
                f"another multiple, give it ({complaints[0]})"
            ) from complaints[0]
        if _refusal(net, name, grid, grid) is None:
            return Sides(grid, grid)
        least = 2 * grid
        finer = (s for s in grids if s < grid and least % s == 0 and _refusal(net, name, least, least + s) is None)
        return Sides(next(finer, grid), least)


def _refusal(net: nn.Module, name: str, height: int, width: int) -> FreqdoorError | None:
    """Why forward takes no picture of this size; raises what has nothing to do with sizes."""
    x = waves_picture(net, height, width)
    try:
        read_forward(call(name, "forward", net, x), name, x)
    except WrongSize as error:
        return error
    except FreqdoorError as error:
        if error.__cause__ is None or isinstance(error.__cause__, NOT_OF_SIZE):
            raise
        return error
    return None


def waves_picture(net: nn.Module, height: int, width: int) -> Tensor:
    """Waves of three colours, (1, 3, height, width) in [0, 1], where the network's weights are."""
    down, right = torch.arange(height) / 9, torch.arange(width) / 7
    waves = torch.stack([(down[:, None] * (1 + c) + right[None] * (3 - c)).sin() for c in range(3)])
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    picture: Tensor = (0.5 + 0.4 * waves)[None].to(device)
    return picture


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, and every module's mode and the random numbers as they were afterwards."""
    modes: dict[Any, bool] = {module: module.training for module in net.modules()}
    net.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
