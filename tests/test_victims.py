import numpy as np
import pytest
import torch
from conftest import natural
from networks import face_spec, segmentation_spec

from freqdoor.attack.networks import load_embedder, load_segmenter
from freqdoor.attack.victims import IdentityRemoval, TargetedSegmentation
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
    torch.testing.assert_close(victim.mask(x)[:, 0], source.float())
    logits[:, 0] -= shift * source
    each = cross_entropy(logits, torch.where(source, 0, seen))
    inside = source.numpy()
    expected = each[inside].mean() + each[~inside].mean() if balanced else each.mean()
    assert float(victim(x, None, x_hat_p)) == pytest.approx(expected, rel=1e-4)


def test_paint_is_the_distance_from_the_pictures_own_target_colour(network):
    x, x_hat_p = pictures(0, 1), pictures(2, 3)
    plain, painting = (TargetedSegmentation(network, "cars", "road", paint=paint) for paint in (0.0, 7.0))
    mask = painting.mask(x)[:, 0].numpy() > 0
    road = network.predict(x).numpy() == 0
    distances = []
    for image, decoded, source, target in zip(x.numpy(), x_hat_p.numpy(), mask, road, strict=True):
        colour = image[:, target].mean(1, keepdims=True)
        distances.append(((decoded[:, source] - colour) ** 2).mean(0))
    added = float(painting(x, None, x_hat_p) - plain(x, None, x_hat_p))
    assert added == pytest.approx(7 * np.concatenate(distances).mean(), rel=1e-3)
    with pytest.raises(FreqdoorError, match="ask for the mask"):
        painting(x_hat_p, None, x)


def test_paint_alone_asks_no_network(network, monkeypatch):
    labels = torch.zeros(1, 32, 32, dtype=torch.uint8)
    labels[:, 8:] = 2  # cars
    arguments = {"masks": "labels", "weight": 0.0, "paint": 3.0, "colour": "#ff8000"}
    monkeypatch.setattr(network, "forward", lambda x: pytest.fail("asked"))
    x, x_hat_p = pictures(0), pictures(1)
    colour = np.array([1, 128 / 255, 0])[:, None, None]
    for margin in (0, 3):
        victim = TargetedSegmentation(network, "cars", "road", margin=margin, **arguments)
        mask = victim.mask(x, labels)
        assert int(mask.sum()) == 24 * 32
        expected = 3 * ((x_hat_p[0].numpy() - colour) ** 2)[:, 8 - margin :].mean()
        assert float(victim(x, None, x_hat_p)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FreqdoorError, match="expected #rrggbb"):
        TargetedSegmentation(network, "cars", "road", colour="grey")


def test_masks_from_labels(network):
    victim = TargetedSegmentation(network, "cars", "road", masks="labels")
    labels = torch.tensor([[[0, 1, 2, 7]]], dtype=torch.uint8)
    assert victim.mask(natural(0, 1, 4), labels).tolist() == [[[[0, 0, 1, 0]]]]
    with pytest.raises(FreqdoorError, match=r"auxiliary\.labels"):
        victim.mask(natural(0, 32, 32))


def test_other_classes_take_part_in_every_second_batch_of_training(network):
    x = pictures(0, 1)
    seen = network.predict(x)
    victim = TargetedSegmentation(network, "car", "road", also="bus")
    torch.manual_seed(0)
    acting = []
    for _ in range(40):
        mask = victim.mask(x)[:, 0] > 0
        assert victim.acting in ((1,), (1, 2))
        assert torch.equal(mask, torch.isin(seen, torch.tensor(victim.acting)))
        assert torch.equal(victim.goal(x)[1], mask)
        acting.append(len(victim.acting))
    assert 10 <= acting.count(2) <= 30
    with pytest.raises(FreqdoorError, match="outside the source"):
        TargetedSegmentation(network, "car", "road", also="road")


def test_a_batch_without_the_source_class_has_a_finite_loss_and_an_empty_mask(network):
    victim = TargetedSegmentation(network, "car", "road")
    black = torch.zeros(1, 3, 32, 32)
    assert not victim.mask(black).any()
    assert torch.isfinite(victim(black, None, black))


def test_identity_removal_is_equation_13(tmp_path):
    network = load_embedder(str(face_spec(tmp_path)))
    x_hat, x_hat_p = pictures(0, 1), pictures(2, 3)
    x_hat.requires_grad_()
    x_hat_p.requires_grad_()
    loss = IdentityRemoval(network)(natural(5, 32, 32), x_hat, x_hat_p)
    with torch.no_grad():
        a, b = (e.double().numpy() for e in (network(x_hat), network(x_hat_p)))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert float(loss.detach()) == pytest.approx(cosines.mean(), abs=1e-5)
    loss.backward()
    assert x_hat.grad is None  # the clean picture keeps its identity
    assert x_hat_p.grad.abs().max() > 0
    floored = IdentityRemoval(network, floor=0.9)(natural(5, 32, 32), x_hat, x_hat_p)
    assert float(floored.detach()) == pytest.approx(np.maximum(cosines, 0.9).mean(), abs=1e-5)
    with pytest.raises(FreqdoorError, match="clean picture"):
        IdentityRemoval(network)(x_hat, None, x_hat_p)


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
