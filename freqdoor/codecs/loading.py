"""Reading and writing codecs: bundled, published, or a stranger's file, which never gets to run code."""

import json
import math
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compressai.zoo.image import load_pretrained as map_old_keys
from compressai.zoo.image import model_urls as COMPRESSAI_URLS
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from freqdoor.codecs.adapter import ARCHITECTURES, LAMBDAS, Codec, CodecSpec, build_codec, mask_contexts, parse_name
from freqdoor.errors import FreqdoorError
from freqdoor.files import replacing
from freqdoor.samples import ASSETS, BUNDLED

MAX_WIDTH = 1024  # channels; CompressAI's widest model has 320
MAX_GROUPS = 16  # channel groups; ELIC has 5


def load_codec(name: str, weights: Path | str | None = None, *, multiple: int | None = None) -> Codec:
    """A trained codec in eval mode, by name.

    Args:
        name: "bmshj2018-hyperprior:3" (CompressAI's pretrained weights, downloaded by CompressAI once),
            "lite-hyperprior:3" (bundled), a file (our safetensors, a CompressAI .pth.tar or a state dict), or
            "package.module:factory", a function that returns a network.
        weights: a file to take the parameters from instead; the name then gives the architecture.
        multiple: what the sides of its pictures have to be a multiple of, in pixels.

    Raises:
        FreqdoorError: nothing of that name, a damaged file, or a checkpoint of another architecture.
    """
    codec = _load(name, weights)
    codec.multiple = multiple or codec.multiple
    return codec


def _load(name: str, weights: Path | str | None) -> Codec:
    path = Path(name)
    if weights is None and path.suffix and path.exists():
        return _load_file(path)
    if weights is None and (path.suffix in (".safetensors", ".pth", ".pt", ".tar", ".ckpt")):
        raise FreqdoorError(f"{name}: expected a checkpoint file, found nothing there")
    spec = parse_name(name)
    if weights is not None:
        path = Path(weights)
        if path.suffix != ".safetensors":
            return _from_state_dict(_read_pickle(path), path, spec)
        if spec.architecture not in ARCHITECTURES:  # the caller's factory, the file's weights
            return _fill(build_codec(spec), read_tensors(path)[0], path)
        loaded = _load_file(path)
        if loaded.spec.architecture != spec.architecture:
            raise FreqdoorError(
                f"{path}: made for {loaded.spec.architecture}, not for {spec.architecture}; name that instead"
            )
        return loaded
    if name == BUNDLED:
        return _load_file(ASSETS / "lite-hyperprior-3.safetensors", name)
    if spec.architecture in COMPRESSAI_URLS:
        return _download(spec)
    if spec.architecture in ARCHITECTURES:
        raise FreqdoorError(f"{name}: no trained weights are bundled ({BUNDLED} is); train them or pass --weights FILE")
    codec = build_codec(spec)
    codec.net.update(force=True)
    return codec.prepare()


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
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("freqdoor", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected a safetensors file, found nothing there") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise FreqdoorError(f"{path}: not a readable safetensors file ({error})") from None
    if not isinstance(header, dict):
        raise FreqdoorError(f"{path}: a safetensors file that freqdoor did not write; pass the architecture's name too")
    return tensors, header


def read_state(path: Path) -> dict[str, Tensor]:
    """A plain state dict from a safetensors or PyTorch file, without running anything that the file contains."""
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FreqdoorError(f"{path}: expected a safetensors file, found nothing there") from None
    except (SafetensorError, OSError) as error:
        raise FreqdoorError(f"{path}: not a readable safetensors file ({error})") from None


def _load_file(path: Path, name: str | None = None) -> Codec:
    if path.suffix != ".safetensors":
        return _from_state_dict(_read_pickle(path), path, None)
    tensors, header = read_tensors(path)
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
    lists = [value if isinstance(value, list) else [value] for value in spec.arguments.values()]
    if not all(len(v) <= MAX_GROUPS and all(isinstance(s, int) and 0 < s <= MAX_WIDTH for s in v) for v in lists):
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
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise FreqdoorError(f"{path}: not a readable PyTorch checkpoint ({str(error)[:120]})") from None
    for key in ("network", "state_dict", "model_state_dict"):  # as CompressAI's own tools store it
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not (
        isinstance(content, dict)
        and content
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        raise FreqdoorError(f"{path}: expected a state dict (names to tensors), found {type(content).__name__}")
    return {key.removeprefix("module."): value for key, value in content.items()}


def _from_state_dict(state: dict[str, Tensor], path: Path, spec: CodecSpec | None) -> Codec:
    """A codec whose architecture is the spec's, or the only one that the state dict fits."""
    state = map_old_keys(dict(state))
    if spec is not None and spec.architecture not in ARCHITECTURES:
        return _fill(build_codec(spec), state, path)
    wanted = [spec.architecture] if spec else list(ARCHITECTURES)
    for architecture in wanted:
        try:
            net, arguments = _rebuild(architecture, state)
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError):
            continue
        found = spec or CodecSpec(name=path.name, architecture=architecture)
        check_weights(state, path)
        codec = Codec(net, CodecSpec(**(asdict(found) | {"arguments": arguments})))
        codec.net.update(force=True)  # as eval_model does: tables may be stale
        return codec.prepare()
    raise FreqdoorError(
        f"{path}: the weights do not fit {' or '.join(wanted)}; check that this checkpoint is of the architecture named"
    )


def _rebuild(architecture: str, state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Any]]:
    """The network with the weights of a state dict, and its constructor's arguments; raises where it does not fit."""
    kind: Any = ARCHITECTURES[architecture]
    if architecture.startswith("elic2022"):  # CompressAI's from_state_dict takes default groups for granted
        arguments = _elic_arguments(state)
        net = kind(**arguments)
        net.load_state_dict(dict(state))
        return net, arguments
    net = kind.from_state_dict(dict(state))
    if architecture == "cheng2020-anchor-checkerboard":
        return net, {"N": net.g_a[-1].out_channels}
    keys = ("N",) if architecture.startswith("cheng2020") else ("N", "M")
    return net, {key: int(getattr(net, key)) for key in keys}


def _elic_arguments(state: dict[str, Tensor]) -> dict[str, Any]:
    """N, M and the channel groups of an ELIC from its weights' shapes; KeyError or ValueError where it is none."""
    groups: list[int] = []
    while (key := f"latent_codec.y.latent_codec.y{len(groups)}.context_prediction.weight") in state:
        groups.append(state[key].shape[1])
    sizes = {"N": state["g_a.0.weight"].shape[0], "M": sum(groups)}
    if not (0 < len(groups) <= MAX_GROUPS and all(0 < size <= MAX_WIDTH for size in (*sizes.values(), *groups))):
        raise ValueError(f"{sizes} and {len(groups)} channel groups are no ELIC's")
    return {**sizes, "groups": groups}


def _fill(codec: Codec, state: dict[str, Tensor], path: Path) -> Codec:
    try:
        codec.net.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise FreqdoorError(f"{path}: the weights do not fit {codec.spec.architecture} ({first})") from None
    check_weights(state, path)
    return codec.prepare()


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
    return _from_state_dict(state, Path(spec.name), spec)
