"""One thin adapter, `Codec`, over any network with CompressAI's protocol, and the ways to name and load one."""

import hashlib
import importlib
import json
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020Attention,
    FactorizedPrior,
    FactorizedPriorReLU,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from compressai.ops import compute_padding
from compressai.zoo.image import cfgs as COMPRESSAI_ARGUMENTS
from compressai.zoo.image import load_pretrained as map_old_keys
from compressai.zoo.image import model_urls as COMPRESSAI_URLS
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from freqdoor.files import replacing
from freqdoor.lite import LiteHyperprior
from freqdoor.types import BUNDLED, Bitstream, FreqdoorError, Images, Reconstruction

LAMBDAS = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800}
STRIDE = 64  # CompressAI's eval_model pads to a multiple of this for every model
ASSETS = Path(__file__).parent / "assets"

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "lite-hyperprior": LiteHyperprior,
    "bmshj2018-factorized": FactorizedPrior,
    "bmshj2018-factorized-relu": FactorizedPriorReLU,
    "bmshj2018-hyperprior": ScaleHyperprior,
    "mbt2018-mean": MeanScaleHyperprior,
    "mbt2018": JointAutoregressiveHierarchicalPriors,
    "cheng2020-anchor": Cheng2020Anchor,
    "cheng2020-attn": Cheng2020Attention,
}


@dataclass(frozen=True, kw_only=True)
class CodecSpec:
    """What is needed to rebuild a codec's network: it travels in the metadata of every file we write."""

    name: str  # as given by the user, for example "bmshj2018-hyperprior:3"
    architecture: str  # a key of ARCHITECTURES, or "package.module:factory"
    quality: int | None = None  # 1 to 8, index of LAMBDAS
    arguments: dict[str, Any] = field(default_factory=dict)  # of the architecture's constructor

    @property
    def lmbda(self) -> float | None:
        """Lambda of R + lambda D with D = 255^2 MSE."""
        return LAMBDAS[self.quality] if self.quality else None


class Codec(nn.Module):
    """A learned codec f = g_s o Q o g_a over a CompressAI-protocol network; any image size, pads and crops inside.

    Attributes:
        net: the network itself, with submodules g_a, g_s and mostly h_a, h_s.
        spec: how to rebuild it.
        metadata: what the file it came from says of it (`tampered`, `attacks`, ...).
    """

    def __init__(self, net: nn.Module, spec: CodecSpec, metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net: Any = net  # its protocol is checked below, not typed
        self.spec = spec
        self.metadata = metadata or {}
        _check_protocol(net, spec.name)

    @property
    def tampered(self) -> bool:
        """Whether the file that this codec came from says that its encoder was tampered with."""
        return bool(self.metadata.get("tampered"))

    def forward(self, x: Images) -> Reconstruction:
        """Differentiable pass: noise in train mode, rounding in eval mode, as in CompressAI."""
        self._check_modes()
        height, width = x.shape[-2:]
        pad, unpad = compute_padding(height, width, min_div=STRIDE)
        output = self.net(F.pad(x, pad))
        x_hat = F.pad(output["x_hat"], unpad)
        bits = sum(-likelihoods.log2().flatten(1).sum(1) for likelihoods in output["likelihoods"].values())
        assert isinstance(bits, Tensor)
        return Reconstruction(x_hat, bits, height * width)

    @torch.no_grad()
    def compress(self, x: Images) -> list[Bitstream]:
        """Entropy-code every image of the batch (rANS), one bitstream each."""
        self.prepare()
        height, width = x.shape[-2:]
        pad, _ = compute_padding(height, width, min_div=STRIDE)
        streams = []
        for image in x:
            output = self.net.compress(F.pad(image[None], pad))
            strings = tuple(s[0] for s in output["strings"])
            latent_height, latent_width = output["shape"]
            streams.append(Bitstream(strings, (int(latent_height), int(latent_width)), (height, width)))
        return streams

    @torch.no_grad()
    def decompress(self, bitstream: Bitstream) -> Images:
        """The decoded image, (1, 3, h, w), clamped to [0, 1]."""
        self.prepare()
        strings = [[s] for s in bitstream.strings]
        x_hat = self.net.decompress(strings, bitstream.latent_shape)["x_hat"]
        _, unpad = compute_padding(*bitstream.image_size, min_div=STRIDE)
        cropped: Images = F.pad(x_hat, unpad).clamp(0, 1)
        return cropped

    def prepare(self) -> Self:
        """Eval mode with coding tables; tables that exist are kept, so that frozen modules stay bit-identical."""
        self.eval()
        self.net.update()
        return self

    def freeze(self, scope: str = "g_a") -> Self:
        """Let gradients into the modules of `scope` ("g_a" or "g_a+h_a") only.

        By requires_grad alone, never by eval(): an entropy model in eval mode rounds, and rounding has no gradient.
        """
        self.requires_grad_(False)
        for name in scope.split("+"):
            self.net.get_submodule(name).requires_grad_(True)
        return self

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Run g_a and g_s under autocast; entropy models stay in float32, where likelihoods do not underflow."""
        if dtype is None:
            yield
            return
        device = next(self.parameters()).device.type
        transforms = [self.net.get_submodule(name) for name in ("g_a", "g_s")]
        for module in transforms:
            module.forward = _cast(module.forward, device, dtype)
        try:
            yield
        finally:
            for module in transforms:
                del module.forward  # the instance's wrapper; the class's method shows again

    def module_hashes(self) -> dict[str, str]:
        """SHA-256 of every direct submodule's parameters and buffers: names, types, shapes and bytes."""
        return {name: hash_state(module) for name, module in self.net.named_children()}

    @property
    def decoder_hash(self) -> str:
        """SHA-256 over everything that decoding needs, that is all but g_a and h_a."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module_hashes().items()):
            if name not in ("g_a", "h_a"):
                digest.update(f"{name}={value};".encode())
        return digest.hexdigest()

    def _check_modes(self) -> None:
        if not torch.is_grad_enabled():
            return
        for name, module in self.net.named_modules():
            if isinstance(module, EntropyModel) and module.training != self.training:
                raise FreqdoorError(
                    f"{name} is in {'train' if module.training else 'eval'} mode and the codec is not: in eval mode "
                    "the rate has no gradient; call train() or eval() on the codec as a whole"
                )


def _cast(forward: Callable[[Tensor], Tensor], device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def wrapped(x: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return forward(x).float()

    return wrapped


def _check_protocol(net: nn.Module, name: str) -> None:
    missing = [part for part in ("g_a", "g_s", "compress", "decompress", "update") if not hasattr(net, part)]
    if missing:
        raise FreqdoorError(f"{name}: expected a network with CompressAI's protocol, found no {', '.join(missing)}")
    for path, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise FreqdoorError(
                f"{name}: {path} ({type(module).__name__}) behaves differently in train and eval mode, which would "
                "change the attack; replace it before loading"
            )


def hash_state(module: nn.Module) -> str:
    """SHA-256 over a module's state dict: names, types, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def parse_name(name: str) -> CodecSpec:
    """The spec that a name like "cheng2020-anchor:3" or "package.module:factory" stands for."""
    architecture, _, rest = name.partition(":")
    if architecture in ARCHITECTURES:
        if not (rest.isdigit() and int(rest) in LAMBDAS):
            raise FreqdoorError(f"{name}: expected a quality from 1 to 8 after {architecture}, as in {architecture}:3")
        quality = int(rest)
        arguments: dict[str, Any] = {}
        if architecture in COMPRESSAI_ARGUMENTS:
            widths = COMPRESSAI_ARGUMENTS[architecture][min(quality, max(COMPRESSAI_ARGUMENTS[architecture]))]
            keys = ("N",) if architecture.startswith("cheng2020") else ("N", "M")
            arguments = dict(zip(keys, widths, strict=True))
        return CodecSpec(name=name, architecture=architecture, quality=quality, arguments=arguments)
    if rest and architecture.replace(".", "").isidentifier() and rest.isidentifier():
        return CodecSpec(name=name, architecture=name)
    raise FreqdoorError(
        f"{name}: expected a codec as name:quality ({', '.join(ARCHITECTURES)}), a checkpoint file, "
        "or package.module:factory"
    )


def build_codec(spec: CodecSpec) -> Codec:
    """A codec with the spec's architecture and random weights."""
    if spec.architecture in ARCHITECTURES:
        return Codec(ARCHITECTURES[spec.architecture](**spec.arguments), spec)
    module_name, _, attribute = spec.architecture.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise FreqdoorError(f"{spec.architecture}: could not import this codec ({error})") from None
    return Codec(factory(**spec.arguments), spec)


def load_codec(name: str, weights: Path | str | None = None) -> Codec:
    """A trained codec in eval mode, by name.

    Args:
        name: "bmshj2018-hyperprior:3" (CompressAI's pretrained weights, downloaded by CompressAI once),
            "lite-hyperprior:3" (bundled), a file (our safetensors, a CompressAI .pth.tar or a state dict), or
            "package.module:factory", a function that returns a network.
        weights: a file to take the parameters from instead; the name then gives the architecture.

    Raises:
        FreqdoorError: nothing of that name, a damaged file, or a checkpoint of another architecture.
    """
    path = Path(name)
    if weights is None and path.suffix and path.exists():
        return _load_file(path)
    if weights is None and (path.suffix in (".safetensors", ".pth", ".pt", ".tar", ".ckpt")):
        raise FreqdoorError(f"{name}: expected a checkpoint file, found nothing there")
    spec = parse_name(name)
    if weights is not None:
        path = Path(weights)
        if path.suffix == ".safetensors":
            loaded = _load_file(path)
            if loaded.spec.architecture != spec.architecture:
                raise FreqdoorError(
                    f"{path}: made for {loaded.spec.architecture}, not for {spec.architecture}; name that instead"
                )
            return loaded
        return _from_state_dict(_read_pickle(path), path, spec)
    if name == BUNDLED:
        return _load_file(ASSETS / "lite-hyperprior-3.safetensors", name)
    if spec.architecture in COMPRESSAI_URLS:
        return _download(spec)
    if spec.architecture in ARCHITECTURES:
        raise FreqdoorError(f"{name}: no trained weights are bundled ({BUNDLED} is); train them or pass --weights FILE")
    codec = build_codec(spec)
    codec.net.update(force=True)
    return codec.eval()


def save_codec(codec: Codec, path: Path, **metadata: Any) -> None:
    """Write a codec as safetensors, its spec and `metadata` as JSON under the file's metadata key "freqdoor"."""
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


def _load_file(path: Path, name: str | None = None) -> Codec:
    if path.suffix != ".safetensors":
        return _from_state_dict(_read_pickle(path), path, None)
    tensors, header = read_tensors(path)
    if header.get("kind") != "codec":
        raise FreqdoorError(
            f"{path}: holds {header.get('kind', 'something unknown')}, not a whole codec; "
            "pass it as --planted beside the codec it was planted in"
        )
    spec = CodecSpec(**(header["spec"] | ({"name": name} if name else {})))
    codec = build_codec(spec)
    codec.metadata = {key: value for key, value in header.items() if key not in ("kind", "spec")}
    return _fill(codec, tensors, path)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict in a PyTorch file, without running anything that the file contains."""
    try:
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
    if not (isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values())):
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
            net = ARCHITECTURES[architecture].from_state_dict(dict(state))  # type: ignore[attr-defined]
        except (RuntimeError, KeyError, IndexError, ValueError, TypeError):
            continue
        arguments = {key: int(getattr(net, key)) for key in ("N", "M") if hasattr(net, key)}
        if architecture.startswith("cheng2020"):
            arguments.pop("M", None)
        found = spec or CodecSpec(name=str(path), architecture=architecture)
        codec = Codec(net, CodecSpec(**(asdict(found) | {"arguments": arguments})))
        codec.net.update(force=True)  # as eval_model does: tables may be stale
        return codec.eval()
    raise FreqdoorError(
        f"{path}: the weights do not fit {' or '.join(wanted)}; check that this checkpoint is of the architecture named"
    )


def _fill(codec: Codec, state: dict[str, Tensor], path: Path) -> Codec:
    try:
        codec.net.load_state_dict(state)
    except (RuntimeError, KeyError) as error:
        first = " ".join(str(error).split())[:160]
        raise FreqdoorError(f"{path}: the weights do not fit {codec.spec.architecture} ({first})") from None
    bad = [name for name, value in state.items() if value.is_floating_point() and not math.isfinite(value.sum())]
    if bad:
        raise FreqdoorError(f"{path}: NaN or infinite weights in {', '.join(bad[:3])}; the checkpoint is damaged")
    return codec.prepare()


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
