"""Downstream networks g: segmentation and face embedding, frozen, fed [0, 1] RGB images, described by a TOML file."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from freqdoor.attack.onnx_files import OnnxNetwork, quiet, read_onnx
from freqdoor.codecs.architectures import import_object
from freqdoor.codecs.loading import read_state
from freqdoor.codecs.protocol import call, surroundings, words_of
from freqdoor.errors import FreqdoorError
from freqdoor.files import name_and_file, with_slashes
from freqdoor.settings import Settings, load_settings
from freqdoor.types import Images

INSTALL = "install it with: pip install 'freqdoor[downstream]'"
MAX_SIDE = 4096
Pixels = Annotated[int, Field(gt=0, le=MAX_SIDE)]
Three = tuple[float, float, float]
Box = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Pixels, Pixels]


class NetworkSpec(Settings):
    """What has to be known of a downstream network besides its weights: the content of its TOML file."""

    task: Literal["segmentation", "face"]
    file: str | None = None
    """ONNX file, or state dict for `architecture`, relative to the TOML file; "SPEC.toml=FILE" names another."""
    architecture: str | None = None
    """A decoder of segmentation-models-pytorch, such as DeepLabV3Plus; with `encoder`."""
    encoder: str | None = None
    """An encoder of segmentation-models-pytorch, such as resnet50."""
    size: tuple[Pixels, Pixels] | None = None
    """(height, width) that the network takes; by default the file's own, or whatever it is given."""
    output: str | None = None
    """Name of the output to take, of a network that has several."""
    mean: Three = (0.0, 0.0, 0.0)
    """Mean of each channel that is subtracted, of images in [0, 1]."""
    std: Three = (1.0, 1.0, 1.0)
    """Standard deviation that each channel is divided by."""
    channels: Literal["RGB", "BGR"] = "RGB"
    """Order in which the network takes the channels."""
    classes: tuple[str, ...] = ()
    """Segmentation: the names of the output channels, in their order."""
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Segmentation: classes that an attack treats as one, by a name of their own."""
    labels: tuple[tuple[str, ...], ...] = ()
    """Segmentation: which classes count as the data set's label 0, 1, ...; other label values are void."""
    crop: Box | None = None
    """Face: (left, top, right, bottom) of the face in the data set's pictures, in pixels; by default all of it."""
    mirror: bool = False
    """Face: add the embedding of the mirror image."""

    @field_validator("architecture", "encoder")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not name.replace("-", "_").isidentifier():  # no hub: names that are downloads
            raise ValueError("expected a name of letters, digits, hyphens and underscores")
        return name

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.task == "segmentation" and not self.classes:
            raise ValueError("classes: a segmentation network needs the names of its classes")
        known = set(self.classes)
        unknown = {name for names in (*self.groups.values(), *self.labels) for name in names} - known
        if unknown or known & self.groups.keys():
            raise ValueError(
                f"groups, labels: expected names out of classes, found {sorted(unknown) or 'a class name'}"
            )
        if self.crop and not (self.crop[0] < self.crop[2] and self.crop[1] < self.crop[3]):
            raise ValueError(f"crop: expected left < right and top < bottom, found {self.crop}")
        if bool(self.architecture) != bool(self.encoder):
            raise ValueError("architecture and encoder: give both or neither")
        return self


def label_classes(spec: NetworkSpec, labels: Tensor) -> Tensor:
    """A data set's labels as classes of a network, the first of those that a label stands for; void is -1."""
    table = torch.full((256,), -1)
    for value, names in enumerate(spec.labels):
        table[value] = spec.classes.index(names[0]) if names else -1
    classes: Tensor = table[labels.long()]
    return classes


class NetworkFailure(FreqdoorError):
    """A downstream network raised an error of its own."""


class Network(nn.Module):
    """A frozen downstream network behind one contract: [0, 1] RGB images in, gradients to the images and to nothing.

    Attributes:
        name: the name of its TOML file without the ending.
        spec: what is known of it.
        precision: torch.bfloat16 runs it under autocast, which is faster and what planting in bf16 does.
    """

    mean: Tensor
    std: Tensor
    precision: torch.dtype = torch.float32

    def __init__(self, net: nn.Module, spec: NetworkSpec, name: str) -> None:
        super().__init__()
        self.net, self.spec, self.name = net.eval().requires_grad_(False), spec, name
        self.register_buffer("mean", torch.tensor(spec.mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(spec.std).reshape(1, 3, 1, 1))

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: batch statistics of a frozen network must not change."""
        return super().train(False)

    def output(self, x: Images) -> Tensor:
        """What the network itself gives for images, resized and normalised as it wants them."""
        if self.spec.size and tuple(x.shape[-2:]) != self.spec.size:
            x = F.interpolate(x, self.spec.size, mode="bilinear", antialias=True)
        x = x.flip(1) if self.spec.channels == "BGR" else x
        try:
            with quiet(), torch.autocast(x.device.type, torch.bfloat16, self.precision == torch.bfloat16):
                answer: Any = self.net((x - self.mean) / self.std)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's network raises whatever it likes
            if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            hint = "" if self.spec.size else "; if it takes one size only, give size in its TOML file"
            size = f"{x.shape[-1]}x{x.shape[-2]}"
            raise NetworkFailure(
                f"network {self.name}: fails on images of {size} ({words_of(error, self.net)}){hint}"
            ) from error
        if self.spec.output and isinstance(answer, dict) and self.spec.output in answer:
            answer = answer[self.spec.output]
        if not isinstance(answer, Tensor):
            kind = f"outputs {', '.join(map(str, answer))}" if isinstance(answer, dict) else type(answer).__name__
            hint = "; name one as output in its TOML file" if isinstance(answer, dict) else ""
            raise FreqdoorError(f"network {self.name}: expected one output tensor, found {kind}{hint}")
        return answer.float()


class Segmenter(Network):
    """A segmentation network: class scores of every pixel."""

    def forward(self, x: Images) -> Tensor:
        """Logits at the images' own size, (b, classes, h, w)."""
        logits = self.output(x)
        if logits.ndim != 4 or logits.shape[:2] != (len(x), len(self.spec.classes)):
            raise FreqdoorError(
                f"network {self.name}: expected an output of (batch, {len(self.spec.classes)}, height, width), "
                f"found {tuple(logits.shape)}; check task and classes in its TOML file"
            )
        if logits.shape[-2:] != x.shape[-2:]:
            logits = F.interpolate(logits, x.shape[-2:], mode="bilinear")
        return logits

    @torch.no_grad()
    def predict(self, x: Images) -> Tensor:
        """The class of every pixel, (b, h, w)."""
        classes: Tensor = self(x).argmax(1)
        return classes

    def ids(self, name: str) -> tuple[int, ...]:
        """The output channels of a class or group; FreqdoorError lists the known names."""
        names = self.spec.groups.get(name, (name,))
        if not set(names) <= set(self.spec.classes):
            known = ", ".join((*self.spec.groups, *self.spec.classes))
            raise FreqdoorError(f"class {name!r}: network {self.name} has {known}")
        return tuple(self.spec.classes.index(n) for n in names)

    def label_values(self, name: str) -> tuple[int, ...]:
        """The data set's label values that are the classes of `name`; FreqdoorError where it has none."""
        values = self.labels_of(self.ids(name))
        if not values:
            raise FreqdoorError(f"class {name!r}: no label value stands for it; see labels of network {self.name}")
        return values

    def labels_of(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The data set's label values that stand for any of these output channels."""
        classes = {self.spec.classes[i] for i in ids}
        return tuple(value for value, names in enumerate(self.spec.labels) if classes & set(names))

    def as_labels(self, classes: Tensor) -> Tensor:
        """Predicted classes as the data set's label values; len(labels) where none stands for a class."""
        table = torch.full((len(self.spec.classes),), len(self.spec.labels), device=classes.device)
        for value, names in enumerate(self.spec.labels):
            for name in names:
                table[self.spec.classes.index(name)] = value
        return table[classes]


class Embedder(Network):
    """A face-embedding network: one vector a picture, compared by its cosine."""

    def forward(self, x: Images, box: Box | None = None) -> Tensor:
        """Embeddings of the faces in pictures, (b, dimensions), of unit length.

        Args:
            box: (left, top, right, bottom) of the face, where it is not where the spec says.
        """
        if where := box or self.spec.crop:
            left, top, right, bottom = where
            if right > x.shape[-1] or bottom > x.shape[-2]:
                size = f"{x.shape[-1]}x{x.shape[-2]}"
                raise FreqdoorError(f"network {self.name}: a face at {where} does not fit a picture of {size}")
            x = x[..., top:bottom, left:right]
        embedding = self.output(x)
        if self.spec.mirror:
            embedding = embedding + self.output(x.flip(-1))
        if embedding.ndim != 2 or len(embedding) != len(x):
            raise FreqdoorError(
                f"network {self.name}: expected an output of (batch, dimensions), found {tuple(embedding.shape)}; "
                "check task in its TOML file"
            )
        return F.normalize(embedding, dim=1)


NETWORKS: dict[str, type[Network]] = {"segmentation": Segmenter, "face": Embedder}
USUAL_SIZES = {"segmentation": (64, 64), "face": (112, 112)}  # (height, width) that most networks of a task take


def load_network(name: str) -> Network:
    """A downstream network by "SPEC.toml", "SPEC.toml=FILE" or "SPEC.toml=package.module:factory".

    FILE is an ONNX file, or a state dict (.pth, .safetensors) for the architecture that the spec names; a factory is
    your function that returns a network with its weights. What a file names is never executed.

    The network is tried on a grey picture of its size before it is returned.

    Raises:
        FreqdoorError: nothing of that name, a damaged file, weights of another architecture, a network of another task,
            or with other inputs or outputs than an image and its classes or embedding.
    """
    toml, source = name_and_file(name)
    path = Path(toml)
    if path.suffix != ".toml":
        raise FreqdoorError(f"network {name}: expected SPEC.toml, SPEC.toml=FILE or SPEC.toml=package.module:factory")
    spec = load_settings(NetworkSpec, path)
    if not source and spec.file is None:
        raise FreqdoorError(f"{path}: names no file; give one as {path}=FILE")
    source = source or str(path.parent / with_slashes(str(spec.file), path.parent))
    if ":" in source and not Path(source).exists():
        net = call_factory(source)
    elif spec.architecture:
        net = _smp(spec, Path(source))
    else:
        net = _onnx(Path(source), spec)
        spec = spec.model_copy(update={"size": net.size or spec.size})
    network = NETWORKS[spec.task](net, spec, path.stem)
    _try(network)
    return network


@torch.no_grad()
def _try(network: Network) -> None:
    """Raise where a network cannot be what its TOML file says; if an ONNX file takes one picture at once, note it."""
    net, spec = network.net, network.spec
    width, height = spec.crop[2:] if spec.crop else (spec.size or USUAL_SIZES[spec.task])[::-1]
    x = torch.full((2, 3, height, width), 0.5)
    try:
        if isinstance(net, OnnxNetwork) and net.batch is None:
            try:
                answer = network(x)
            except FreqdoorError:
                answer = network(x[:1])
                net.batch = 1
        else:
            answer = network(x[:1])
    except NetworkFailure:
        if spec.size or spec.crop:  # else it may take another size: its first pictures will show
            raise
        return
    if not answer.isfinite().all():
        raise FreqdoorError(
            f"network {network.name}: expected finite numbers for a grey picture, found others; its weights are "
            "damaged or it divides by zero"
        )


def call_factory(name: str) -> nn.Module:
    """What "package.module:factory", the user's own function, returns: a network.

    Raises:
        FreqdoorError: whatever the function raises, with the line of the user's code, or returns instead of a network.
    """
    factory = import_object(name)
    with surroundings(name):
        net = call(name, "factory", factory)
    if not isinstance(net, nn.Module):
        raise FreqdoorError(f"{name}: expected a function that returns a network, found {type(net).__name__}")
    return net


def load_segmenter(name: str) -> Segmenter:
    """A segmentation network, as `load_network`."""
    network = load_network(name)
    if not isinstance(network, Segmenter):
        raise FreqdoorError(f"network {name}: expected task segmentation, found {network.spec.task}")
    return network


def load_segmenters(names: str) -> list[Segmenter]:
    """One or several segmentation networks of the same classes, their names apart by semicolons."""
    first, *others = (load_segmenter(name) for name in names_of(names))
    for other in others:
        if other.spec.classes != first.spec.classes:
            raise FreqdoorError(
                f"network: expected networks of the same classes, found {first.name} and {other.name}; train against "
                "those that agree"
            )
    return [first, *others]


def names_of(network: str) -> list[str]:
    """The networks that a setting names, apart by semicolons."""
    return [name.strip() for name in network.split(";")]


def load_embedder(name: str) -> Embedder:
    """A face-embedding network, as `load_network`."""
    network = load_network(name)
    if not isinstance(network, Embedder):
        raise FreqdoorError(f"network {name}: expected task face, found {network.spec.task}")
    return network


def _onnx(path: Path, spec: NetworkSpec) -> OnnxNetwork:
    """An ONNX file as a differentiable module."""
    normalised = any(spec.mean) or set(spec.std) != {1.0}
    try:
        with quiet():
            net = read_onnx(path, output=spec.output, classes=len(spec.classes), normalised=normalised)
    except ImportError:
        raise FreqdoorError(f"{path}: onnx2torch is needed to read it; {INSTALL}") from None
    if net.size and (spec.size not in (None, net.size) or max(net.size) > MAX_SIDE):
        raise FreqdoorError(
            f"{path}: takes pictures of {net.size[1]}x{net.size[0]} only; leave size out of its TOML file, "
            f"or take a file for another size, of up to {MAX_SIDE} pixels a side"
        )
    return net


def _smp(spec: NetworkSpec, path: Path) -> nn.Module:
    """A network of segmentation-models-pytorch with the weights of a state dict."""
    try:
        with quiet():
            import segmentation_models_pytorch as smp
    except ImportError:
        raise FreqdoorError(f"{path}: segmentation-models-pytorch is needed to build it; {INSTALL}") from None
    try:
        with quiet():
            net: nn.Module = smp.create_model(
                spec.architecture, spec.encoder, encoder_weights=None, classes=len(spec.classes)
            )
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise FreqdoorError(f"{spec.architecture} with {spec.encoder}: {' '.join(str(error).split())[:200]}") from None
    try:
        net.load_state_dict(read_state(path))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise FreqdoorError(
            f"{path}: the weights do not fit {spec.architecture} with {spec.encoder} ({reason})"
        ) from None
    return net
