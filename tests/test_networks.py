import numpy as np
import onnxruntime
import pytest
import segmentation_models_pytorch as smp
import torch
from conftest import natural
from networks import BIAS, WEIGHTS, face_onnx, face_spec, segmentation_onnx, segmentation_spec

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


def test_outputs_of_another_kind_are_refused(tmp_path):
    x = natural(0, 32, 32)
    more = load_segmenter(str(segmentation_spec(tmp_path, classes='["road", "car", "bus", "sky", "tree"]')))
    with pytest.raises(FreqdoorError, match=r"an output of \(batch, 5, height, width\), found \(1, 4, 16, 16\)"):
        more(x)
    picture = face_spec(tmp_path)
    segmentation_onnx(tmp_path / "face.onnx")
    with pytest.raises(FreqdoorError, match=r"expected \(batch, dimensions\), found"):
        load_embedder(str(picture))(x)
    face_onnx(tmp_path / "face.onnx")
    unsized = tmp_path / "unsized.toml"
    unsized.write_text('task = "face"\nfile = "face.onnx"\n')
    with pytest.raises(FreqdoorError, match="does not take images of 48x48"):
        load_embedder(str(unsized))(natural(0, 48, 48))
