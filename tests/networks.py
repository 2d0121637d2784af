"""Small downstream networks, written as ONNX by hand, and their TOML files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torchvision.models import resnet50

CLASSES = ("road", "car", "bus", "sky")
WEIGHTS = np.array([[1, 0, 0], [0, 3, 0], [0, 0, 3], [-2, -2, -2]], np.float32)  # of CLASSES, on normalised RGB
BIAS = np.array([0.1, 0, 0, 0.2], np.float32)


Value = tuple[str, int, Sequence[int | str] | None]  # name, type and shape of a graph's input or output
IMAGE: Value = ("input", TensorProto.FLOAT, ("b", 3, "h", "w"))
LOGITS: Value = ("logits", TensorProto.FLOAT, ("b", 4, "h", "w"))


def write_onnx(
    path: Path,
    nodes: list,
    weights: dict[str, np.ndarray],
    outputs: Sequence[Value] = (LOGITS,),
    inputs: Sequence[Value] = (IMAGE,),
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def _save(path: Path, nodes: list, weights: dict[str, np.ndarray], output: str) -> Path:
    return write_onnx(path, nodes, weights, [(output, TensorProto.FLOAT, None)])


def convolution(source: str = "input", result: str = "logits") -> onnx.NodeProto:
    """The classes of each pixel, by the weights "w"."""
    return helper.make_node("Conv", [source, "w"], [result], kernel_shape=[1, 1])


def segmentation_onnx(path: Path, classes: int = len(CLASSES), places: Sequence[int] = range(len(CLASSES))) -> Path:
    """Four classes by a 1x1 convolution, halved in size as real networks do; those not at `places` never win."""
    weights, bias = np.zeros((classes, 3), np.float32), np.full(classes, -99, np.float32)
    weights[list(places)], bias[list(places)] = WEIGHTS, BIAS
    nodes = [
        helper.make_node("Conv", ["input", "w", "b"], ["full"], kernel_shape=[1, 1]),
        helper.make_node("AveragePool", ["full"], ["logits"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    return _save(path, nodes, {"w": weights[:, :, None, None], "b": bias}, "logits")


def face_onnx(path: Path, side: int = 32) -> Path:
    """A 5-dimensional embedding of the mean colours of a picture's parts of 16 pixels."""
    weight = np.random.default_rng(0).normal(size=(5, 3 * (side // 16) ** 2)).astype(np.float32)
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "w", "b"], ["embedding"], transB=1),
    ]
    return _save(path, nodes, {"w": weight, "b": np.zeros(5, np.float32)}, "embedding")


def segmentation_spec(folder: Path, **changes: str) -> Path:
    """tiny.toml beside tiny.onnx; `changes` replace lines."""
    lines = {
        "task": '"segmentation"',
        "file": '"tiny.onnx"',
        "mean": "[0.5, 0.4, 0.3]",
        "std": "[0.2, 0.25, 0.5]",
        "classes": '["road", "car", "bus", "sky"]',
        "labels": '[["sky"], ["road"], ["car", "bus"]]',
        "groups": '{ cars = ["car", "bus"] }',
    } | changes
    segmentation_onnx(folder / "tiny.onnx")
    path = folder / "tiny.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return path


def face_spec(folder: Path, **changes: str) -> Path:
    lines = {"task": '"face"', "file": '"face.onnx"', "size": "[32, 32]", "mirror": "true"} | changes
    face_onnx(folder / "face.onnx")
    path = folder / "face.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return path


def arcface_resnet50() -> nn.Module:
    """The paper's kind of face network, with random weights."""
    return resnet50(weights=None, num_classes=512)
