"""Audits that are judged by a user's network: what the codec adds to the change of its answer."""

import pytest
import torch
from networks import CLASSES
from torch import nn

from freqdoor import load_codec
from freqdoor.attack.networks import Embedder, NetworkSpec, Segmenter
from freqdoor.defence import audit as module
from freqdoor.defence import checks, judges
from freqdoor.defence.checks import Subject, crops, opens, strength
from freqdoor.defence.judges import added_by_codec, difference, judged_by
from freqdoor.measure.records import through
from freqdoor.samples import held_out
from freqdoor.triggers.pattern import Seen
from freqdoor.types import Reconstruction


class Colour(nn.Module):
    """The mean colour as an embedding."""

    def forward(self, x):
        return x.mean((2, 3))


@pytest.fixture
def colours():
    return Embedder(Colour(), NetworkSpec(task="face", crop=(0, 0, 8, 8)), "colours")


@pytest.fixture
def classes():
    spec = NetworkSpec(task="segmentation", classes=CLASSES[:3])
    return Segmenter(nn.Identity(), spec, "classes")


def test_faces_differ_by_the_angle_of_all_of_the_picture(colours):
    x = torch.zeros(2, 3, 16, 16)
    x[:, 0, 8:] = 1.0  # red, outside what the spec says is the face
    other = torch.zeros(2, 3, 16, 16)
    other[0, 0] = other[1, 1] = 1.4  # red still, and green
    assert difference(colours, x, other).tolist() == pytest.approx([0.0, 1.0])


def test_classes_differ_by_the_probability_that_they_lose(classes):
    x, other = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    x[:, 1], other[:, 1] = 1.0, 1.0
    other[:, 1, 2:], other[:, 2, 2:] = 0.0, 1.0  # half of the pixels change their class
    kept = torch.tensor([0.0, 1.0, 0.0]).softmax(0)
    assert float(difference(classes, x, other)) == pytest.approx(1 - float(kept[1] + kept[0]) / 2)


def test_what_is_counted_is_what_the_codec_adds(colours, monkeypatch):
    """A pattern that misleads the network by itself is no fault of the codec's."""
    codec = load_codec("lite-hyperprior:3").prepare()
    subject = Subject(codec, crops(held_out(), 64, 2), crops(held_out(), 64, 2))
    aims = []

    def inverted_on(subject, part, aim, shape):
        aims.append((part, aim, shape))
        return lambda x, rounded: (x * torch.tensor([1.0, 0.8, 0.6]).reshape(1, 3, 1, 1)).clamp(0, 1)

    monkeypatch.setattr(judges, "inverted_on", inverted_on)
    finding = judged_by(colours)(subject)
    assert abs(finding.scores["judged"]) < 0.005
    [witness] = finding.witnesses
    pairs = [through(codec, x)[0] for x in (witness.x, witness.x_p)]
    expected = difference(colours, *pairs) - difference(colours, witness.x, witness.x_p)
    assert added_by_codec(subject, colours, witness) == pytest.approx(float(expected))
    assert float(difference(colours, witness.x, witness.x_p)) > 0.01  # the pattern by itself is seen
    [(part, aim, _)] = aims
    assert part == "portraits"
    x, x_p, clean, patterned = (torch.rand(2, 3, 8, 8) for _ in range(4))
    seen = Seen(x, x_p, Reconstruction(patterned, torch.zeros(2), 64, torch.zeros(2, 1, 1, 1)), clean)
    torch.testing.assert_close(aim(seen), difference(colours, clean, patterned) - difference(colours, x, x_p))


def test_the_strongest_picture_is_the_witness_and_from_the_bound_on_it_is_one(colours, classes, monkeypatch):
    codec = load_codec("lite-hyperprior:3").prepare()
    subject = Subject(codec, crops(held_out(), 64, 3), crops(held_out(), 64, 3))
    monkeypatch.setattr(judges, "inverted_on", lambda *_: lambda x, rounded: x)
    values = iter([0.1, 0.9, 0.2, 0.0, 0.0, 0.0])
    monkeypatch.setattr(judges, "added_by_codec", lambda *_: next(values))
    finding = judged_by(colours)(subject)
    assert finding.scores == {"judged": pytest.approx((0.9 + 0.2) / 2)}
    assert torch.equal(finding.witnesses[0].x, subject.portraits[1])
    assert judged_by(classes)(subject).scores == {"judged": 0.0}
    assert strength({"judged": checks.JUDGED}) == 1
    assert opens("judged by colours", {"judged": checks.JUDGED})
    assert not opens("judged by colours", {"judged": 0.9 * checks.JUDGED})


def test_networks_come_first_and_a_door_for_them_is_tampered_with(colours, monkeypatch, tmp_path):
    codec = load_codec("lite-hyperprior:3")
    monkeypatch.setattr(module, "load_network", lambda name: colours)
    monkeypatch.setattr(judges, "inverted_on", lambda *_: lambda x, rounded: x)
    monkeypatch.setattr(judges, "added_by_codec", lambda *_: 0.8)
    result = module.audit(codec, networks=["colours.toml"], out=tmp_path)
    assert (result.verdict, [row.check for row in result.checks]) == ("tampered", ["judged by colours"])
    assert (tmp_path / result.witnesses[0].patterned).exists()
