"""One thin adapter, `Codec`, over any network with CompressAI's protocol, and the ways to name one."""

import copy
import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from compressai.entropy_models import EntropyModel
from compressai.layers import MaskedConv2d
from compressai.models import (
    Cheng2020Anchor,
    Cheng2020AnchorCheckerboard,
    Cheng2020Attention,
    Elic2022Chandelier,
    Elic2022Official,
    FactorizedPrior,
    FactorizedPriorReLU,
    JointAutoregressiveHierarchicalPriors,
    MeanScaleHyperprior,
    ScaleHyperprior,
)
from compressai.ops import compute_padding
from compressai.zoo.image import cfgs as COMPRESSAI_ARGUMENTS
from torch import Tensor, nn

from freqdoor.codecs.lite import LiteHyperprior
from freqdoor.errors import FreqdoorError
from freqdoor.types import Bitstream, Images, Reconstruction

LAMBDAS = {1: 0.0018, 2: 0.0035, 3: 0.0067, 4: 0.0130, 5: 0.0250, 6: 0.0483, 7: 0.0932, 8: 0.1800}
STRIDE = 64  # CompressAI's eval_model pads to a multiple of this for every model

ARCHITECTURES: dict[str, type[nn.Module]] = {
    "lite-hyperprior": LiteHyperprior,
    "bmshj2018-factorized": FactorizedPrior,
    "bmshj2018-factorized-relu": FactorizedPriorReLU,
    "bmshj2018-hyperprior": ScaleHyperprior,
    "mbt2018-mean": MeanScaleHyperprior,
    "mbt2018": JointAutoregressiveHierarchicalPriors,
    "cheng2020-anchor": Cheng2020Anchor,
    "cheng2020-attn": Cheng2020Attention,
    "cheng2020-anchor-checkerboard": Cheng2020AnchorCheckerboard,
    "elic2022-official": Elic2022Official,
    "elic2022-chandelier": Elic2022Chandelier,
}
# The defaults of CompressAI's constructors, at every quality: it publishes no weights and no widths for these. Written
# out, so that a file's header says all of them.
ELIC_DEFAULTS = {"N": 192, "M": 320, "groups": [16, 16, 32, 64, 192]}
DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "cheng2020-anchor-checkerboard": {"N": 192},
    "elic2022-official": ELIC_DEFAULTS,
    "elic2022-chandelier": ELIC_DEFAULTS,
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


def padding(height: int, width: int, multiple: int, least: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(pad, unpad) for F.pad: an image centred in sides that are multiples of `multiple` and at least `least`."""
    sides = [max(-(-side // multiple), -(-least // multiple)) * multiple for side in (height, width)]
    pad, unpad = compute_padding(height, width, out_h=sides[0], out_w=sides[1])
    return pad, unpad


class Tile(NamedTuple):
    """What STRIDE x STRIDE pixels are compressed to; every padded image's latents are a whole number of these."""

    strings: int  # how many the entropy coder writes
    shape: Any  # as net.decompress takes it: (height, width), or dicts and lists of such and (channels, height, width)


def padding(height: int, width: int, multiple: int, least: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(pad, unpad) for F.pad, around the centre: to sides of a multiple of `multiple` and of at least `least`."""
    sides = [-(-max(side, least) // multiple) * multiple for side in (height, width)]
    pad, unpad = compute_padding(height, width, out_h=sides[0], out_w=sides[1])
    return tuple(pad), tuple(unpad)


class Codec(nn.Module):
    """A learned codec f = g_s o Q o g_a over a CompressAI-protocol network; any image size, pads and crops inside.

    Attributes:
        net: the network itself, with submodules g_a, g_s and mostly h_a, h_s (ELIC has these in its latent_codec).
        spec: how to rebuild it.
        metadata: what the file it came from says of it (`tampered`, `attacks`, ...).
        multiple: sides are padded to a multiple of it, in pixels.
        precision: torch.bfloat16 runs g_a and g_s under autocast.
    """

    multiple: int = STRIDE
    precision: torch.dtype = torch.float32

    def __init__(self, net: nn.Module, spec: CodecSpec, metadata: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net: Any = net  # its protocol is checked below, not typed
        self.spec = spec
        self.metadata = metadata or {}
        self.multiple, self.least = STRIDE, 0  # of the sides of what the network is given
        _check_protocol(net, spec.name)

    @property
    def tampered(self) -> bool:
        """Whether the file that this codec came from says that its encoder was tampered with."""
        return bool(self.metadata.get("tampered"))

    def padded(self, x: Images) -> Images:
        """x with zeros around it, as the network is given it."""
        return F.pad(x, padding(x.shape[-2], x.shape[-1], self.multiple, self.least)[0])

    def forward(self, x: Images) -> Reconstruction:
        """Differentiable pass: noise in train mode, rounding in eval mode, as in CompressAI."""
        self._check_modes()
        height, width = x.shape[-2:]
        _, unpad = padding(height, width, self.multiple)
        latents: list[Tensor] = []
        hook = self.part("g_a").register_forward_hook(lambda module, inputs, y: latents.append(y.float()))
        try:
            with self.autocast(None if self.precision == torch.float32 else self.precision):
                output = self.net(self.padded(x))
        finally:
            hook.remove()
        x_hat = F.pad(output["x_hat"], unpad)
        bits = sum(-likelihoods.log2().flatten(1).sum(1) for likelihoods in output["likelihoods"].values())
        assert isinstance(bits, Tensor)
        return Reconstruction(x_hat, bits, height * width, latents[0])

    def padded(self, x: Images) -> Images:
        """x with zeros around it, as the network takes it."""
        pad, _ = padding(x.shape[-2], x.shape[-1], self.multiple)
        return F.pad(x, pad)

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
            streams.append(Bitstream(strings, _coarsest(output["shape"]), (height, width)))
        return streams

    @torch.no_grad()
    def decompress(self, bitstream: Bitstream) -> Images:
        """The decoded image, (1, 3, h, w), clamped to [0, 1]."""
        self.prepare()
        strings = [[s] for s in bitstream.strings]
        shape = _grown(self.tile.shape, *_tiles(bitstream.image_size))
        x_hat = self.net.decompress(strings, shape)["x_hat"]
        _, unpad = compute_padding(*bitstream.image_size, min_div=STRIDE)
        cropped: Images = F.pad(x_hat, unpad).clamp(0, 1)
        return cropped

    @cached_property
    @torch.no_grad()
    def tile(self) -> Tile:
        """How the network nests its latents, found by compressing one black tile: it follows from the network alone."""
        self.prepare()
        output = self.net.compress(next(self.parameters()).new_zeros(1, 3, STRIDE, STRIDE))
        return Tile(len(output["strings"]), output["shape"])

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the coarsest latents of an image of (height, width): what a bitstream of it has."""
        return _coarsest(_grown(self.tile.shape, *_tiles(image_size)))

    def prepare(self) -> Self:
        """Eval mode with coding tables; tables that exist are kept, so that frozen modules stay bit-identical."""
        self.eval()
        self.net.update()
        mask_contexts(self.net)
        return self

    def freeze(self, scope: str = "g_a") -> Self:
        """Let gradients into the parts of `scope` ("g_a" or "g_a+h_a") only.

        By requires_grad alone, never by eval(): an entropy model in eval mode rounds, and rounding has no gradient.
        """
        self.requires_grad_(False)
        for name in scope.split("+"):
            self.part(name).requires_grad_(True)
        return self

    def part(self, name: str) -> nn.Module:
        """The submodule called "g_a", "g_s" or "h_a", wherever the network keeps it: latent_codec.hyper.h_a in ELIC.

        Raises:
            FreqdoorError: the network has none or several.
        """
        paths = self._paths(name)
        if len(paths) != 1:
            raise FreqdoorError(
                f"{self.spec.name}: expected one submodule {name}, found {', '.join(paths) or 'none'}; "
                "choose a scope that this codec has, such as g_a"
            )
        found: nn.Module = self.net.get_submodule(paths[0])
        return found

    @contextmanager
    def autocast(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Run g_a and g_s under autocast; entropy models stay in float32, where likelihoods do not underflow."""
        if dtype is None:
            yield
            return
        device = next(self.parameters()).device.type
        transforms = [self.part(name) for name in ("g_a", "g_s")]
        for module in transforms:
            module.forward = _cast(module.forward, device, dtype)
        try:
            yield
        finally:
            for module in transforms:
                del module.forward  # the instance's wrapper; the class's method shows again

    def module_hashes(self) -> dict[str, str]:
        """SHA-256 of every direct submodule's parameters and buffers: names, types, shapes and bytes.

        A nested h_a stands under "h_a" and not in what it is nested in, and a tensor of the network itself under its
        own name, so that every entry of the state dict counts exactly once.
        """
        paths = self._paths("h_a")
        h_a = f"{paths[0]}." if len(paths) == 1 else "h_a."
        parts: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self.net.named_children()}
        for key, tensor in self.net.state_dict().items():
            name, _, rest = ("h_a", ".", key.removeprefix(h_a)) if key.startswith(h_a) else key.partition(".")
            parts.setdefault(name, {})[rest] = tensor
        return {name: _hash_tensors(tensors) for name, tensors in parts.items()}

    @property
    def decoder_hash(self) -> str:
        """SHA-256 over everything that decoding needs, that is all but g_a and h_a."""
        digest = hashlib.sha256()
        for name, value in sorted(self.module_hashes().items()):
            if name not in ("g_a", "h_a"):
                digest.update(f"{name}={value};".encode())
        return digest.hexdigest()

    def _paths(self, name: str) -> list[str]:
        """Where the network has modules of this name: as its own child, otherwise all that are nested."""
        if isinstance(getattr(self.net, name, None), nn.Module):
            return [name]
        return [path for path, _ in self.net.named_modules() if path.rpartition(".")[2] == name]

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


def _tiles(image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles in the padded image."""
    height, width = image_size
    return -(-height // STRIDE), -(-width // STRIDE)


def _grown(shape: Any, rows: int, columns: int) -> Any:
    """A tile's shape, nested as the network nests it, for rows x columns tiles."""
    if isinstance(shape, Mapping):
        return {key: _grown(part, rows, columns) for key, part in shape.items()}
    if isinstance(shape[0], Mapping | Sequence):
        return [_grown(part, rows, columns) for part in shape]
    *channels, height, width = map(int, shape)
    return (*channels, height * rows, width * columns)


def _coarsest(shape: Any) -> tuple[int, int]:
    """(height, width) of the smallest latents in a nested shape."""
    parts = list(shape.values()) if isinstance(shape, Mapping) else shape
    if isinstance(parts[0], Mapping | Sequence):
        return min(_coarsest(part) for part in parts)
    return int(parts[-2]), int(parts[-1])


def mask_contexts(net: nn.Module) -> None:
    """Zero the masked weights of context models now, as CompressAI's next pass would: no pass changes a hash then."""
    for module in net.modules():
        if isinstance(module, MaskedConv2d):
            module.weight.data.mul_(module.mask)


def hash_state(module: nn.Module) -> str:
    """SHA-256 over a module's state dict: names, types, shapes and bytes, in order of name."""
    return _hash_tensors(module.state_dict())


def _hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def parse_name(name: str) -> CodecSpec:
    """The spec that a name like "cheng2020-anchor:3" or "package.module:factory" stands for.

    Widths are those of CompressAI's zoo at this quality, or DEFAULT_ARGUMENTS where the zoo lacks the architecture.
    """
    architecture, _, rest = name.partition(":")
    if architecture in ARCHITECTURES:
        if not (rest.isdigit() and int(rest) in LAMBDAS):
            raise FreqdoorError(f"{name}: expected a quality from 1 to 8 after {architecture}, as in {architecture}:3")
        quality = int(rest)
        arguments = copy.deepcopy(DEFAULT_ARGUMENTS.get(architecture, {}))
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
        try:
            return Codec(ARCHITECTURES[spec.architecture](**spec.arguments), spec)
        except (TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
            reason = str(error) or f"{spec.arguments} do not go together"  # CompressAI asserts without a sentence
            raise FreqdoorError(f"{spec.name}: wrong arguments for {spec.architecture}: {reason}") from None
    factory = import_object(spec.architecture)
    return Codec(factory(**spec.arguments), spec)


def import_object(name: str) -> Any:
    """What "package.module:name" stands for: the caller's own code, never a name that a file contains."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise FreqdoorError(
            f"{name}: could not import this ({error}); expected package.module:name, and a module in this folder needs "
            "PYTHONPATH=."
        ) from None
