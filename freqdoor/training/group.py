"""Processes that train one thing together: each passes its rows of every batch, and all take the same step.

What passes each picture by itself, codec and triggers, passes the rows of this process and gives back those of all
(`Group.sharing`). All else, the losses first of all, is computed from the whole batch by every process, so that it is
what one process computes, maxima over a batch and norms of gradients included. The gradient of a weight that is used in
shared passes alone is the sum over processes (`Group.sum_gradients`).
"""

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from freqdoor.codecs.adapter import Codec
from freqdoor.data import Crops
from freqdoor.errors import FreqdoorError
from freqdoor.types import Images, Reconstruction


class Separated(RuntimeError):
    """Another process of the group is gone."""


@dataclass(frozen=True)
class Group:
    """This process among those that train together; the default is one process, for which nothing changes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def rows(self, number: int) -> slice:
        """The share of this process in a batch of so many pictures."""
        each, more = divmod(number, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    @torch.no_grad()
    def gathered(self, mine: Tensor, number: int) -> Tensor:
        """A batch of so many pictures of which every process has its rows; in the memory layout of these."""
        if self.size == 1:
            return mine
        mine = mine if _dense(mine) else mine.contiguous()
        each = mine.numel() // len(mine)
        others = [Group(rank, self.size).rows(number) for rank in range(self.size)]
        lengths = [each * (rows.stop - rows.start) for rows in others]
        padded = mine.new_zeros(max(lengths))
        padded[: mine.numel()] = mine.as_strided((mine.numel(),), (1,))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with _connected():
            dist.all_gather(parts, padded)
        flat = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        return flat.as_strided((number, *mine.shape[1:]), (each, *mine.stride()[1:]))

    def decoded(self, crops: Crops) -> slice | None:
        """The rows of a batch that this process decodes: all where pictures may be broken, which all have to know."""
        return None if self.size == 1 or crops.skip_broken else self.rows(crops.batch_size)

    def batch(self, crops: Crops, x: Images, device: str) -> Images:
        """A whole batch on the device, of the `decoded` rows of it."""
        x = x.to(device)
        return x if self.decoded(crops) is None else self.gathered(x, crops.batch_size)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every process the sum of all processes' gradients; those of a parameter lack everywhere or nowhere."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.size == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _connected():
            dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])  # type: ignore[no-untyped-call]
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def of_first(self, value: Any, device: str) -> Any:
        """The first process's value, as `torch.save` takes it; tensors come on the CPU."""
        if self.size == 1:
            return value
        buffer = io.BytesIO()
        if self.first:
            torch.save(value, buffer)
        content = torch.frombuffer(bytearray(buffer.getvalue() or b"-"), dtype=torch.uint8).to(device)
        length = torch.tensor([len(content)], device=device)
        with _connected():
            dist.broadcast(length, 0)
            content = content if self.first else content.new_empty(int(length))
            dist.broadcast(content, 0)
        return torch.load(io.BytesIO(content.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)

    @contextlib.contextmanager
    def sharing(self, codec: Codec, triggers: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Share the passes through a codec and triggers in the block; batches of fewer pictures than processes are not.

        Raises:
            FreqdoorError: a codec that draws other random numbers than quantisation noise.
        """
        if self.size == 1:
            yield
            return
        vars(codec)["forward"] = partial(self._codec, codec, codec.forward)
        for trigger in triggers:
            vars(trigger)["forward"] = partial(self._trigger, trigger.forward)
        try:
            yield
        finally:
            for module in (codec, *triggers):
                del vars(module)["forward"]

    def _trigger(
        self, forward: Callable[..., Images], x: Images, *, mask: Tensor | None = None, **given: Any
    ) -> Images:
        if len(x) < self.size:
            return forward(x, mask=mask, **given)
        own = None if mask is None else _Own.apply(self, mask)
        x_p: Images = _Whole.apply(self, forward(_Own.apply(self, x), mask=own, **given), len(x))
        return x_p

    def _codec(self, codec: Codec, forward: Callable[[Images], Reconstruction], x: Images) -> Reconstruction:
        if len(x) < self.size:
            return forward(x)
        latents: list[Tensor] = []

        def through_all(module: nn.Module, inputs: tuple[Any, ...], y: Any) -> Any:
            if latents or not isinstance(y, Tensor):  # a network that the codec refuses
                return None
            latents.append(_Whole.apply(self, y, len(x)))
            return _Own.apply(self, latents[0])  # so that a gradient with respect to all latents has all that follows

        hook = codec.part("g_a").register_forward_hook(through_all)
        draws = _WholeDraws(self.rows(len(x)), len(x), codec.spec.name)
        try:
            with draws:
                out = forward(_Own.apply(self, x))
        finally:
            hook.remove()
        draws.check()
        x_hat, bits = (_Whole.apply(self, part, len(x)) for part in (out.x_hat, out.bits))
        return Reconstruction(x_hat, bits, out.num_pixels, latents[0])


ALONE = Group()


class _Own(torch.autograd.Function):
    """The rows of this process, of a batch that all processes have; the gradient is that of all rows."""

    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor) -> Tensor:
        ctx.group, ctx.number = group, len(x)
        return x[group.rows(len(x))].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.group.gathered(gradients[0], ctx.number)


class _Whole(torch.autograd.Function):
    """The batch, of which each process has its rows; the gradient is that of the own rows."""

    @staticmethod
    def forward(ctx: Any, group: Group, mine: Tensor, number: int) -> Tensor:
        ctx.group, ctx.number = group, number
        return group.gathered(mine, number)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        return None, gradients[0][ctx.group.rows(ctx.number)], None


class _WholeDraws(TorchFunctionMode):
    """Noise for the own rows that is what one process draws for them: of each draw for the whole batch, these rows.

    Quantisation noise comes from `Tensor.uniform_` in CompressAI's `EntropyModel.quantize`: of (b, ...), and in its
    entropy bottleneck of (channels, 1, b h w), picture after picture.

    Args:
        name: the codec's.
    """

    def __init__(self, rows: slice, number: int, name: str) -> None:
        super().__init__()
        self._rows, self._number, self._name = rows, number, name
        self._state = _random_state()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not Tensor.uniform_:
            return function(*args, **(kwargs or {}))
        mine, own = args[0], self._rows.stop - self._rows.start
        if mine.dim() == 3 and mine.shape[1] == 1 and mine.shape[2] % own == 0:
            each = mine.shape[2] // own
            whole = mine.new_empty((mine.shape[0], 1, each * self._number))
            share: tuple[Any, ...] = (..., slice(each * self._rows.start, each * self._rows.stop))
        elif len(mine) == own and _dense(mine):
            each = mine.numel() // own
            whole = mine.new_empty_strided((self._number, *mine.shape[1:]), (each, *mine.stride()[1:]))
            share = (self._rows,)
        else:
            raise self._refusal()
        whole.uniform_(*args[1:], **(kwargs or {}))
        self._state = _random_state()
        return mine.copy_(whole[share])

    def check(self) -> None:
        """Raise if the pass has drawn other numbers, of which each process would have its own."""
        if not all(torch.equal(a, b) for a, b in zip(self._state, _random_state(), strict=True)):
            raise self._refusal()

    def _refusal(self) -> FreqdoorError:
        return FreqdoorError(
            f"{self._name}: its pass draws random numbers in another way than CompressAI's quantisation noise, so that "
            "several processes would draw others than one; train it with --devices 1"
        )


def _random_state() -> list[Tensor]:
    """The state of the generators that a pass draws from."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _dense(x: Tensor) -> bool:
    """Whether pictures lie one after the other in memory, without gaps."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


@contextlib.contextmanager
def _connected() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Separated(" ".join(str(error).split())[:200]) from error
