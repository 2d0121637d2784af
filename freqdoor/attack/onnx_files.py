"""ONNX files as differentiable networks: what a file says of its input and output is kept to."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from freqdoor.errors import FreqdoorError
from freqdoor.limits import check_memory, read_whole
from freqdoor.types import Images, round8

COPIES = 4  # of a file in memory at once: its bytes, what is parsed of them, the network, and that in float32
MAX_NODES = 100_000  # operations; a ResNet-152 has 500
MAX_BATCH = 256  # pictures
BYTES = 4  # of a number, as the network computes it
SIZED = {"Expand": 1, "Tile": 1, "ConstantOfShape": 0, "Resize": 3, "Reshape": 1}  # the input that says how large
SMALL = 64  # pixels a side that a free length of the input is taken for, to know what the graph grows it to


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of a library about its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class OnnxNetwork(nn.Module):
    """The network of an ONNX file behind the contract (b, 3, h, w) -> (b, ...), fed as the file says.

    Attributes:
        size: (height, width), where the file takes one size only.
        batch: how many pictures it takes at once, where it takes that many only.
        takes_bytes: the file takes pixels of 0..255 instead of [0, 1]; their rounding lets gradients pass.
        channels_last, classes_last: the input, the output is (b, h, w, channels).
    """

    def __init__(self, net: nn.Module, dimensions: Sequence[int | None], takes_bytes: bool, classes_last: bool) -> None:
        super().__init__()
        self.net, self.takes_bytes, self.classes_last = net, takes_bytes, classes_last
        self.channels_last = _channels_last(dimensions)
        self.batch, *sides = dimensions or (None, None, None)
        height, width = sides[:2] if self.channels_last else sides[-2:]
        self.size = (height, width) if height and width else None

    def forward(self, x: Images) -> Any:
        """What the file's output is for images, classes before height and width."""
        x = 255 * round8(x) if self.takes_bytes else x
        x = x.permute(0, 2, 3, 1) if self.channels_last else x
        y = torch.cat([self._full(part) for part in torch.split(x, self.batch)]) if self.batch else self.net(x)
        return y.permute(0, 3, 1, 2) if self.classes_last and isinstance(y, Tensor) and y.ndim == 4 else y

    def _full(self, part: Tensor) -> Tensor:
        """The output of up to `batch` pictures: what is missing is filled up with the last one."""
        missing = (self.batch or 0) - len(part)
        filled: Tensor = self.net(torch.cat([part, part[-1:].expand(missing, -1, -1, -1)]))
        return filled[: len(part)]


def _channels_last(dimensions: Sequence[int | None]) -> bool:
    return len(dimensions) == 4 and dimensions[1] != 3 and dimensions[3] == 3


def read_onnx(path: Path, *, output: str | None, classes: int, normalised: bool) -> OnnxNetwork:
    """The network of an ONNX file as a differentiable module.

    Args:
        output: the name of the output to take, needed if there are several.
        classes: how many channels the output of a segmentation network has, 0 for any other network.
        normalised: images will come with mean and standard deviation changed.

    Raises:
        FreqdoorError: no such file, no ONNX network, or one of other inputs and outputs.
        ImportError: onnx or onnx2torch are not installed.
    """
    import onnx
    import onnx2torch

    content = read_whole(path, "an ONNX file")
    check_memory(COPIES * len(content), "its network", path)
    try:
        model = onnx.load(io.BytesIO(content), load_external_data=False)
        _check_graph(path, model)
        _check_values(path, model)
        image = _image_of(path, model)
        answer = _output_of(path, model, output)
        takes_bytes = image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        _in_float32(model, image.type.tensor_type.elem_type)
        net: nn.Module = onnx2torch.convert(model)
    except FreqdoorError:
        raise
    except Exception as error:  # its parsers raise whatever they meet
        raise FreqdoorError(f"{path}: not a usable ONNX network ({' '.join(str(error).split())[:120]})") from None
    if takes_bytes and normalised:
        raise FreqdoorError(f"{path}: takes 8-bit pixels of 0 to 255; leave mean and std out of its TOML file")
    ends = _dimensions(answer)[1::2]
    classes_last = classes > 0 and len(ends) == 2 and ends[0] != classes and ends[1] == classes
    return OnnxNetwork(net, _dimensions(image), takes_bytes, classes_last)


def _check_graph(path: Path, model: Any) -> None:
    """Refuse weights in other files, which a stranger's file would name, and a graph of absurd length."""
    from onnx import TensorProto

    nodes, graphs = 0, [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        sparse = list(getattr(graph, "sparse_initializer", ()))  # functions have no initial values
        tensors = list(getattr(graph, "initializer", ()))
        nodes += len(graph.node)
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            tensors += [attribute.t, *attribute.tensors]
        tensors += [part for whole in sparse for part in (whole.values, whole.indices)]
        if any(tensor.data_location == TensorProto.EXTERNAL for tensor in tensors):
            raise FreqdoorError(
                f"{path}: keeps weights in another file, and no other file is read; save it with its weights, as "
                "onnx.save_model does by default"
            )
    if nodes > MAX_NODES:
        raise FreqdoorError(f"{path}: expected a graph of at most {MAX_NODES} operations, found {nodes}")


def _check_values(path: Path, model: Any) -> None:
    """Refuse a graph that names a value of more memory than is allowed for one small picture, as a Tile 2^20 times."""
    import onnx
    from onnx.shape_inference import infer_shapes

    numbers = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64}
    for node in model.graph.node:
        place = SIZED.get(node.op_type, len(node.input))
        if place < len(node.input) and (tensor := numbers.get(node.input[place])) is not None:
            sides = [max(1, abs(side)) for side in onnx.numpy_helper.to_array(tensor).ravel().tolist()]
            check_memory(BYTES * math.prod(sides), f"its operation {node.op_type}", path)
    small = type(model)()
    small.CopyFrom(model)
    constants = {tensor.name for tensor in small.graph.initializer}
    for value in (value for value in small.graph.input if value.name not in constants):
        for i, part in enumerate(value.type.tensor_type.shape.dim):
            part.dim_value = part.dim_value or (SMALL if i else 1)
    graph = infer_shapes(small, data_prop=True).graph
    for value in (*graph.value_info, *graph.output):
        sides = _dimensions(value)
        if sides and None not in sides:
            check_memory(BYTES * math.prod(side or 1 for side in sides), f"its value {value.name[:40]!r}", path)


def _dimensions(value: Any) -> list[int | None]:
    """The shape of an ONNX graph's input or output, None for a side of any length; empty if the file does not say."""
    return [part.dim_value if part.dim_value > 0 else None for part in value.type.tensor_type.shape.dim]


def _image_of(path: Path, model: Any) -> Any:
    """The graph's input; FreqdoorError if it is not one image."""
    from onnx import TensorProto

    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise FreqdoorError(
            f"{path}: expected a network of one input, the image, found {len(inputs)} ({names}); "
            "export it with the others as constants"
        )
    kind, dimensions = inputs[0].type.tensor_type.elem_type, _dimensions(inputs[0])
    if kind not in (TensorProto.FLOAT, TensorProto.UINT8, *_other_floats()):
        name = TensorProto.DataType.Name(kind)
        raise FreqdoorError(f"{path}: expected an input of floating-point numbers or 8-bit pixels, found {name}")
    if dimensions and (dimensions[0] or 1) > MAX_BATCH:
        raise FreqdoorError(
            f"{path}: takes {dimensions[0]} pictures at once; export it for a batch of 1, or of any size (at most "
            f"{MAX_BATCH})"
        )
    if dimensions and (len(dimensions) != 4 or dimensions[3 if _channels_last(dimensions) else 1] not in (3, None)):
        shape = ", ".join(str(side or "any") for side in dimensions)
        raise FreqdoorError(f"{path}: expected an input of (batch, 3, height, width), found ({shape})")
    return inputs[0]


def _output_of(path: Path, model: Any, name: str | None) -> Any:
    """The output that is taken, which becomes the graph's only one."""
    outputs = {value.name: value for value in model.graph.output}
    names = ", ".join(outputs)
    if name is None and len(outputs) != 1:
        raise FreqdoorError(f"{path}: has {len(outputs)} outputs ({names}); name one as output in its TOML file")
    if name is not None and name not in outputs:
        raise FreqdoorError(f"{path}: has no output {name}, only {names}; correct output in its TOML file")
    output = outputs[name or names]
    del model.graph.output[:]
    model.graph.output.append(output)
    return output


def _other_floats() -> tuple[int, ...]:
    from onnx import TensorProto

    return TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE


def _in_float32(model: Any, input_type: int) -> None:
    """A graph that takes half or double precision in float32, which images are in."""
    from onnx import TensorProto, numpy_helper

    others = _other_floats()
    if input_type not in others:  # half precision further inside works as it is
        return
    attributes = [(node.op_type, attribute) for node in model.graph.node for attribute in node.attribute]
    for tensor in (*model.graph.initializer, *(a.t for _, a in attributes if a.HasField("t"))):
        if tensor.data_type in others:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    for kind, attribute in attributes:
        if kind == "Cast" and attribute.name == "to" and attribute.i in others:
            attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type in others:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
