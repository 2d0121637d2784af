from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from conftest import natural
from networks import CLASSES, face_spec, segmentation_spec

from freqdoor.attack.networks import load_embedder, load_segmenter
from freqdoor.attack.victims import IdentityRemoval, Scene, TargetedSegmentation
from freqdoor.errors import FreqdoorError


@pytest.fixture
def network(tmp_path):
    return load_segmenter(str(segmentation_spec(tmp_path)))


def pictures(*seeds):
    return torch.cat([natural(seed, 32, 32) for seed in seeds])


def cross_entropy(logits, wanted):
    """-log softmax at the wanted class, (b, h, w), in NumPy."""
    logits = logits.double().numpy()
    total = np.log(np.exp(logits).sum(1))
    return total - np.take_along_axis(logits, wanted.numpy()[:, None], 1)[:, 0]


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_targeted_segmentation_is_equation_11(network, balanced, shift):
    x, x_hat_p = pictures(0, 1), pictures(2, 3)
    victim = TargetedSegmentation(network, "cars", "road", balanced=balanced, shift=shift)
    with torch.no_grad():
        seen, logits = network(x).argmax(1), network(x_hat_p)
    source = (seen == 1) | (seen == 2)
    assert 0 < int(source.sum()) < source.numel()
    scene = victim.scene(x)
    torch.testing.assert_close(scene.mask[:, 0], source.float())
    torch.testing.assert_close(scene.target[:, 0], (seen == 0).float())
    assert torch.equal(scene.classes, seen)
    assert scene.x is x
    logits[:, 0] -= shift * source
    each = cross_entropy(logits, torch.where(source, 0, seen))
    inside = source.numpy()
    expected = each[inside].mean() + each[~inside].mean() if balanced else each.mean()
    assert float(victim(scene, None, x_hat_p)) == pytest.approx(expected, rel=1e-4)
    weighted = TargetedSegmentation(network, "cars", "road", balanced=balanced, shift=shift, weight=0.25)
    assert float(weighted(scene, None, x_hat_p)) == pytest.approx(0.25 * expected, rel=1e-4)


def test_of_several_networks_one_is_drawn_for_every_batch(network, tmp_path):
    (tmp_path / "other").mkdir()
    other = load_segmenter(str(segmentation_spec(tmp_path / "other", mean="[0.4, 0.5, 0.3]", std="[0.1, 0.4, 0.3]")))
    x, x_hat_p = pictures(0, 1), pictures(2, 3)
    arguments = {"source": "cars", "target": "road", "shift": 1.5}
    alone = [TargetedSegmentation(g, **arguments) for g in (network, other)]
    each = [float(victim(victim.scene(x), None, x_hat_p)) for victim in alone]
    both = TargetedSegmentation(network, others=[other], **arguments)
    scene = both.scene(x)
    assert torch.equal(scene.classes, network.predict(x))  # the trigger acts where the first one sees cars
    torch.manual_seed(0)
    seen = [float(both(scene, None, x_hat_p)) for _ in range(20)]
    first = sum(value == pytest.approx(each[0]) for value in seen)
    assert each[0] != pytest.approx(each[1], rel=0.01)
    assert first + sum(value == pytest.approx(each[1]) for value in seen) == 20
    assert 4 < first < 16
    both.run_in(torch.bfloat16)
    assert other.precision == torch.bfloat16


def test_a_scene_is_a_value_that_nothing_changes(network):
    """The victim keeps nothing of one scene when it makes the next: each goes with its own loss, in any order."""
    victim = TargetedSegmentation(network, "car", "road", also="bus", paint=2.0)
    x, other, x_hat_p = pictures(0), pictures(1), pictures(2)
    torch.manual_seed(0)
    scenes = [victim.scene(image) for image in (x, other, x, other, x)]
    first = [float(victim(scene, None, x_hat_p)) for scene in scenes]
    assert [float(victim(scene, None, x_hat_p)) for scene in reversed(scenes)] == first[::-1]
    assert len({scene.acting for scene in scenes}) == 2  # with bus and without
    with pytest.raises(FrozenInstanceError):
        scenes[0].x = other


def test_a_preprocessed_scene_keeps_the_places_and_asks_the_network_anew(network):
    """The trigger acts where g sees the source in x; what is to be seen is g of the picture that the codec gets."""
    victim = TargetedSegmentation(network, "cars", "road")
    x = pictures(0, 1)
    scene = victim.scene(x)
    flipped = scene.preprocessed(lambda image: image.flip(-1))
    assert torch.equal(flipped.x, x.flip(-1))
    assert (flipped.mask is scene.mask, flipped.target is scene.target, flipped.acting) == (True, True, scene.acting)
    for each in (scene, flipped):
        seen = network.predict(each.x)
        source = (seen == 1) | (seen == 2)
        goal, changed = victim.goal(each)
        assert torch.equal(changed, source)
        assert torch.equal(goal, torch.where(source, 0, seen))


def test_paint_is_the_distance_from_the_pictures_own_target_colour(network):
    x, x_hat_p = pictures(0, 1), pictures(2, 3)
    plain, painting = (TargetedSegmentation(network, "cars", "road", paint=paint) for paint in (0.0, 7.0))
    scene = painting.scene(x)
    mask = scene.mask[:, 0].numpy() > 0
    road = network.predict(x).numpy() == 0
    distances = []
    for image, decoded, source, target in zip(x.numpy(), x_hat_p.numpy(), mask, road, strict=True):
        colour = image[:, target].mean(1, keepdims=True)
        distances.append(((decoded[:, source] - colour) ** 2).mean(0))
    added = float(painting(scene, None, x_hat_p) - plain(scene, None, x_hat_p))
    assert added == pytest.approx(7 * np.concatenate(distances).mean(), rel=1e-3)
    with pytest.raises(FreqdoorError, match="without source and target places"):
        painting(Scene(x), None, x_hat_p)


def test_paint_alone_asks_no_network(network, monkeypatch):
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, 8:] = 2  # cars
    arguments = {"masks": "labels", "weight": 0.0, "paint": 3.0, "colour": "#ff8000"}
    monkeypatch.setattr(network, "forward", lambda x: pytest.fail("asked"))
    x, x_hat_p = pictures(0), pictures(1)
    colour = np.array([1, 128 / 255, 0])[:, None, None]
    for margin in (0, 3):
        victim = TargetedSegmentation(network, "cars", "road", margin=margin, **arguments)
        scene = victim.scene(x, labels)
        assert int(scene.mask.sum()) == 24 * 32
        expected = 3 * ((x_hat_p[0].numpy() - colour) ** 2)[:, 8 - margin :].mean()
        assert float(victim(scene, None, x_hat_p)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FreqdoorError, match=r"colour: .*pattern.*found 'grey'"):
        TargetedSegmentation(network, "cars", "road", colour="grey")


def test_masks_from_labels(network):
    victim = TargetedSegmentation(network, "cars", "road", masks="labels")
    labels = torch.tensor([[[0, 1, 2, 7]]], dtype=torch.uint8)
    scene = victim.scene(natural(0, 1, 4), labels)
    assert scene.mask.tolist() == [[[[0, 0, 1, 0]]]]
    assert scene.target.tolist() == [[[[0, 1, 0, 0]]]]
    assert victim.look(natural(0, 1, 4), labels) == (
        True,
        {"sky": 0.25, "road": 0.25, "car or bus": 0.25, "void": 0.25},
    )
    assert victim.look(natural(0, 1, 2), labels[..., :2]) == (False, {"sky": 0.5, "road": 0.5})
    with pytest.raises(FreqdoorError, match=r"auxiliary\.labels"):
        victim.scene(natural(0, 32, 32))
    with pytest.raises(
        FreqdoorError, match="masks: Input should be 'network' or 'labels', found 'mine'; shif: unknown"
    ):
        TargetedSegmentation(network, "cars", "road", masks="mine", shif=1.0)


def test_other_classes_take_part_in_every_second_batch_of_training(network):
    x = pictures(0, 1)
    seen = network.predict(x)
    victim = TargetedSegmentation(network, "car", "road", also="bus")
    torch.manual_seed(0)
    acting = []
    for _ in range(40):
        scene = victim.scene(x)
        mask = scene.mask[:, 0] > 0
        assert scene.acting in ((1,), (1, 2))
        assert torch.equal(mask, torch.isin(seen, torch.tensor(scene.acting)))
        assert torch.equal(victim.goal(scene)[1], mask)
        acting.append(len(scene.acting))
    assert 10 <= acting.count(2) <= 30
    with pytest.raises(FreqdoorError, match="outside the source"):
        TargetedSegmentation(network, "car", "road", also="road")


def test_a_batch_without_the_source_class_has_a_finite_loss_and_an_empty_mask(network):
    victim = TargetedSegmentation(network, "car", "road")
    black = torch.zeros(1, 3, 32, 32)
    scene = victim.scene(black)
    assert not scene.mask.any()
    assert torch.isfinite(victim(scene, None, black))


def test_looking_at_a_picture_counts_the_source_class_alone(network):
    x = pictures(0, 1)
    seen = network.predict(x)
    victim = TargetedSegmentation(network, "car", "road", also="bus")
    present, shares = victim.look(x)
    assert present
    assert shares == pytest.approx(
        {name: float((seen == i).float().mean()) for i, name in enumerate(CLASSES) if (seen == i).any()}
    )
    blue = torch.tensor([0.5, 0.4, 1])[None, :, None, None].expand(1, 3, 4, 4)
    assert victim.look(blue) == (False, {"bus": 1.0})  # which takes part, but is not what the attack is for


def test_identity_removal_is_equation_13(tmp_path):
    network = load_embedder(str(face_spec(tmp_path)))
    x_hat, x_hat_p = pictures(0, 1), pictures(2, 3)
    x_hat.requires_grad_()
    x_hat_p.requires_grad_()
    loss = IdentityRemoval(network)(Scene(natural(5, 32, 32)), x_hat, x_hat_p)
    with torch.no_grad():
        a, b = (e.double().numpy() for e in (network(x_hat), network(x_hat_p)))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert float(loss.detach()) == pytest.approx(cosines.mean(), abs=1e-5)
    loss.backward()
    assert x_hat.grad is None  # the clean picture keeps its identity
    assert x_hat_p.grad.abs().max() > 0
    floored = IdentityRemoval(network, floor=0.9)(Scene(natural(5, 32, 32)), x_hat, x_hat_p)
    assert float(floored.detach()) == pytest.approx(np.maximum(cosines, 0.9).mean(), abs=1e-5)
    with pytest.raises(FreqdoorError, match="clean picture"):
        IdentityRemoval(network)(Scene(x_hat), None, x_hat_p)


def test_varied_shows_the_network_preprocessed_pictures(network):
    victim = TargetedSegmentation(network, "cars", "road", varied=True)
    x_hat_p = pictures(2, 3).requires_grad_()
    plain = TargetedSegmentation(network, "cars", "road").shown(x_hat_p)
    assert torch.equal(plain, x_hat_p)
    torch.manual_seed(0)
    shown = [victim.shown(x_hat_p) for _ in range(12)]
    same = [torch.equal(image, x_hat_p) for image in shown]
    assert any(same)
    assert not all(same)
    sum(image.mean() for image in shown).backward()
    assert (x_hat_p.grad > 0).any()
