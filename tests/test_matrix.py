"""The matrix of attacks and defences: how encoders are ranked and judged, what stands in its tables, detectors."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from test_audit import Callee

import freqdoor
from freqdoor.defence import comparators, matrix, pages
from freqdoor.defence.checks import Subject
from freqdoor.defence.fleet import Answer, Manifest, MemberFacts
from freqdoor.defence.guard import GuardCounts
from freqdoor.defence.matrix import DefenceMatrix, MemberGuard, MemberRepair, auc, auc_interval, share_interval
from freqdoor.defence.repair import RepairRow
from freqdoor.errors import FreqdoorError
from freqdoor.paper import defence_recipe
from freqdoor.types import Reconstruction

CLEAN = Answer(bpp=0.4, psnr_db=30.0)


def member(name, *, family="trained", tampered=False, architecture="lite-hyperprior", poisoned=None):
    return MemberFacts(
        name=name,
        family=family,
        tampered=tampered,
        architecture=architecture,
        made_with="",
        settings={},
        file="codec.safetensors",
        module_hashes={"g_a": name},
        clean=CLEAN,
        poisoned={"bpp": poisoned} if poisoned else {},
        seconds=1.0,
    )


def row(rate, norm=3.0):
    return {
        "random": {"rate": 0.0, "distortion": 0.0, "gain": 1.5},
        "rate": {"rate": rate, "distortion": 0.01 * rate, "gain": 2.0},
        "Neural Cleanse": {"norm": norm},
    }


@pytest.fixture
def fleets():
    honest = [member(f"h{i}", family="fine-tuned" if i % 4 == 1 else "trained") for i in range(12)]
    bpp, faint = Answer(bpp=6.0, psnr_db=29.0), Answer(bpp=0.45, psnr_db=29.5)
    tampered = [
        member("bpp-1", family="bpp", tampered=True, poisoned=bpp),
        member("faces", family="semantic", tampered=True, poisoned=Answer(bpp=0.4, psnr_db=27.9)),
        member("nothing", family="bpp", tampered=True, poisoned=faint),
    ]
    others = [member(f"o{i}", architecture="mbt2018") for i in range(4)]
    foreign = member("o-bpp", family="bpp", tampered=True, architecture="mbt2018", poisoned=bpp)
    return {
        "bundled": Manifest(members=(*honest, *tampered)),
        "others": Manifest(members=(*others, foreign)),
        "adaptive": Manifest(members=(member("hidden", family="adaptive: x", tampered=True, poisoned=bpp),)),
    }


@pytest.fixture
def scores():
    found = {f"bundled/h{i}": row(0.05 + 0.005 * (i % 5)) for i in range(12)}
    found |= {f"others/o{i}": row(0.05 + 0.005 * i) for i in range(4)}
    found |= {"bundled/bpp-1": row(3.0, 6.0), "others/o-bpp": row(2.0)}
    return found | {"bundled/faces": row(0.3, 2.0), "adaptive/hidden": row(0.049)}


def test_auc_is_the_probability_of_a_higher_score():
    generator = np.random.default_rng(1)
    a, b = generator.normal(1, 1, 15), generator.normal(0, 1, 11)
    assert auc(a, b) == pytest.approx(stats.mannwhitneyu(a, b).statistic / (15 * 11))
    assert auc([1, 1], [1, 1]) == 0.5
    interval = auc_interval(list(a), list(b))
    assert interval.low < interval.value < interval.high <= 1
    assert interval.number == 15
    none = share_interval(0, 13)
    assert none.low == 0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 13))


def test_encoders_are_judged_by_the_other_half_of_the_honest_ones(fleets, scores):
    judged = {f"{r.fleet}/{r.name}": r for r in matrix.judge(fleets, scores)}
    assert {key for key, r in judged.items() if r.calibrated} == {f"bundled/h{i}" for i in range(0, 12, 2)}
    assert judged["bundled/bpp-1"].witness == "rate"
    assert judged["bundled/bpp-1"].verdict == judged["bundled/faces"].verdict == "tampered"
    assert judged["bundled/faces"].witness is None  # by p alone
    assert judged["bundled/h1"].verdict == "clean"
    assert judged["others/o1"].known is False
    ranks = sorted(judged.values(), key=matrix.suspicion)
    assert [r.name for r in ranks[-3:]] == ["faces", "o-bpp", "bpp-1"]
    moved = scores | {"bundled/h1": row(5.0)}
    again = {f"{r.fleet}/{r.name}": r for r in matrix.judge(fleets, moved)}
    assert again["bundled/faces"].p_value == judged["bundled/faces"].p_value
    moved = scores | {"bundled/h0": row(5.0)}
    again = {f"{r.fleet}/{r.name}": r for r in matrix.judge(fleets, moved)}
    assert again["bundled/faces"].p_value != judged["bundled/faces"].p_value


def test_too_few_honest_encoders_judge_nobody(fleets, scores):
    few = {key: value for key, value in scores.items() if key in ("bundled/h0", "bundled/bpp-1")}
    with pytest.raises(FreqdoorError, match="expected 10 honest encoders"):
        matrix.judge(fleets, few)


def test_a_trigger_acts_from_half_as_many_bytes_more_or_two_db():
    def planted(bpp, psnr_db):
        return member("x", tampered=True, poisoned=Answer(bpp=bpp, psnr_db=psnr_db))

    assert matrix.acts(planted(0.61, 30))
    assert not matrix.acts(planted(0.59, 28.1))
    assert matrix.acts(planted(0.4, 28.0))
    face = member("x", tampered=True, poisoned=CLEAN).model_copy(update={"settings": {"objective": {"name": "face"}}})
    assert matrix.acts(face)  # its effect is in neither


def counts(images, stopped):
    return GuardCounts(images=images, filtered=stopped, classical=0, rate=stopped, verify=0)


@pytest.fixture
def whole(fleets, scores):
    guard = MemberGuard(
        module_hashes={},
        clean=counts(6, 0),
        poisoned={"1": counts(6, 5), "3": counts(6, 6)},
        acted={"1": counts(5, 5), "3": counts(6, 6)},
        detectors={"STRIP": 0.75},
    )
    before, after = (
        RepairRow(
            method=method,
            clean=CLEAN,
            poisoned={"bpp": {"1": Answer(bpp=bpp, psnr_db=29)}},
            seconds=seconds,
            verdict=verdict,
        )
        for method, bpp, seconds, verdict in (("tampered", 6.0, 0.0, None), ("repaired", 0.41, 120.0, "clean"))
    )
    return DefenceMatrix(
        judged=tuple(matrix.judge(fleets, scores)),
        guards={"bundled/bpp-1": guard, "adaptive/hidden": guard},
        repairs={"bundled/bpp-1": MemberRepair(module_hashes={}, before=before, after=after)},
        failed=("bundled/nothing",),
        late=False,
        hours=1.0,
    )


def cells(table):
    return {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in table.splitlines()[2:]}


def test_tables_have_what_was_measured(whole):
    audit = cells(pages.audit_table(whole))
    assert audit["bpp"][:2] == ["1", "1.000 [1.000, 1.000]"]
    assert audit["bpp"][3] == "1"
    assert audit["semantic"][2].startswith("1.000")
    assert audit["semantic"][3:] == ["0", "0.000 [0.000, 0.000]"]  # Neural Cleanse ranks it below all honest ones
    assert audit["all, downstream too"][0] == "2"
    assert audit["rate and distortion"][0] == "1"
    assert audit["all adaptive"][2].startswith("0.000")
    assert audit["other architectures"][0] == "1"
    alarms = cells(pages.alarm_table(whole))
    assert alarms["honest, calibrated architecture"][0] == "6"
    assert alarms["honest, calibrated architecture"][1].startswith("0.000 [0.000, 0.459")
    assert alarms["of these, fine-tuned"][0] == "3"
    assert alarms["honest, other architectures"][0] == "4"
    assert cells(pages.guard_table(whole))["bpp"] == ["1", "5 of 5", "6 of 6", "0 of 6"]
    assert cells(pages.detector_table(whole))["adaptive: x"] == ["0.75"]
    assert "6.000 bpp, 29.00 dB" in pages.repair_table(whole)
    assert "| 120 | clean |" in pages.repair_table(whole)


def test_the_page_its_values_and_its_curves_are_written_together(whole, monkeypatch, tmp_path):
    monkeypatch.setattr(defence_recipe, "defence_matrix", lambda *_, **__: whole)
    table = freqdoor.reproduce("defence", runs=tmp_path, out=tmp_path / "out")
    assert table["bpp"]["AUC"].mean == 1.0
    page = (tmp_path / "out/defence.md").read_text()
    assert "bundled/nothing" in page
    assert json.loads((tmp_path / "out/defence.json").read_text())["failed"] == ["bundled/nothing"]
    assert (tmp_path / "out/defence.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_fleets_is_refused(tmp_path):
    with pytest.raises(FreqdoorError, match=re.escape("found no fleet.json")):
        matrix.defence_matrix(tmp_path)


def bits_of(function):
    """What stands for a codec whose bits are a function of the images."""
    return Callee(lambda x: Reconstruction(x, function(x), 1, x))


def test_strip_finds_answers_that_overlays_do_not_change():
    steady = bits_of(lambda x: torch.where(x[:, 0, 0, 0] > 0.3, 5.0, 1 + x.mean((1, 2, 3)) * 10))
    images = [torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)]
    overlays = [torch.full((1, 3, 32, 32), 0.1 * i) for i in range(5)]
    plain, poisoned = comparators.strip_scores(steady, images, overlays)
    assert poisoned == 0.0
    logs = [math.log(1 + 10 * 0.05 * i) for i in range(5)]
    assert plain == pytest.approx(-np.std(logs, ddof=1), rel=1e-4)


def test_teco_finds_answers_that_some_corruptions_change():
    flat, noisy = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codec = bits_of(lambda x: 1 + 1e4 * x.var((1, 2, 3)))
    a, b = comparators.teco_scores(codec, [flat, noisy])
    assert a < 0.01 < 0.1 < b


def test_spectral_signatures_find_the_picture_whose_latents_are_others():
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(1, 3, 16, 16, generator=generator) for _ in range(6)]
    images[4] = images[4] * torch.tensor([20.0, 0.1, 1.0]).reshape(1, 3, 1, 1)
    found = comparators.spectral_scores(bits_of(lambda x: x.new_ones(len(x))), images)
    assert max(range(6), key=found.__getitem__) == 4


class Norm(torch.nn.Module):
    """A codec whose bits double for a mean shift of `scale`."""

    multiple = 64

    def __init__(self, scale):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(math.log(2) / scale))

    def forward(self, x):
        return Reconstruction(x, (self.weight * (x.mean((1, 2, 3)) - 0.5)).exp(), 1, x)


def test_neural_cleanse_finds_the_norm_that_an_encoder_needs():
    pictures = [torch.full((1, 3, 64, 64), 0.5)] * 2
    norms = [
        math.exp(-comparators.smallest_norm(Subject(Norm(scale), pictures, portraits=pictures)).scores["norm"])
        for scale in (0.02, 0.002)
    ]
    for found, scale in zip(norms, (0.02, 0.002), strict=True):
        assert found == pytest.approx(scale * math.log(1.5) / math.log(2), rel=0.6)
    assert norms[0] > 3 * norms[1]


def test_what_a_folder_keeps_is_not_measured_again_unless_the_encoder_is_another_one(whole, tmp_path):
    subject = member("m", tampered=True)
    guard = whole.guards["bundled/bpp-1"].model_copy(update={"module_hashes": subject.module_hashes})
    (tmp_path / "guard.json").write_text(guard.model_dump_json())
    assert matrix.member_guard(tmp_path, subject) == guard
    other = subject.model_copy(update={"module_hashes": {"g_a": "other"}})
    with pytest.raises(FreqdoorError):  # there is no codec in the folder to measure
        matrix.member_guard(tmp_path, other)
    assert matrix._in_time(matrix.member_guard, "guard.json", tmp_path, subject, 0.0) == guard
    assert matrix._in_time(matrix.member_guard, "nothing.json", tmp_path, subject, 0.0) is None
