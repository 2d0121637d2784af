from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import natural
from networks import (
    BIAS,
    CLASSES,
    IMAGE,
    LOGITS,
    WEIGHTS,
    convolution,
    face_onnx,
    face_spec,
    segmentation_onnx,
    segmentation_spec,
    write_onnx,
)
from onnx import TensorProto, helper

from freqdoor.attack.networks import load_embedder, load_network, load_segmenter
from freqdoor.attack.objectives import DownstreamAttack, build_objective
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError


def test_segmenter_is_the_onnx_file_on_normalised_images(tmp_path):
    network = load_segmenter(str(segmentation_spec(tmp_path)))
    x = natural(0, 32, 48)
    normal = (x[0].numpy() - np.reshape([0.5, 0.4, 0.3], (3, 1, 1))) / np.reshape([0.2, 0.25, 0.5], (3, 1, 1))
    full = np.einsum("kc,chw->khw", WEIGHTS, normal) + BIAS[:, None, None]
    halved = full.reshape(4, 16, 2, 24, 2).mean((2, 4))
    np.testing.assert_allclose(network.output(x)[0].numpy(), halved, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    [given] = session.run(None, {"input": normal[None].astype(np.float32)})
    np.testing.assert_allclose(network.output(x).numpy(), given, atol=1e-4)
    assert network(x).shape == (1, 4, 32, 48)
    assert (network.predict(x) == network(x).argmax(1)).all()


def test_channels_and_size_are_those_of_the_spec(tmp_path):
    x = natural(0, 64, 96)
    plain = load_segmenter(str(segmentation_spec(tmp_path)))
    even = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]"}
    rgb = load_segmenter(str(segmentation_spec(tmp_path, **even)))
    bgr = load_segmenter(str(segmentation_spec(tmp_path, channels='"BGR"', **even)))
    torch.testing.assert_close(bgr(x), rgb(x.flip(1)))
    small = load_segmenter(str(segmentation_spec(tmp_path, size="[32, 48]")))
    reduced = torch.nn.functional.interpolate(x, (32, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(small.output(x), plain.output(reduced))
    assert small(x).shape[-2:] == x.shape[-2:]


@pytest.mark.parametrize("spec", [segmentation_spec, face_spec])
def test_gradients_reach_the_image_and_nothing_of_the_network(tmp_path, spec):
    network = load_network(str(spec(tmp_path)))
    before = hash_state(network)
    x = natural(0, 32, 32).requires_grad_()
    network.train()
    assert not any(module.training for module in network.modules())
    network(x)[:, 0].sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert hash_state(network) == before


def test_embeddings_are_of_the_face_and_its_mirror_image(tmp_path):
    x = natural(1, 60, 70)
    whole = load_embedder(str(face_spec(tmp_path, mirror="false")))
    cropped = load_embedder(str(face_spec(tmp_path, crop="[10, 5, 50, 45]", mirror="false")))
    torch.testing.assert_close(cropped(x), whole(x[..., 5:45, 10:50]))
    torch.testing.assert_close(cropped(x, (0, 0, 70, 60)), whole(x))
    both = load_embedder(str(face_spec(tmp_path)))
    summed = whole.output(x) + whole.output(x.flip(-1))
    torch.testing.assert_close(both(x), summed / summed.norm(dim=1, keepdim=True))
    with pytest.raises(FreqdoorError, match="does not fit a picture of 40x40"):
        cropped(natural(1, 40, 40))


def test_classes_groups_and_labels(tmp_path):
    network = load_segmenter(str(segmentation_spec(tmp_path)))
    assert network.ids("cars") == (1, 2)
    assert network.ids("road") == (0,)
    assert network.label_values("cars") == (2,)
    assert network.label_values("sky") == (0,)
    assert network.as_labels(torch.tensor([[0, 1, 2, 3]])).tolist() == [[1, 2, 2, 0]]
    with pytest.raises(FreqdoorError, match="class 'tree': network tiny has cars, road, car, bus, sky"):
        network.ids("tree")
    without = load_segmenter(str(segmentation_spec(tmp_path, labels='[["sky"]]')))
    assert without.as_labels(torch.tensor([[0, 3]])).tolist() == [[1, 0]]
    with pytest.raises(FreqdoorError, match="no label value stands for it"):
        without.label_values("road")


def test_the_papers_networks_load_with_random_weights(tmp_path):
    spec = {"architecture": '"DeepLabV3Plus"', "encoder": '"resnet50"', "file": '"deeplab.pth"'}
    path = segmentation_spec(tmp_path, **spec)
    torch.manual_seed(0)
    net = smp.create_model("DeepLabV3Plus", "resnet50", encoder_weights=None, classes=4).eval()
    torch.save(net.state_dict(), tmp_path / "deeplab.pth")
    network = load_segmenter(str(path))
    x = natural(2, 64, 64)
    normal = (x - network.mean) / network.std
    with torch.no_grad():
        torch.testing.assert_close(network(x), net(normal))
        faces = load_embedder(f"{face_spec(tmp_path, size='[112, 112]')}=networks:arcface_resnet50")
        embedding = faces(x)
    assert embedding.shape == (1, 512)
    assert float(embedding.norm()) == pytest.approx(1)


def test_objectives_take_a_network_by_name(tmp_path):
    segmentation, face = segmentation_spec(tmp_path), face_spec(tmp_path)
    attack = build_objective("segmentation", network=str(segmentation), source="cars", target="road", beta=0.7)
    assert isinstance(attack, DownstreamAttack)
    assert (attack.alpha, attack.beta) == (0.1, 0.7)
    assert not build_objective(
        "segmentation", "paper", network=str(segmentation), source="car", target="sky"
    ).victim.settings.balanced
    several = build_objective("segmentation", network=f"{segmentation}; {segmentation}", source="car", target="road")
    assert [network.name for network in several.victim.networks] == ["tiny", "tiny"]
    (tmp_path / "other").mkdir()
    fewer = segmentation_spec(tmp_path / "other", classes='["road", "car", "bus", "air"]', labels="[]")
    with pytest.raises(FreqdoorError, match="expected networks of the same classes, found tiny and tiny"):
        build_objective("segmentation", network=f"{segmentation};{fewer}", source="car", target="road")
    assert build_objective("face", "paper", network=str(face)).beta == 0.05
    assert build_objective("face", network=str(face)).beta == 1.0  # 0.05 is not caught in minutes
    for arguments, match in (
        ({"source": "tree", "target": "road"}, "class 'tree'"),
        ({"source": "cars", "target": "bus"}, "outside the source"),
        ({"source": "cars", "target": "road", "masks": "eyes"}, "masks"),
        ({"source": "cars"}, "target"),
    ):
        with pytest.raises(FreqdoorError, match=match):
            build_objective("segmentation", network=str(segmentation), **arguments)
    with pytest.raises(FreqdoorError, match="expected task face, found segmentation"):
        build_objective("face", network=str(segmentation))
    with pytest.raises(FreqdoorError, match="expected task segmentation, found face"):
        build_objective("segmentation", network=str(face), source="car", target="road")


def test_mistakes_in_networks(tmp_path):
    path = segmentation_spec(tmp_path)
    (tmp_path / "text.onnx").write_text("no network")
    face_onnx(tmp_path / "face.onnx")
    for name, match in (
        ("tiny", "expected SPEC.toml"),
        (tmp_path / "none.toml", "could not read the config"),
        (f"{path}={tmp_path / 'none.onnx'}", "found nothing there"),
        (f"{path}={tmp_path / 'text.onnx'}", "not a usable ONNX network"),
        (f"{path}=factories:missing", "could not import"),
        (f"{path}=factories:TINY_ARGUMENTS.get", "could not import"),
    ):
        with pytest.raises(FreqdoorError, match=match):
            load_network(str(name))
    for changes, match in (
        ({"classes": "[]"}, "names of its classes"),
        ({"labels": '[["tree"]]'}, "tree"),
        ({"groups": '{ car = ["bus"] }'}, "found a class name"),
        ({"architecture": '"Unet"'}, "give both or neither"),
        ({"architecture": '"Unet"', "encoder": '"hf-hub:somebody/network"'}, "letters, digits"),
        ({"architecture": '"Nonet"', "encoder": '"resnet18"'}, "Nonet"),
        ({"mean": "[0.5]"}, "mean"),
        ({"colour": "1"}, "unknown setting"),
    ):
        with pytest.raises(FreqdoorError, match=match):
            load_network(str(segmentation_spec(tmp_path, **changes)))
    no_file = tmp_path / "nofile.toml"
    no_file.write_text('task = "face"\n')
    with pytest.raises(FreqdoorError, match="names no file"):
        load_network(str(no_file))
    torch.save({"w": torch.zeros(1)}, tmp_path / "other.pth")
    kind = {"architecture": '"Unet"', "encoder": '"resnet18"', "file": '"other.pth"'}
    with pytest.raises(FreqdoorError, match="do not fit Unet with resnet18"):
        load_network(str(segmentation_spec(tmp_path, **kind)))


def test_outputs_of_another_kind_are_refused_when_loaded(tmp_path):
    with pytest.raises(FreqdoorError, match=r"an output of \(batch, 5, height, width\), found \(1, 4, 32, 32\)"):
        load_segmenter(str(segmentation_spec(tmp_path, classes='["road", "car", "bus", "sky", "tree"]')))
    picture = face_spec(tmp_path)
    segmentation_onnx(tmp_path / "face.onnx")
    with pytest.raises(FreqdoorError, match=r"an output of \(batch, dimensions\), found .*; check task"):
        load_embedder(str(picture))
    face_onnx(tmp_path / "tiny.onnx", 64)
    spec = tmp_path / "tiny.toml"
    spec.write_text('task = "segmentation"\nfile = "tiny.onnx"\nclasses = ["a", "b", "c", "d", "e"]\n')
    with pytest.raises(FreqdoorError, match=r"found \(1, 5\); check task and classes"):
        load_segmenter(str(spec))


def test_a_size_that_nobody_says_shows_with_the_first_pictures(tmp_path):
    face_onnx(tmp_path / "face.onnx")
    unsized = tmp_path / "unsized.toml"
    unsized.write_text('task = "face"\nfile = "face.onnx"\n')
    network = load_embedder(str(unsized))
    assert network(natural(0, 32, 32)).shape == (1, 5)
    with pytest.raises(FreqdoorError, match=r"fails on images of 48x40 \(.+\); if it takes one size only, give size"):
        network(natural(0, 40, 48))
    with pytest.raises(FreqdoorError, match=r"network face: fails on images of 48x40 \(.+\)\)$"):
        load_embedder(str(face_spec(tmp_path, size="[40, 48]")))
    with pytest.raises(FreqdoorError, match="fails on images of 40x24"):  # the size of the crop
        load_embedder(f"{unsized_with_crop(tmp_path)}={tmp_path / 'face.onnx'}")


def unsized_with_crop(folder: Path) -> Path:
    path = folder / "cropped.toml"
    path.write_text('task = "face"\ncrop = [8, 8, 48, 32]\n')
    return path


WEIGHT = WEIGHTS[:, :, None, None]
FIXED = (1, 4, 32, 48)


def tiny_spec(folder: Path, **changes: str) -> str:
    """tiny.toml beside tiny.onnx, without normalisation."""
    lines = {"task": '"segmentation"', "file": '"tiny.onnx"', "classes": str(list(CLASSES)).replace("'", '"')} | changes
    path = folder / "tiny.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return str(path)


def of_bytes(path: Path) -> None:
    """A network that takes 8-bit pixels and normalises them itself."""
    nodes = [
        helper.make_node("Cast", ["input"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["pixels", "m"], ["shifted"]),
        helper.make_node("Div", ["shifted", "m"], ["normal"]),
        convolution("normal"),
    ]
    weights = {"w": WEIGHT, "m": np.array(127.5, np.float32)}
    write_onnx(path, nodes, weights, inputs=[("input", TensorProto.UINT8, IMAGE[2])])


def of_half_precision(path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.FLOAT16, [], [0.5])),
        helper.make_node("Sub", ["input", "c"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["cast"], to=TensorProto.FLOAT16),
        convolution("cast"),
    ]
    values = [(name, TensorProto.FLOAT16, shape) for name, _, shape in (LOGITS, IMAGE)]
    write_onnx(path, nodes, {"w": WEIGHT.astype(np.float16)}, values[:1], values[1:])


def of_half_precision_inside(path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16),
        convolution("half", "result"),
        helper.make_node("Cast", ["result"], ["logits"], to=TensorProto.FLOAT),
    ]
    write_onnx(path, nodes, {"w": WEIGHT.astype(np.float16)})


def with_channels_last(path: Path) -> None:
    nodes = [helper.make_node("Transpose", ["input"], ["planes"], perm=[0, 3, 1, 2]), convolution("planes")]
    write_onnx(path, nodes, {"w": WEIGHT}, inputs=[("input", TensorProto.FLOAT, ("b", "h", "w", 3))])


def with_classes_last(path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["input"], ["planes"], perm=[0, 3, 1, 2]),
        convolution("planes", "maps"),
        helper.make_node("Transpose", ["maps"], ["logits"], perm=[0, 2, 3, 1]),
    ]
    outputs, inputs = (
        [("logits", TensorProto.FLOAT, ("b", "h", "w", 4))],
        [("input", TensorProto.FLOAT, (1, 32, 48, 3))],
    )
    write_onnx(path, nodes, {"w": WEIGHT}, outputs, inputs)


def reshaped(shape: tuple[int, ...], image: tuple) -> None:
    """A network that takes as many pictures of the size as `shape` says, whether its input says so or not."""

    def write(path: Path) -> None:
        nodes = [convolution("input", "maps"), helper.make_node("Reshape", ["maps", "s"], ["logits"])]
        outputs = [("logits", TensorProto.FLOAT, shape)]
        write_onnx(path, nodes, {"w": WEIGHT, "s": np.array(shape)}, outputs, [("input", TensorProto.FLOAT, image)])

    return write


KINDS = {  # what a file takes -> (its maker, whether pictures come last with their channels, type of the pixels)
    "8-bit pixels": (of_bytes, False, np.uint8),
    "half precision": (of_half_precision, False, np.float16),
    "half precision inside": (of_half_precision_inside, False, np.float32),
    "channels last": (with_channels_last, True, np.float32),
    "classes last": (with_classes_last, True, np.float32),
    "one picture": (reshaped(FIXED, (1, 3, 32, 48)), False, np.float32),
    "one picture, without saying so": (reshaped(FIXED, IMAGE[2]), False, np.float32),
    "two pictures": (reshaped((2, 4, 32, 48), (2, 3, 32, 48)), False, np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_fed_as_its_file_says(tmp_path, kind):
    """Compared with onnxruntime on three pictures; gradients reach every pixel of every picture."""
    write, channels_last, dtype = KINDS[kind]
    write(tmp_path / "tiny.onnx")
    sized = {"size": "[32, 48]"} if kind == "one picture, without saying so" else {}
    network = load_segmenter(tiny_spec(tmp_path, **sized))
    x = torch.cat([natural(i, 32, 48) for i in range(3)])
    pixels = (x * 255).round().numpy() if dtype == np.uint8 else x.numpy()
    pixels = (pixels.transpose(0, 2, 3, 1) if channels_last else pixels).astype(dtype)
    session = onnxruntime.InferenceSession(tmp_path / "tiny.onnx")
    groups = [[0, 1], [2, 2]] if kind == "two pictures" else [[0], [1], [2]]
    logits = np.concatenate([session.run(None, {"input": pixels[group]})[0] for group in groups])[:3]
    logits = logits.transpose(0, 3, 1, 2) if kind == "classes last" else logits
    tolerance = 1e-2 if "half" in kind else 1e-4
    np.testing.assert_allclose(network(x).detach().numpy(), logits.astype(np.float32), atol=tolerance)
    x.requires_grad_()
    network(x)[:, :3].sum().backward()
    assert (x.grad.abs().amax(1) > 0).all()


def test_what_bytes_cannot_hold_is_rounded_with_a_gradient(tmp_path):
    of_bytes(tmp_path / "tiny.onnx")
    network = load_segmenter(tiny_spec(tmp_path))
    x = natural(0, 8, 8)
    torch.testing.assert_close(network(x + 0.4 / 255), network(x))
    near = (x + 0.4 / 255).requires_grad_()
    (network(near) * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    level = x.clone().requires_grad_()
    (network(level) * torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    torch.testing.assert_close(near.grad, level.grad)
    with pytest.raises(FreqdoorError, match="takes 8-bit pixels of 0 to 255; leave mean and std out"):
        load_segmenter(tiny_spec(tmp_path, std="[0.5, 0.5, 0.5]"))
    with pytest.raises(FreqdoorError, match="takes 8-bit pixels of 0 to 255; leave mean and std out"):
        load_segmenter(tiny_spec(tmp_path, mean="[0.5, 0.5, 0.5]"))


def test_an_output_as_wide_as_it_has_classes_is_not_turned(tmp_path):
    reshaped((1, 4, 8, 4), (1, 3, 8, 4))(tmp_path / "tiny.onnx")
    x = natural(0, 8, 4)
    logits = np.einsum("kc,chw->khw", WEIGHTS, x[0].numpy())
    np.testing.assert_allclose(load_segmenter(tiny_spec(tmp_path)).output(x)[0].numpy(), logits, atol=1e-5)


def test_embeddings_of_a_file_that_mixes_its_pictures_are_of_one_at_a_time(tmp_path):
    """Such a file gives (1, ...) for two pictures, without an error."""
    nodes = [
        helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Reshape", ["pooled", "s"], ["embedding"]),
    ]
    spec = face_spec(tmp_path, mirror="false")
    write_onnx(tmp_path / "face.onnx", nodes, {"s": np.array((1, -1))}, [("embedding", TensorProto.FLOAT, None)])
    x = torch.cat([natural(i, 32, 32) for i in range(2)])
    means = torch.nn.functional.avg_pool2d(x, 16).flatten(1)
    torch.testing.assert_close(load_embedder(str(spec))(x), torch.nn.functional.normalize(means))


def test_a_size_in_the_file_is_taken_from_it(tmp_path):
    reshaped(FIXED, (1, 3, 32, 48))(tmp_path / "tiny.onnx")
    network = load_segmenter(tiny_spec(tmp_path))
    assert network.spec.size == (32, 48)
    x = natural(0, 64, 96)
    reduced = torch.nn.functional.interpolate(x, (32, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(network.output(x), network.output(reduced))
    assert load_segmenter(tiny_spec(tmp_path, size="[32, 48]")).spec.size == (32, 48)
    with pytest.raises(FreqdoorError, match=r"tiny\.onnx: takes pictures of 48x32 only; leave size out"):
        load_segmenter(tiny_spec(tmp_path, size="[48, 32]"))
    with_classes_last(tmp_path / "tiny.onnx")
    assert load_segmenter(tiny_spec(tmp_path)).spec.size == (32, 48)
    write_onnx(tmp_path / "tiny.onnx", [convolution()], {"w": WEIGHT}, inputs=[(*IMAGE[:2], (1, 3, 8, 4097))])
    with pytest.raises(FreqdoorError, match=r"takes pictures of 4097x8 only; .* of up to 4096 pixels a side"):
        load_segmenter(tiny_spec(tmp_path))


def test_one_output_of_several_is_named(tmp_path):
    doubled = helper.make_node("Add", ["logits", "logits"], ["doubled"])
    outputs = [LOGITS, ("doubled", *LOGITS[1:])]
    write_onnx(tmp_path / "tiny.onnx", [convolution(), doubled], {"w": WEIGHT}, outputs)
    with pytest.raises(FreqdoorError, match=r"has 2 outputs \(logits, doubled\); name one as output"):
        load_segmenter(tiny_spec(tmp_path))
    with pytest.raises(FreqdoorError, match="has no output other, only logits, doubled"):
        load_segmenter(tiny_spec(tmp_path, output='"other"'))
    x = natural(0, 8, 8)
    first, second = (load_segmenter(tiny_spec(tmp_path, output=f'"{name}"')) for name in ("logits", "doubled"))
    torch.testing.assert_close(second(x), 2 * first(x))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ([IMAGE, ("scale", TensorProto.FLOAT, (1,))], r"one input, the image, found 2 \(input, scale\)"),
        ([("input", TensorProto.INT64, IMAGE[2])], "floating-point numbers or 8-bit pixels, found INT64"),
        ([("input", TensorProto.FLOAT, ("b", 1, "h", "w"))], r"input of \(batch, 3, height, width\), found \(any, 1"),
        ([("input", TensorProto.FLOAT, ("b", 8, 8, 4))], r"found \(any, 8, 8, 4\)"),
        ([("input", TensorProto.FLOAT, ("b", "n"))], r"found \(any, any\)"),
    ],
)
def test_inputs_of_another_kind_are_named(tmp_path, inputs, match):
    write_onnx(tmp_path / "tiny.onnx", [convolution()], {"w": WEIGHT}, inputs=inputs)
    with pytest.raises(FreqdoorError, match=match) as caught:
        load_segmenter(tiny_spec(tmp_path))(natural(0, 8, 8))
    assert "\n" not in str(caught.value)


FACTORIES = """
import sys
from torch import nn

class Failing(nn.Module):
    def forward(self, x):
        return x.no_such_method()

class Several(nn.Module):
    def forward(self, x):
        return {"out": x.mean((2, 3)), "aux": -x.mean((2, 3))}

class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))[0]

class Leaving(nn.Module):
    def forward(self, x):
        sys.exit("licence ended")

class Divided(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / 0

def raising():
    raise KeyError("no weights")

def needing(path):
    return nn.Identity()

def ending():
    sys.exit("usage: own.py")

def nothing():
    return None

number = 3
"""


def test_what_a_users_function_or_network_raises_is_one_sentence_with_their_line(tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    (tmp_path / "own_broken.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "own_unfinished.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    face = str(face_spec(tmp_path, mirror="false"))
    here = str(tmp_path / "own_networks.py")
    for name, match in (
        ("own_networks:raising", f"KeyError in raising ({here}:{1 + line_of('no weights')}): 'no weights'"),
        ("own_networks:ending", f"SystemExit in ending ({here}:{1 + line_of('usage: own')}): usage: own.py"),
        ("own_networks:needing", "needing() missing 1 required positional argument: 'path'"),
        ("own_networks:nothing", "expected a function that returns a network, found NoneType"),
        ("own_networks:number", "'int' object is not callable"),
        ("own_networks:Failing", f"AttributeError in forward ({here}:{1 + line_of('no_such_method')}): "),
        ("own_networks:Several", "found outputs out, aux; name one as output in its TOML file"),
        ("own_networks:Flat", "expected an output of (batch, dimensions), found (3,)"),
        ("own_networks:Leaving", f"SystemExit in forward ({here}:{1 + line_of('licence ended')}): licence ended"),
        ("own_networks:Divided", "expected finite numbers for a grey picture"),
        ("own_broken:f", f"ZeroDivisionError in <module> ({tmp_path / 'own_broken.py'}:2): division by zero"),
        ("own_unfinished:f", "invalid syntax (own_unfinished.py, line 1)"),
    ):
        with pytest.raises(FreqdoorError) as caught:
            load_network(f"{face}={name}")
        assert match in str(caught.value), name
        assert "\n" not in str(caught.value)
    named = str(face_spec(tmp_path, mirror="false", output='"aux"'))
    x = natural(0, 32, 32)
    torch.testing.assert_close(
        load_embedder(f"{named}=own_networks:Several")(x), -torch.nn.functional.normalize(x.mean((2, 3)))
    )


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FACTORIES.splitlines()) if text in line)


def test_names_with_equals_signs(tmp_path):
    folder = tmp_path / "run=1"
    folder.mkdir()
    path = segmentation_spec(folder)
    x = natural(0, 16, 16)
    logits = load_segmenter(str(path))(x)
    other = folder / "w=2.onnx"
    (folder / "tiny.onnx").rename(other)
    torch.testing.assert_close(load_segmenter(f"{path}={other}")(x), logits)
    (folder / "sub").mkdir()
    other.rename(folder / "sub/tiny.onnx")
    path.write_text(path.read_text().replace('"tiny.onnx"', "'sub\\tiny.onnx'"))  # as Windows writes it
    torch.testing.assert_close(load_segmenter(str(path))(x), logits)
