"""The state dict in what trainers write: under a key of a larger dict, with a wrapper's name before every key."""

import contextlib
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqdoor.errors import FreqdoorError

# Where training states keep the weights, in the order in which they are looked for; averages come last.
WRAPPERS = ("state_dict", "model_state_dict", "net_state_dict", "network", "model", "net", "params", "weights")
AVERAGES = ("model_ema", "ema_state_dict", "ema_model", "params_ema", "ema")
DEPTH = 4  # wrappers within wrappers


class Stored(NamedTuple):
    """A state dict as a file holds it, and what it lay in."""

    state: dict[str, Tensor]
    wrappers: tuple[str, ...] = ()  # keys of the larger dicts that it lay under, the outermost first
    beside: tuple[str, ...] = ()  # what else these dicts held


def hash_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """SHA-256 over a text and tensors: their names, types, shapes and bytes, in order of name."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        if tensor.numel():
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_safetensors(path: Path) -> bool:
    """Whether a file's first bytes are those of a safetensors file; its name says it where there is no such file."""
    head = b""
    if path.is_file():  # a pipe would let the program wait for ever
        with contextlib.suppress(OSError), path.open("rb") as file:
            head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:] == b"{" and head[6:8] == b"\0\0")


def unwrapped(content: object, path: Path) -> Stored:
    """The names and tensors in what a PyTorch file holds, whatever training state they lie in."""
    state: Any = content
    wrappers: list[str] = []
    beside: list[str] = []
    for _ in range(DEPTH):
        if not isinstance(state, dict):
            break
        wrapper = next((key for key in (*WRAPPERS, *AVERAGES) if isinstance(state.get(key), dict)), None)
        if wrapper is None:
            break
        wrappers.append(wrapper)
        beside += [str(key) for key in state if key != wrapper]
        state = state[wrapper]
    if not (
        isinstance(state, dict)
        and state
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())
    ):
        held = f" of {', '.join(str(key)[:40] for key in list(state)[:6])}" if isinstance(state, dict) and state else ""
        raise FreqdoorError(
            f"{path}: expected a state dict (names to tensors), alone or under one of {', '.join(WRAPPERS)}, found "
            f"{type(state).__name__}{held}"
        )
    return Stored(dict(state), tuple(wrappers), tuple(beside))


def prefix_of(state: Mapping[str, Tensor], path: Path) -> str:
    """What stands before g_a in a codec's state dict; empty where nothing does.

    It is `module.` of DataParallel, `net.` or `model.` of Lightning, `_orig_mod.` of torch.compile, or several of them.

    Raises:
        FreqdoorError: several networks.
    """
    prefixes = {match[1] for key in state if (match := re.match(r"((?:\w+\.)*?)g_a\.", key))}
    if "" in prefixes or not prefixes:
        return ""
    if len(prefixes) > 1:
        raise FreqdoorError(f"{path}: holds several codecs ({', '.join(sorted(prefixes))}); save one of them alone")
    return prefixes.pop()


def bare(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A codec's state dict as its network names it: no prefixes of wrappers, and float32.

    Beside a network under a prefix, everything else (losses, counters) is left out.
    """
    prefix = prefix_of(state, path)
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value.to(torch.float32) if value.is_floating_point() else value for key, value in state.items()}
