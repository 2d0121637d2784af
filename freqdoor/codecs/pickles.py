"""PyTorch's checkpoints, which are pickles: nothing that they name runs, and none takes more memory than it has."""

import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch

from freqdoor.codecs.state import Stored, unwrapped
from freqdoor.errors import FreqdoorError
from freqdoor.limits import check_memory, file_size

LONGEST_TABLE = 4 * 2**20  # bytes that say which tensors a file holds: of a large network 50 000
WIDEST = 4  # bytes of a tensor's element to one of the file's: float32 of what is stored in 8 bits, or twice in 16
MARK = pickletools.markobject
NAME = r"[\w.-]+ [\w.-]+"  # of code; where a text is read as a pickle by chance, there is more in it
LEGACY = 5  # pickles in a file of PyTorch before 1.6: a number, a version, a system, the content, the storages' names
READING = (  # what zipfile, pickletools and PyTorch raise on a damaged file
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError),
    *(AssertionError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile),
)
DTYPES = (  # what weights, counters and coding tables are in
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
GLOBALS = (  # what a state dict in a pickle is made of; of all else that PyTorch takes, some allocates at will
    *("collections OrderedDict", "collections Counter", "_codecs encode", "__builtin__ set", "builtins set"),
    *("torch Size", "torch device", "torch.nn.parameter Parameter", "torch._tensor _rebuild_from_type_v2"),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "parameter", "parameter_with_state")),
)


class CodeInPickle(FreqdoorError):
    """A file that would run code if it was loaded as Python's pickles are."""


def read_pickle(path: Path) -> Stored:
    """The state dict in a PyTorch file, without running anything that the file contains.

    Tensors of today's format, a zip archive, are those of the file itself, mapped into memory and not copied.

    Raises:
        CodeInPickle: a file that names code which no state dict needs.
        FreqdoorError: a damaged file, one that holds no state dict, or one that would take more memory than is allowed.
    """
    size = file_size(path, "a checkpoint file")
    try:
        zipped = _check_pickle(path, size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on odd pickles; the sentences below say what matters
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:120]
        raise CodeInPickle(
            f"{path}: refused: this file is not a plain state dict, loading it could run code ({reason}); "
            "ask for a state dict or a safetensors file"
        ) from None
    except READING as error:
        raise FreqdoorError(f"{path}: not a readable PyTorch checkpoint ({str(error)[:120]})") from None
    stored = unwrapped(content, path)
    state = stored.state
    for key, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in DTYPES:
            raise FreqdoorError(f"{path}: {key[:80]}: expected plain numbers, found {value.dtype}, {value.layout}")
    # a tensor that is spread over fewer numbers than it has, or many tensors that are the same numbers
    claimed = sum(value.numel() * value.element_size() for value in state.values())
    if claimed > WIDEST * size:
        raise FreqdoorError(f"{path}: its tensors claim to be {claimed} bytes, and the file has {size}; it is damaged")
    check_memory(2 * sum(WIDEST * value.numel() for value in state.values()), "its tensors and their network", path)
    return stored


def _check_pickle(path: Path, size: int) -> bool:
    """Whether a PyTorch file is a zip archive; raises where reading it would take more than the file has.

    Raises:
        UnpicklingError: names of code that no state dict needs; some make PyTorch take memory at will.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            check_memory(size, "the whole file", path)
            file.seek(0)
            for _ in range(LEGACY):
                _check_globals(file)
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        packed = any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries)
        if packed or len({entry.filename.lower() for entry in entries}) < len(entries) or len(pickles) != 1:
            raise ValueError("expected an archive of one data.pkl without compression, as PyTorch writes it")
        if pickles[0].file_size > LONGEST_TABLE:
            raise ValueError(f"expected a data.pkl of at most {LONGEST_TABLE} bytes, found {pickles[0].file_size}")
        with archive.open(pickles[0]) as file:
            _check_globals(file)
        if damaged := archive.testzip():
            warnings.warn(f"{path}: the checksum of its part {damaged[:80]} is wrong; it may be damaged", stacklevel=2)
    return True


def _check_globals(file: IO[bytes]) -> None:
    """Read one pickle without doing what it says; raises UnpicklingError at a name that is not in GLOBALS."""
    for operation, argument, place in pickletools.genops(file):
        if place is not None and place > LONGEST_TABLE:
            raise ValueError(f"expected a pickle of at most {LONGEST_TABLE} bytes, found more")
        if operation.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"an operation of pickles that PyTorch does not write, {operation.name}")
        if operation.name == "GLOBAL" and not _is_plain(str(argument)):
            raise pickle.UnpicklingError(f"it names {str(argument)[:60]}")


def code_in(path: Path) -> tuple[str, ...]:
    """The names of code that a PyTorch file, or any pickle, mentions and no state dict needs, as "module.name".

    Nothing of the file is run, and a damaged one is read as far as it can be.
    """
    names: dict[str, None] = {}
    with suppress(*READING), path.open("rb") as file:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for entry in archive.infolist():
                    if entry.filename.lower().endswith(".pkl"):
                        with suppress(*READING), archive.open(entry) as part:
                            names |= dict.fromkeys(_names(part))
        else:
            for _ in range(LEGACY):
                for name in _names(file):
                    names[name] = None
    return tuple(name.replace(" ", ".") for name in names if not _is_plain(name) and re.fullmatch(NAME, name))


def _names(file: IO[bytes]) -> Iterator[str]:
    """Every "module name" that a pickle mentions, in order, without doing what it says.

    Newer pickles take a name from the two texts on top of the stack, which is followed as `pickletools.dis` does.
    """
    stack: list[Any] = []
    kept: dict[Any, Any] = {}
    for operation, argument, place in pickletools.genops(file):
        if place is not None and place > LONGEST_TABLE:
            return
        name, before = operation.name, list(operation.stack_before)
        if MARK in before or (name == "POP" and stack[-1:] == [MARK]):
            while stack and stack.pop() is not MARK:
                pass
            before = before[: before.index(MARK)] if MARK in before else []
        top = stack[len(stack) - len(before) :]
        if name in ("GLOBAL", "INST"):
            yield str(argument)
        elif name == "STACK_GLOBAL":
            yield " ".join(map(str, top))
        elif name.startswith("EXT"):
            yield f"copyreg extension_{argument}"
        if name == "MEMOIZE" or name.endswith("PUT"):
            kept[len(kept) if name == "MEMOIZE" else argument] = stack[-1] if stack else None
            continue
        del stack[len(stack) - len(before) :]
        if name == "DUP":
            stack += 2 * top
        elif name.endswith("GET"):
            stack.append(kept.get(argument))
        else:
            stack += [part if part is MARK else argument for part in operation.stack_after]


def _is_plain(name: str) -> bool:
    """Whether "module name" is a type of numbers, or something else that state dicts are made of."""
    module, _, attribute = name.partition(" ")
    kind = getattr(torch, attribute, None) if module == "torch" else None
    return name in GLOBALS or isinstance(kind, torch.dtype) or (module == "torch" and attribute.endswith("Storage"))
