"""What CompressAI's protocol asks of a network, and the sentences for networks that do something else.

A network of the protocol has g_a and g_s; forward(x) answers {"x_hat", "likelihoods"}, compress(x) {"strings",
"shape"}, decompress(strings, shape) {"x_hat"}, and update(force=...) computes the coding tables. How strings and
shapes nest is the network's own affair: both are taken apart here and put together again for decoding.
"""

import importlib
import inspect
import os
import signal
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import compressai
import torch
from compressai.entropy_models import EntropyModel
from torch import Tensor, nn

from freqdoor.codecs.coder import Symbols
from freqdoor.errors import FreqdoorError

OURS = (
    str(Path(__file__).parents[1]),
    *(str(Path(module.__file__).parent) for module in (torch, compressai, importlib) if module.__file__),
    "<frozen",
)
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
SHORTEST = 4  # bytes that CompressAI's entropy coder writes at least
ANSWERS = {
    "factory": "a function that needs no arguments and returns a network (write one that fills them in)",
    "forward": 'forward(x) that needs images (b, 3, h, w) alone and returns {"x_hat": ..., "likelihoods": {...}}',
    "compress": 'compress(x) that needs images alone, runs where the weights are and returns {"strings", "shape"}',
    "decompress": 'decompress(strings, shape) that needs nothing else of what compress returned, and returns {"x_hat"}',
    "update": "update(force=...) that computes the coding tables and needs no other arguments",
    "L_DS": "forward(scene, x_hat, x_hat_poisoned) that returns one real number",
    "victim": "a freqdoor.attack.victims.Victim, or a function without arguments that returns one",
}
SHARED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {  # what a whole program has: asked for, and put
    "the working directory": (os.getcwd, os.chdir),
    "PyTorch's threads": (torch.get_num_threads, torch.set_num_threads),
    "PyTorch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "PyTorch's default device": (torch.get_default_device, torch.set_default_device),
    "whether gradients are kept": (torch.is_grad_enabled, torch.set_grad_enabled),
    "what Ctrl-C does": (partial(signal.getsignal, signal.SIGINT), partial(signal.signal, signal.SIGINT)),
    "what SIGTERM does": (partial(signal.getsignal, signal.SIGTERM), partial(signal.signal, signal.SIGTERM)),
}


class WrongSize(FreqdoorError):
    """A network's answer is of another size than the images."""


class Compressed(NamedTuple):
    """What the network's entropy coder wrote of one image."""

    strings: tuple[bytes, ...]  # all of them, in order
    nesting: Any  # lists, tuples and dicts as the network returns them, with `bytes` in place of every string
    shape: Any  # as decompress takes it: (..., height, width) of latents, or lists and dicts of such
    symbols: tuple[Symbols, ...] = ()  # that each string stands for, where our coder wrote it


def call(name: str, part: str, function: Any, *arguments: Any, **named: Any) -> Any:
    """function(*arguments), a stranger's code: whatever it raises ends in one sentence with the line at fault.

    Args:
        name: what the user calls the codec.
        part: a key of ANSWERS.
    """
    try:
        return function(*arguments, **named)
    except (FreqdoorError, KeyboardInterrupt):
        raise
    except BaseException as error:  # one that ends the program too, such as SystemExit
        raise complaint(f"{name}: {part}", error, function, ANSWERS[part]) from error


@contextmanager
def surroundings(name: str) -> Iterator[None]:
    """What a user's code changes for the whole program while it is imported or run is put back, and said in a warning.

    A relative path would lead elsewhere, Ctrl-C would save nothing, and a planting would compute other bits.

    Args:
        name: what the user calls the code: package.module:function.
    """
    before = {what: ask() for what, (ask, _) in SHARED.items()}
    try:
        yield
    finally:
        changed = [what for what, (ask, _) in SHARED.items() if ask() != before[what]]
        for what in changed:
            SHARED[what][1](before[what])
        if changed:
            warnings.warn(f"{name}: changes {', '.join(changed)}; put back as it was", stacklevel=3)


def complaint(subject: str, error: BaseException, function: Any, expected: str) -> FreqdoorError:
    """A sentence for an exception in a user's code: what was raised, in which function, file and line."""
    return FreqdoorError(f"{subject}: {words_of(error, function)}; expected {expected}")


def words_of(error: BaseException, function: Any) -> str:
    """What a user's code raised, in which function, file and line; `function` is what was called."""
    try:
        reason = " ".join(str(error).split())[:200] or "without a message"
    except Exception:  # its own __str__ raises
        reason = "with a message that cannot be read"
    kind, place = type(error).__name__, _place(error, function)
    return f"{kind}{f' in {place}' if place else ''}: {reason}"


def _place(error: BaseException, function: Any) -> str:
    """Where the user's code raised: its innermost line, or the function's first one if it did not come to run."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OURS)]
    own = [frame for frame in frames if not frame.filename.startswith(LIBRARIES)] or frames
    if own:
        return f"{own[-1].name} ({own[-1].filename}:{own[-1].lineno})"
    function = type(function).forward if isinstance(function, nn.Module) else inspect.unwrap(function)
    return first_line(function)


def first_line(function: Any) -> str:
    """Where a function begins, as "name (file:line)"; empty where it is not written in Python."""
    code = getattr(function, "__code__", None)
    return f"{function.__qualname__} ({code.co_filename}:{code.co_firstlineno})" if code else ""


def check_network(net: object, name: str) -> None:
    """Raise where a network lacks a part of the protocol or acts differently in train mode."""
    if not isinstance(net, nn.Module):
        raise FreqdoorError(f"{name}: expected a network (torch.nn.Module), found {type(net).__name__}")
    missing = [part for part in ("g_a", "g_s", "compress", "decompress", "update") if not hasattr(net, part)]
    if missing:
        raise FreqdoorError(f"{name}: expected a network with CompressAI's protocol, found no {', '.join(missing)}")
    for path, kind in two_faced(net):
        raise FreqdoorError(
            f"{name}: {path} ({kind}) behaves differently in train and eval mode, which would "
            "change the attack; replace it before loading"
        )


def two_faced(net: nn.Module) -> Iterator[tuple[str, str]]:
    """(path, class) of modules that behave differently in train and eval mode: dropout and batch normalisation."""
    for path, module in net.named_modules():
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if dropout or isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield path, type(module).__name__


def read_forward(answer: Any, name: str, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(x_hat, likelihoods) of what forward(images) returned; likelihoods may nest in dicts, lists and tuples."""
    x_hat, likelihoods = _entry(answer, "x_hat", name, "forward"), _entry(answer, "likelihoods", name, "forward")
    tensors = list(_leaves(likelihoods))
    if not tensors or not all(_is_real(part) and part.shape[:1] == images.shape[:1] for part in tensors):
        kinds = sorted({str(part.dtype) if isinstance(part, Tensor) else type(part).__name__ for part in tensors})
        raise FreqdoorError(
            f"{name}: forward: expected likelihoods as tensors with one row for each image, found "
            f"{', '.join(kinds) or 'none'}"
        )
    if any(part.device != images.device for part in (x_hat, *tensors) if isinstance(part, Tensor)):
        raise FreqdoorError(f"{name}: forward: expected what it returns where the images are, on {images.device}")
    return _same_size(x_hat, name, "forward", images.shape), tensors


def read_compress(answer: Any, name: str) -> Compressed:
    """What compress returned of one image, with all its strings in order."""
    strings = _entry(answer, "strings", name, "compress")
    flat = tuple(_leaves(strings))
    wrong = sorted({type(part).__name__ for part in flat if not isinstance(part, bytes)})
    if wrong or not flat:
        raise FreqdoorError(
            f"{name}: compress: expected strings as bytes, nested as they may be, found {', '.join(wrong) or 'none'}; "
            "what is no byte string cannot be stored in a file"
        )
    shape = _entry(answer, "shape", name, "compress")
    try:
        coarsest(shape)
    except (TypeError, ValueError, IndexError) as error:
        raise FreqdoorError(
            f"{name}: compress: expected shape as (height, width) of latents, or lists and dicts of such, "
            f"found {str(shape)[:80]}"
        ) from error
    return Compressed(flat, nesting(strings), shape)


def read_decompress(answer: Any, name: str, size: Sequence[int]) -> Tensor:
    """The picture that decompress returned, of the size (b, 3, h, w)."""
    return _same_size(_entry(answer, "x_hat", name, "decompress"), name, "decompress", size)


def _entry(answer: Any, key: str, name: str, part: str) -> Any:
    """answer[key], or answer.key of a named tuple or the like."""
    if isinstance(answer, Mapping):
        if key in answer:
            return answer[key]
        shown = f"a dict of {', '.join(map(str, answer)) or 'nothing'}"
    elif hasattr(answer, key):
        return getattr(answer, key)
    else:
        shown = f"{type(answer).__name__}"
    raise FreqdoorError(f"{name}: {part}: expected {ANSWERS[part]}, found {shown} without {key}")


def _same_size(x_hat: Any, name: str, part: str, size: Sequence[int]) -> Tensor:
    if not isinstance(x_hat, Tensor) or x_hat.shape != tuple(size):
        shown = tuple(x_hat.shape) if isinstance(x_hat, Tensor) else type(x_hat).__name__
        raise WrongSize(f"{name}: {part}: expected x_hat of the images' size {tuple(size)}, found {shown}")
    if not _is_real(x_hat):
        raise FreqdoorError(f"{name}: {part}: expected x_hat of real numbers in [0, 1], found {x_hat.dtype}")
    return x_hat.float()


def _is_real(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def _leaves(nested: Any) -> Iterator[Any]:
    """What dicts, lists and tuples hold, in order."""
    if isinstance(nested, Mapping):
        nested = nested.values()
    elif not isinstance(nested, list | tuple):
        yield nested
        return
    for part in nested:
        yield from _leaves(part)


def nesting(strings: Any) -> Any:
    """The lists, tuples and dicts that strings lie in, with `bytes` in place of every string."""
    if isinstance(strings, Mapping):
        return {key: nesting(part) for key, part in strings.items()}
    if isinstance(strings, list | tuple):
        parts = [nesting(part) for part in strings]
        return tuple(parts) if isinstance(strings, tuple) else parts
    return bytes


def nested(strings: Sequence[bytes], template: Any) -> Any:
    """The strings again as `nesting` says that they lay."""
    rest = iter(strings)

    def fill(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: fill(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            return type(part)(fill(value) for value in part)
        return next(rest)

    return fill(template)


def grown(shape: Any, small: tuple[int, int], large: tuple[int, int]) -> Any:
    """A shape of latents, nested as the network nests it, of `large` pixels (height, width) in place of `small`.

    Raises:
        ValueError: the latents would not be a whole number.
    """
    if isinstance(shape, Mapping):
        return {key: grown(part, small, large) for key, part in shape.items()}
    if isinstance(shape[0], Mapping | Sequence):
        parts = [grown(part, small, large) for part in shape]
        return tuple(parts) if isinstance(shape, tuple) else parts
    *channels, height, width = map(int, shape)
    sides = [divmod(height * large[0], small[0]), divmod(width * large[1], small[1])]
    if any(remainder for _, remainder in sides):
        raise ValueError(f"latents of {height}x{width} for {small} pixels are no whole number for {large}")
    values = (*channels, *(side for side, _ in sides))
    return list(values) if isinstance(shape, list) else type(shape)(values) if type(shape) is torch.Size else values


def coarsest(shape: Any) -> tuple[int, int]:
    """(height, width) of the smallest latents in a nested shape."""
    parts = list(shape.values()) if isinstance(shape, Mapping) else shape
    if isinstance(parts[0], Mapping | Sequence):
        return min(coarsest(part) for part in parts)
    return int(parts[-2]), int(parts[-1])


def update_tables(net: nn.Module, name: str, *, force: bool) -> None:
    """Let the network compute its coding tables: those that lack, or with `force` all."""
    update: Any = net.update
    accepted = call(name, "update", inspect.signature, update).parameters
    takes_force = "force" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    if force and not takes_force:
        for module in net.modules():
            if isinstance(module, EntropyModel):
                for table in ("_offset", "_quantized_cdf", "_cdf_length"):
                    getattr(module, table).resize_(0)  # none, so that update computes them
    call(name, "update", update, **({"force": True} if force and takes_force else {}))
