"""Reading and writing codecs: bundled, published, or a stranger's file, which never gets to run code."""

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from compressai.entropy_models import EntropyModel
from compressai.zoo.image import model_urls as COMPRESSAI_URLS
from compressai.zoo.pretrained import rename_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from freqdoor.codecs.adapter import Codec, build_codec, mask_contexts
from freqdoor.codecs.architectures import ARCHITECTURES, LAMBDAS, MAX_GROUPS, VARIABLE_RATE, CodecSpec, parse_name
from freqdoor.codecs.check import checked
from freqdoor.codecs.pickles import LONGEST_TABLE, WIDEST, read_pickle
from freqdoor.codecs.signed import check_signed
from freqdoor.codecs.sizes import TABLES, Shapes, check_shapes, outline
from freqdoor.codecs.state import Stored, bare, hash_tensors, is_safetensors
from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing
from freqdoor.limits import MAX_MULTIPLE, check_memory, file_size, parse_json
from freqdoor.samples import ASSETS, BUNDLED

CODEC, MODEL = "codec.safetensors", "model.safetensors"  # in a run's folder; in a folder with a model card
MAX_WIDTH = 1024  # channels; CompressAI's widest model has 320
LONGEST_NAME = 1024  # characters: it may be a path
MAX_DEPTH = 64  # residual blocks at each scale; the bundled network has 3
SAME_TABLES = {"_quantized_cdf": 16, "_offset": 0, "_cdf_length": 0}  # counts of 65536: another machine's rounding
SAME_SCALES = 1e-3
PLURALS = {"matrix": "matrices", "bias": "biases", "factor": "factors"}  # of an entropy bottleneck
STORED = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # safetensors' names


def load_codec(name: str, weights: Path | str | None = None, *, multiple: int | None = None) -> Codec:
    """A trained codec in eval mode, by name, that has decoded one small picture to what its forward gives.

    Coding tables are computed from the weights, but for those in files that freqdoor wrote.

    Args:
        name: "bmshj2018-hyperprior:3" (CompressAI's pretrained weights, downloaded by CompressAI once),
            "lite-hyperprior:3" (bundled), a file (our safetensors, or any state dict of a known architecture), the
            folder of a run or with a model card, or "package.module:factory", a function that returns a network.
        weights: a file to take the parameters from instead; the name then gives the architecture.
        multiple: what the sides of pictures have to be a multiple of, in pixels, where it is not found by trying.

    Raises:
        FreqdoorError: nothing of that name, a damaged file, a checkpoint of another architecture, or a network that
            lacks a part of CompressAI's protocol.
    """
    if multiple is not None and not 0 < multiple <= MAX_MULTIPLE:
        raise FreqdoorError(f"multiple: expected 1 to {MAX_MULTIPLE} pixels, found {multiple}")
    codec = named(name) if weights is None else _with_weights(name, Path(weights))
    codec.stated_multiple = multiple
    return checked(codec)


def named(name: str) -> Codec:
    """The codec that a name alone stands for: a file unless the name is a known one."""
    if (path := file_of(name)) is not None:
        return _load_file(path, name if name == BUNDLED else None)
    spec = parse_name(name)
    if spec.architecture in COMPRESSAI_URLS:
        return _download(spec)
    if spec.architecture in ARCHITECTURES:
        raise FreqdoorError(f"{name}: no trained weights are bundled ({BUNDLED} is); train them or pass --weights FILE")
    codec = build_codec(spec)
    _warn_of_others(renew_tables(codec), name)
    return codec


def file_of(name: str) -> Path | None:
    """The file that a name stands for; None where it is an architecture's or a function's.

    Raises:
        FreqdoorError: the name of a file that is not there, or a folder without a codec.
    """
    if name == BUNDLED:
        return ASSETS / "lite-hyperprior-3.safetensors"
    if name.partition(":")[0] in ARCHITECTURES:
        return None
    if os.path.isdir(name):
        found = [file for file in (Path(name) / CODEC, Path(name) / MODEL) if file.is_file()]
        if not found:
            raise FreqdoorError(f"{name}: expected a folder with {CODEC} or {MODEL} in it, found one without")
        return found[0]
    if os.path.isfile(name):
        return Path(name)
    if Path(name).suffix in (".safetensors", ".pth", ".pt", ".tar", ".ckpt"):
        raise FreqdoorError(f"{name}: expected a checkpoint file, found nothing there")
    return None


def _with_weights(name: str, path: Path) -> Codec:
    """The architecture that a name stands for with the weights of a file."""
    spec = parse_name(name)
    check_signed(path)
    tensors, header = read_checkpoint(path)
    if header is None:
        return _from_state_dict(tensors, path, spec)
    if spec.architecture not in ARCHITECTURES:  # the caller's factory, the file's weights
        return filled(spec, tensors, path)
    loaded = _load_file(path)
    if loaded.spec.architecture != spec.architecture:
        raise FreqdoorError(
            f"{path}: made for {loaded.spec.architecture}, not for {spec.architecture}; name that instead"
        )
    return loaded


def save_codec(codec: Codec, path: Path, **metadata: Any) -> None:
    """Write a codec as safetensors, its spec and `metadata` as JSON under the file's metadata key "freqdoor"."""
    mask_contexts(codec.net)  # an optimiser's last step leaves weights there
    header = {"kind": "codec", "spec": asdict(codec.spec), "tampered": False, **metadata}
    write_tensors(path, codec.net.state_dict(), header)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
    """Write a safetensors file with a JSON header under its metadata key "freqdoor".

    Its "digest" is the SHA-256 of the rest of it and of all tensors; whatever reads the file checks it.
    """
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    content = json.loads(json.dumps(header))  # as whoever reads it has it
    text = json.dumps(content | {"digest": _digest(contiguous, content)})
    with replacing(path) as partial:
        save_file(contiguous, partial, metadata={"freqdoor": text})


def _digest(tensors: dict[str, Tensor], header: dict[str, Any]) -> str:
    return hash_tensors(tensors, json.dumps(header, sort_keys=True))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one of our safetensors files, and its header."""
    tensors, header = _read_safetensors(path)
    if not isinstance(header, dict):
        raise FreqdoorError(f"{path}: a safetensors file that freqdoor did not write; pass the architecture's name too")
    return tensors, header


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file and the header that we wrote; None and a bare state dict for files of others."""
    stored, header = read_stored(path)
    return (bare(stored.state, path), None) if header is None else (stored.state, header)


def read_stored(path: Path) -> tuple[Stored, dict[str, Any] | None]:
    """What a file holds, as it stands there, and the header that we wrote; None for files of others."""
    if not is_safetensors(path):
        return read_pickle(path), None
    tensors, header = _read_safetensors(path)
    return Stored(tensors), (header if isinstance(header, dict) else None)


def read_state(path: Path) -> dict[str, Tensor]:
    """A plain state dict from a safetensors or PyTorch file, without running anything that the file contains."""
    return read_stored(path)[0].state


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], object]:
    """The tensors of a safetensors file, and what stands in its metadata under "freqdoor"."""
    size = file_size(path, "a safetensors file")
    try:
        with path.open("rb") as start:
            table = int.from_bytes(start.read(8), "little")
        if table > min(size, LONGEST_TABLE):
            raise FreqdoorError(
                f"{path}: not a readable safetensors file (expected a header of at most {min(size, LONGEST_TABLE)} "
                f"bytes, found {table})"
            )
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("freqdoor", "null"), path)
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            kinds = {part.get_dtype() for part in slices.values()}
            if strange := sorted(kinds - set(STORED)):
                raise FreqdoorError(f"{path}: expected tensors of {', '.join(STORED)}, found {', '.join(strange)}")
            claimed = sum(WIDEST * math.prod(part.get_shape()) for part in slices.values())
            check_memory(2 * max(size, claimed), "its tensors and the network that holds them", path)
            tensors = {key: file.get_tensor(key) for key in slices}
    except (SafetensorError, OSError, ValueError) as error:
        raise FreqdoorError(f"{path}: not a readable safetensors file ({error})") from None
    digest = header.pop("digest", None) if isinstance(header, dict) else None  # none in files of older versions
    if digest is not None and digest != (found := _digest(tensors, header)):
        raise FreqdoorError(
            f"{path}: its header or its weights are not those that were written (digest {found[:12]}, not "
            f"{str(digest)[:12]}): the file is damaged; get it again"
        )
    return tensors, header


def _load_file(path: Path, name: str | None = None) -> Codec:
    check_signed(path)
    tensors, header = read_checkpoint(path)
    if header is None:
        return _from_state_dict(tensors, path, None)
    if header.get("kind") != "codec":
        raise FreqdoorError(
            f"{path}: holds {header.get('kind', 'something unknown')}, not a whole codec; "
            "pass it as --planted beside the codec it was planted in"
        )
    spec = checked_spec(header.get("spec"), path, name)
    codec = filled(spec, tensors, path)
    codec.metadata = {key: value for key, value in header.items() if key not in ("kind", "spec")}
    return codec


def checked_spec(content: object, path: Path, name: str | None) -> CodecSpec:
    """A spec from a file's header, which a stranger may have written: known architectures of bounded size only."""
    try:
        spec = CodecSpec(**(content | ({"name": name} if name else {})))  # type: ignore[operator]
        kinds = {"name": str, "architecture": str, "quality": int | None, "arguments": dict}
        if (
            not all(isinstance(getattr(spec, key), kind) for key, kind in kinds.items())
            or len(spec.name) > LONGEST_NAME
        ):
            raise TypeError
    except TypeError:
        raise FreqdoorError(f"{path}: malformed header: expected a codec's spec, found {str(content)[:80]}") from None
    if spec.architecture not in ARCHITECTURES:
        raise FreqdoorError(
            f"{path}: made for {spec.architecture}, which is code of its own; if you trust that code, name it with "
            "--codec package.module:factory and pass this file as --weights"
        )
    if not _bounded(spec.arguments):
        raise FreqdoorError(
            f"{path}: malformed header: expected widths from 1 to {MAX_WIDTH}, at most {MAX_GROUPS} in a list, and a "
            f"depth of at most {MAX_DEPTH}, "
            f"found {str(spec.arguments)[:160]}"
        )
    if spec.quality is not None and spec.quality not in LAMBDAS:
        raise FreqdoorError(f"{path}: malformed header: expected a quality from 1 to 8, found {spec.quality}")
    return spec


def _from_state_dict(state: dict[str, Tensor], path: Path, spec: CodecSpec | None) -> Codec:
    """A codec whose architecture is the spec's, or the only one that the state dict fits."""
    if spec is not None and spec.architecture not in ARCHITECTURES:
        codec = filled(spec, state, path)
        _warn_of_others(renew_tables(codec), str(path))
        return codec
    candidates = [spec.architecture] if spec else list(ARCHITECTURES)
    for architecture in candidates:
        fitting = fitting_spec(architecture, state, spec or CodecSpec(name=path.name, architecture=architecture))
        if fitting is not None:
            codec = filled(fitting, state, path)
            _warn_of_others(renew_tables(codec), str(path))  # as CompressAI's eval_model does
            return codec
    if "Gain" in state:
        raise FreqdoorError(f"{path}: {VARIABLE_RATE}")
    raise FreqdoorError(
        f"{path}: the weights do not fit {' or '.join(candidates)}; check that this checkpoint is of the architecture "
        "named"
    )


def fitting_spec(architecture: str, state: dict[str, Tensor], spec: CodecSpec) -> CodecSpec | None:
    """The spec with the architecture's arguments as the weights' shapes say them; None where they do not fit it."""
    try:
        arguments = ARCHITECTURES[architecture].arguments(state)
        spec = replace(spec, architecture=architecture, arguments=arguments)
        if (expected := shapes_of(spec)) is None:
            return None
        check_shapes(expected, renamed(state, expected))
    except (RuntimeError, KeyError, IndexError, ValueError, TypeError, FreqdoorError):
        return None
    return spec


def shapes_of(spec: CodecSpec) -> Shapes | None:
    """The names and shapes of the tensors of a known architecture; None where its arguments are out of bounds."""
    return outline(lambda: build_codec(spec).net) if _bounded(spec.arguments) else None


def _bounded(arguments: dict[str, Any]) -> bool:
    """Whether a constructor's arguments are widths, and lists of widths, as codecs have them, and a depth."""
    if not isinstance(arguments.get("depth", 1), int) or arguments.get("depth", 1) > MAX_DEPTH:
        return False
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return all(len(v) <= MAX_GROUPS and all(isinstance(s, int) and 0 < s <= MAX_WIDTH for s in v) for v in lists)


def filled(spec: CodecSpec, state: dict[str, Tensor], path: Path) -> Codec:
    """The codec of a spec with the weights of a state dict, which have to fit it before it takes any memory."""
    try:
        if spec.architecture in ARCHITECTURES:  # a factory is the user's own code
            expected = outline(lambda: build_codec(spec).net)
            check_shapes(expected, renamed(state, expected))
        codec = build_codec(spec)
        load_state(codec.net, state)
    except (RuntimeError, KeyError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise FreqdoorError(f"{path}: the weights do not fit {spec.architecture} ({first})") from None
    check_weights(state, path)
    return codec


def renamed(state: dict[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The state dict by a network's own keys where it has CompressAI's old ones."""

    def name(key: str) -> str:
        older = key if key in own else rename_key(key)
        newer = re.sub(r"\._(matrix|bias|factor)(\d+)$", lambda match: f".{PLURALS[match[1]]}.{match[2]}", older)
        return newer if newer in own else older

    return {name(key): value for key, value in state.items()}


def load_state(net: nn.Module, state: dict[str, Tensor]) -> None:
    """net.load_state_dict for CompressAI's old keys too, and for coding tables of any size or none at all."""
    state = renamed(state, net.state_dict().keys())
    for name, module in net.named_modules():
        for table in TABLES if isinstance(module, EntropyModel) else ():
            own = getattr(module, table, None)
            key = f"{name}.{table}" if name else table
            if isinstance(own, Tensor):
                kept = state.setdefault(key, own.new_empty(0))
                if own.shape != kept.shape:
                    setattr(module, table, own.new_zeros(kept.shape))
    net.load_state_dict(state)


def renew_tables(codec: Codec) -> list[str]:
    """Compute all coding tables from the weights, over the codec's own scale tables; the models that had others.

    CompressAI's default scale table stays where the codec has the same one up to rounding, as in its eval_model.
    """
    models = {name: module for name, module in codec.net.named_modules() if isinstance(module, EntropyModel)}
    before = {
        name: {table: getattr(module, table).clone() for table in TABLES if hasattr(module, table)}
        for name, module in models.items()
    }
    codec.update(force=True)
    for name, module in models.items():
        scales = before[name].get("scale_table")
        if scales is not None and scales.numel() and not _close(scales, module.scale_table, SAME_SCALES):
            module.update_scale_table(scales, force=True)
    return [
        name
        for name, module in models.items()
        if before[name]["_quantized_cdf"].numel()
        and not all(_close(before[name][table], getattr(module, table), slack) for table, slack in SAME_TABLES.items())
    ]


def _warn_of_others(models: list[str], source: str) -> None:
    if models:
        warnings.warn(
            f"{source}: its coding tables did not belong to its weights, and were computed anew; files that were "
            "compressed with the old ones do not decode with these",
            stacklevel=3,
        )


def _close(a: Tensor, b: Tensor, slack: float) -> bool:
    """Whether no entry differs by more than the slack."""
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= slack).all())


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """The names of tensors with numbers that are not finite."""
    return [name for name, value in state.items() if value.is_floating_point() and not math.isfinite(value.sum())]


def check_weights(state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that are not finite."""
    if bad := not_finite(state):
        raise FreqdoorError(f"{path}: NaN or infinite weights in {', '.join(bad[:3])}; the checkpoint is damaged")


def _download(spec: CodecSpec) -> Codec:
    """CompressAI's published weights for MSE, through torch.hub's cache."""
    urls = COMPRESSAI_URLS[spec.architecture]["mse"]
    if spec.quality not in urls:
        raise FreqdoorError(f"{spec.name}: published weights exist for qualities {min(urls)} to {max(urls)}")
    try:
        state = torch.hub.load_state_dict_from_url(
            urls[spec.quality], progress=False, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise FreqdoorError(
            f"{spec.name}: could not download CompressAI's weights ({error}); pass a file with --weights FILE"
        ) from None
    return _from_state_dict(bare(state, Path(spec.name)), Path(spec.name), spec)
