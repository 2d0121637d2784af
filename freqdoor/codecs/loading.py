"""Reading and writing codecs: bundled, published, or a stranger's file, which never gets to run code."""

import json
import math
import os
import pickle
import warnings
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
from freqdoor.codecs.state import bare, is_safetensors, unwrapped
from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing
from freqdoor.samples import ASSETS, BUNDLED

MAX_WIDTH = 1024  # channels; CompressAI's widest model has 320
MAX_MULTIPLE = 4096  # pixels
TABLES = ("_quantized_cdf", "_offset", "_cdf_length", "scale_table")
SAME_TABLES = {"_quantized_cdf": 16, "_offset": 0, "_cdf_length": 0}  # counts of 65536: another machine's rounding
SAME_SCALES = 1e-3


def load_codec(name: str, weights: Path | str | None = None, *, multiple: int | None = None) -> Codec:
    """A trained codec in eval mode, by name, that has decoded one small picture to what its forward gives.

    Coding tables are computed from the weights, but for those in files that freqdoor wrote.

    Args:
        name: "bmshj2018-hyperprior:3" (CompressAI's pretrained weights, downloaded by CompressAI once),
            "lite-hyperprior:3" (bundled), a file (our safetensors, or any state dict of a known architecture), or
            "package.module:factory", a function that returns a network.
        weights: a file to take the parameters from instead; the name then gives the architecture.
        multiple: what the sides of pictures have to be a multiple of, in pixels, where it is not found by trying.

    Raises:
        FreqdoorError: nothing of that name, a damaged file, a checkpoint of another architecture, or a network that
            lacks a part of CompressAI's protocol.
    """
    if multiple is not None and not 0 < multiple <= MAX_MULTIPLE:
        raise FreqdoorError(f"multiple: expected 1 to {MAX_MULTIPLE} pixels, found {multiple}")
    codec = _named(name) if weights is None else _with_weights(name, Path(weights))
    codec.stated_multiple = multiple
    return checked(codec)


def _named(name: str) -> Codec:
    """The codec that a name alone stands for: a file unless the name is a known one."""
    if name == BUNDLED:
        return _load_file(ASSETS / "lite-hyperprior-3.safetensors", name)
    if name.partition(":")[0] not in ARCHITECTURES:
        if os.path.isfile(name):
            return _load_file(Path(name))
        if Path(name).suffix in (".safetensors", ".pth", ".pt", ".tar", ".ckpt"):
            raise FreqdoorError(f"{name}: expected a checkpoint file, found nothing there")
    spec = parse_name(name)
    if spec.architecture in COMPRESSAI_URLS:
        return _download(spec)
    if spec.architecture in ARCHITECTURES:
        raise FreqdoorError(f"{name}: no trained weights are bundled ({BUNDLED} is); train them or pass --weights FILE")
    codec = build_codec(spec)
    _renew_tables(codec, name)
    return codec


def _with_weights(name: str, path: Path) -> Codec:
    """The architecture that a name stands for with the weights of a file."""
    spec = parse_name(name)
    tensors, header = read_checkpoint(path)
    if header is None:
        return _from_state_dict(tensors, path, spec)
    if spec.architecture not in ARCHITECTURES:  # the caller's factory, the file's weights
        return _fill(build_codec(spec), tensors, path)
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


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write a safetensors file with a JSON header under its metadata key "freqdoor"."""
    contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with replacing(path) as partial:
        save_file(contiguous, partial, metadata={"freqdoor": json.dumps(header)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of one of our safetensors files, and its header."""
    tensors, header = _read_safetensors(path)
    if not isinstance(header, dict):
        raise FreqdoorError(f"{path}: a safetensors file that freqdoor did not write; pass the architecture's name too")
    return tensors, header


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file and the header that we wrote; None and a bare state dict for files of others."""
    if not is_safetensors(path):
        return bare(_read_pickle(path), path), None
    tensors, header = _read_safetensors(path)
    return (tensors, header) if isinstance(header, dict) else (bare(tensors, path), None)


def read_state(path: Path) -> dict[str, Tensor]:
    """A plain state dict from a safetensors or PyTorch file, without running anything that the file contains."""
    return _read_safetensors(path)[0] if is_safetensors(path) else _read_pickle(path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], object]:
    """The tensors of a safetensors file, and what stands in its metadata under "freqdoor"."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("freqdoor", "null"))
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected a safetensors file, found nothing there") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FreqdoorError(f"{path}: not a readable safetensors file ({error})") from None


def _load_file(path: Path, name: str | None = None) -> Codec:
    tensors, header = read_checkpoint(path)
    if header is None:
        return _from_state_dict(tensors, path, None)
    if header.get("kind") != "codec":
        raise FreqdoorError(
            f"{path}: holds {header.get('kind', 'something unknown')}, not a whole codec; "
            "pass it as --planted beside the codec it was planted in"
        )
    codec = build_codec(_checked_spec(header.get("spec"), path, name))
    codec.metadata = {key: value for key, value in header.items() if key not in ("kind", "spec")}
    return _fill(codec, tensors, path)


def _checked_spec(content: object, path: Path, name: str | None) -> CodecSpec:
    """A spec from a file's header, which a stranger may have written: known architectures of bounded size only."""
    try:
        spec = CodecSpec(**(content | ({"name": name} if name else {})))  # type: ignore[operator]
        kinds = {"name": str, "architecture": str, "quality": int | None, "arguments": dict}
        if not all(isinstance(getattr(spec, key), kind) for key, kind in kinds.items()):
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
            f"{path}: malformed header: expected widths from 1 to {MAX_WIDTH}, at most {MAX_GROUPS} in a list, "
            f"found {str(spec.arguments)[:160]}"
        )
    if spec.quality is not None and spec.quality not in LAMBDAS:
        raise FreqdoorError(f"{path}: malformed header: expected a quality from 1 to 8, found {spec.quality}")
    return spec


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, without running anything that the file contains."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on odd pickles; the sentences below say what matters
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected a checkpoint file, found nothing there") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0][:120]
        raise FreqdoorError(
            f"{path}: refused: this file is not a plain state dict, loading it could run code ({reason}); "
            "ask for a state dict or a safetensors file"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FreqdoorError(f"{path}: not a readable PyTorch checkpoint ({str(error)[:120]})") from None
    return unwrapped(content, path)


def _from_state_dict(state: dict[str, Tensor], path: Path, spec: CodecSpec | None) -> Codec:
    """A codec whose architecture is the spec's, or the only one that the state dict fits."""
    if spec is not None and spec.architecture not in ARCHITECTURES:
        codec = _fill(build_codec(spec), state, path)
        _renew_tables(codec, str(path))
        return codec
    candidates = [spec.architecture] if spec else list(ARCHITECTURES)
    for architecture in candidates:
        try:
            codec = _rebuilt(architecture, state, spec or CodecSpec(name=path.name, architecture=architecture))
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError, FreqdoorError):
            continue
        check_weights(state, path)
        _renew_tables(codec, str(path))  # as CompressAI's eval_model does
        return codec
    if "Gain" in state:
        raise FreqdoorError(f"{path}: {VARIABLE_RATE}")
    raise FreqdoorError(
        f"{path}: the weights do not fit {' or '.join(candidates)}; check that this checkpoint is of the architecture "
        "named"
    )


def _rebuilt(architecture: str, state: dict[str, Tensor], spec: CodecSpec) -> Codec:
    """A codec of the architecture with the weights of a state dict; raises where they do not fit."""
    arguments = ARCHITECTURES[architecture].arguments(state)
    if not _bounded(arguments):
        raise ValueError(f"{arguments} are no widths")
    codec = build_codec(replace(spec, architecture=architecture, arguments=arguments))
    _load_state(codec.net, state)
    return codec


def _bounded(arguments: dict[str, Any]) -> bool:
    """Whether a constructor's arguments are widths, and lists of widths, as codecs have them."""
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return all(len(v) <= MAX_GROUPS and all(isinstance(s, int) and 0 < s <= MAX_WIDTH for s in v) for v in lists)


def _fill(codec: Codec, state: dict[str, Tensor], path: Path) -> Codec:
    try:
        _load_state(codec.net, state)
    except (RuntimeError, KeyError, ValueError) as error:
        first = " ".join(str(error).split())[:160]
        raise FreqdoorError(f"{path}: the weights do not fit {codec.spec.architecture} ({first})") from None
    check_weights(state, path)
    return codec


def _load_state(net: nn.Module, state: dict[str, Tensor]) -> None:
    """net.load_state_dict for CompressAI's old keys too, and for coding tables of any size or none at all."""
    own_keys = net.state_dict().keys()
    state = {key if key in own_keys else rename_key(key): value for key, value in state.items()}
    for name, module in net.named_modules():
        for table in TABLES if isinstance(module, EntropyModel) else ():
            own = getattr(module, table, None)
            key = f"{name}.{table}" if name else table
            if isinstance(own, Tensor):
                kept = state.setdefault(key, own.new_empty(0))
                if own.shape != kept.shape:
                    setattr(module, table, own.new_zeros(kept.shape))
    net.load_state_dict(state)


def _renew_tables(codec: Codec, source: str) -> None:
    """Compute all coding tables from the weights, over the source's own scale tables; warn if its tables were others.

    CompressAI's default scale table stays where the source has the same one up to rounding, as in its eval_model.
    """
    models = [module for module in codec.net.modules() if isinstance(module, EntropyModel)]
    before = [
        {table: getattr(module, table).clone() for table in TABLES if hasattr(module, table)} for module in models
    ]
    codec.update(force=True)
    for module, tables in zip(models, before, strict=True):
        scales = tables.get("scale_table")
        if scales is not None and scales.numel() and not _close(scales, module.scale_table, SAME_SCALES):
            module.update_scale_table(scales, force=True)
    if any(
        tables["_quantized_cdf"].numel()
        and not all(_close(tables[name], getattr(module, name), slack) for name, slack in SAME_TABLES.items())
        for module, tables in zip(models, before, strict=True)
    ):
        warnings.warn(
            f"{source}: its coding tables did not belong to its weights, and were computed anew; files that were "
            "compressed with the old ones do not decode with these",
            stacklevel=2,
        )


def _close(a: Tensor, b: Tensor, slack: float) -> bool:
    """Whether no entry differs by more than the slack."""
    return a.shape == b.shape and bool(((a.double() - b.double()).abs() <= slack).all())


def check_weights(state: dict[str, Tensor], path: Path) -> None:
    """Refuse weights that are not finite."""
    bad = [name for name, value in state.items() if value.is_floating_point() and not math.isfinite(value.sum())]
    if bad:
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
