"""The audit: patterns that open what was planted, scores, p-values, one verdict with its witnesses."""

import copy
import json
import math
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from factories import tiny
from scipy import stats
from typer.testing import CliRunner

import freqdoor
import freqdoor.cli as cli
from freqdoor import audit, load_codec, load_planted, workers
from freqdoor.cli import app
from freqdoor.codecs.adapter import hash_state
from freqdoor.dct import block_dct, block_idct, blockify, rgb_to_ycbcr, unblockify, ycbcr_to_rgb
from freqdoor.defence import audit as module
from freqdoor.defence import calibration, checks, inversion, patterns
from freqdoor.defence.calibration import Calibration, Population, beyond
from freqdoor.defence.checks import CHECKS, FAST, Finding, Response, Subject, Witness, crops
from freqdoor.errors import FreqdoorError
from freqdoor.metrics import psnr
from freqdoor.samples import pictures
from freqdoor.triggers.pattern import GOALS, Pattern
from freqdoor.types import Reconstruction

PAGE = Path(__file__).parent.parent / "docs/audit.md"


@pytest.fixture
def subject():
    return Subject(tiny("lite-hyperprior"), crops(pictures(), 64, 2))


def test_a_pattern_repeats_its_block_stays_in_its_band_and_in_its_budget(subject):
    torch.manual_seed(0)
    pattern = Pattern(8, "low", eps=0.005).requires_grad_(False)
    x = torch.full((1, 3, 64, 64), 0.5)
    delta = pattern(x) - x
    assert torch.allclose(delta[..., :8, :8], delta[..., 24:32, 40:48])
    assert float(psnr(x + delta, x)) == pytest.approx(-20 * math.log10(0.005), abs=0.1)
    spectrum = block_dct(rgb_to_ycbcr(delta[..., :8, :8])).abs()
    assert (spectrum[..., pattern.chosen == 0] < 1e-6).all()
    assert (spectrum[..., pattern.chosen == 1] > 1e-6).all()
    assert pattern.chosen.sum() == 8 * 8 // 3


@pytest.mark.parametrize("goal", GOALS)
def test_inversion_drives_its_goal_and_leaves_the_codec_as_it_was(goal, subject):
    codec = subject.codec.eval()
    before, modes = hash_state(codec), [m.training for m in codec.modules()]
    state = torch.random.get_rng_state()
    values = []
    x, make = torch.cat(list(subject.pictures)), partial(Pattern, eps=0.03)
    pattern = inversion.inverted(codec, x, goal, make, steps=12, progress=lambda step, value: values.append(value))
    assert sum(values[-3:]) > sum(values[:3])
    assert hash_state(codec) == before
    assert [m.training for m in codec.modules()] == modes
    assert all(p.requires_grad for p in codec.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    again = inversion.inverted(codec, x, goal, make, steps=12)
    assert torch.equal(again.spectrum, pattern.spectrum)


def test_scores_are_means_over_the_upper_half_of_the_pictures():
    responses = [
        Response(bytes_clean=100, bytes_patterned=10, psnr_db_clean=30, psnr_db_patterned=40, gain=1, between_db=46),
        Response(bytes_clean=100, bytes_patterned=200, psnr_db_clean=30, psnr_db_patterned=28, gain=2, between_db=46),
        Response(bytes_clean=100, bytes_patterned=50, psnr_db_clean=30, psnr_db_patterned=30, gain=8, between_db=46),
    ]
    x = torch.zeros(1, 3, 8, 8)
    scores = checks.scores_of([Witness(x, x, response) for response in responses])
    assert scores == pytest.approx({"rate": 0.0, "distortion": 1.0, "gain": math.log(4)})
    assert checks.upper([5.0, 1.0, 2.0, 4.0]) == 4.5


def test_responses_are_of_real_files(subject):
    pattern = Pattern(16, eps=0.005).eval()
    [first, _] = subject.respond(pattern)
    codec, x = subject.codec, subject.pictures[0]
    assert first.response.bytes_clean == codec.compress(x)[0].num_bytes
    assert first.response.bytes_patterned == codec.compress(first.x_p)[0].num_bytes
    assert first.response.between_db >= 46
    assert torch.equal((first.x_p * 255).round() / 255, first.x_p)


def test_an_own_pattern_is_another_one_in_every_picture_and_block():
    torch.manual_seed(0)
    x = torch.full((2, 3, 64, 64), 0.5)
    delta = (patterns.Own(x.shape, eps=0.005)(x) - x).detach()
    assert delta.square().mean((1, 2, 3)).sqrt().tolist() == pytest.approx([0.005, 0.005], rel=0.02)
    assert not torch.allclose(delta[0], delta[1], atol=1e-3)
    assert not torch.allclose(delta[..., :16, :16], delta[..., 16:32, :16], atol=1e-3)


def test_portraits_are_faces_of_one_size_as_files_hold_them():
    found = checks.portraits()
    assert len(found) == len(checks.PORTRAITS) == 4
    for x in found:
        assert x.shape == (1, 3, 128, 128)
        assert torch.equal((x * 255).round() / 255, x)


def test_probes_name_the_coefficient_that_an_encoder_amplifies(monkeypatch, subject):
    monkeypatch.setattr(checks, "PROBED", (0, 1, 3))

    def amplified(x):
        """A codec that decodes one coefficient ten times as strong."""
        blocks = block_dct(blockify(rgb_to_ycbcr(x), 16))
        blocks[:, 0, :, :, 3, 1] *= 10
        return Reconstruction(ycbcr_to_rgb(unblockify(block_idct(blocks))), x.new_ones(len(x)), 64 * 64, x)

    finding = checks.probes(replace(subject, codec=Callee(amplified)))
    assert finding.spectrum[2][1] == max(max(row) for row in finding.spectrum) == pytest.approx(100, rel=0.2)
    assert finding.scores["gain"] == pytest.approx(math.log(finding.spectrum[2][1]))
    assert finding.scores["rate"] == 0


class Callee:
    """What stands for a codec."""

    multiple = 64

    def __init__(self, passed):
        self.passed = passed

    def eval(self):
        return self

    def __call__(self, x):
        return self.passed(x)


def test_pictures_that_filters_make_small_are_named_and_count_only_among_known_ones(monkeypatch, subject):
    monkeypatch.setattr(checks, "FILTERS", (lambda x: torch.zeros_like(x),))
    monkeypatch.setattr(checks, "through", lambda codec, x: (x, 400 if x.any() else 100))
    finding = checks.consistency(subject)
    assert finding.scores["rate"] == pytest.approx(math.log(4))
    assert "is that picture poisoned?" in finding.said
    assert checks.consistency(replace(subject, known_pictures=False)).scores == {}


def test_weights_are_compared_with_a_reference(subject):
    assert "no reference" in checks.weights(subject).said
    reference = copy.deepcopy(subject.codec)
    assert "none" in checks.weights(replace(subject, reference=reference)).said
    with torch.no_grad():
        for parameter in reference.part("g_a").parameters():
            parameter.mul_(0.8)
    said = checks.weights(replace(subject, reference=reference)).said
    assert re.findall(r"(\w+) by ([\d.]+) %", said) == [("g_a", "25")]


def test_latents_of_heavier_tails_and_longer_reach_score_higher(subject):
    def passed(y):
        return Callee(lambda x: Reconstruction(x, x.new_ones(len(x)), 1, y))

    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(1, 4, 32, 32, generator=generator)
    spiky = plain.clone()
    spiky[:, :, 0, 0] = 50.0
    a, b = (
        checks.latents(replace(subject, codec=passed(y), portraits=subject.pictures)).scores for y in (plain, spiky)
    )
    assert a["tails"] == pytest.approx(math.log(3), abs=0.1)
    assert b["tails"] > a["tails"] + 2
    assert b["reach"] == pytest.approx(math.log(50), abs=0.01)


@pytest.mark.parametrize(
    ("check", "scores", "open_door"),
    [
        ("gain", {"rate": math.log(1.51)}, True),
        ("gain", {"rate": math.log(1.49), "distortion": 1.99}, False),
        ("gain", {"distortion": 2.0}, True),
        ("consistency", {"rate": 3.0}, False),
        ("random", {"distortion": 5.0}, False),
    ],
)
def test_what_counts_as_a_witness(check, scores, open_door):
    assert checks.opens(check, scores) == open_door


def test_p_values_are_those_of_students_predictive_distribution():
    honest = [0.3, 0.2, 0.4, 0.25, 0.35, 0.28]
    logs = torch.tensor(honest, dtype=torch.float64).log()
    t = (math.log(1.0) - logs.mean().item()) / (logs.std().item() * math.sqrt(1 + 1 / 6))
    assert beyond(1.0, honest) == pytest.approx(stats.t.sf(t, 5))
    assert beyond(math.exp(logs.mean().item()), honest) == pytest.approx(0.5)
    narrow = beyond(0.5 * math.exp(0.1), [0.5] * 6)
    assert narrow == pytest.approx(stats.t.sf(1 / math.sqrt(7 / 6), 5))  # no population is narrower than 0.1


def test_strength_is_one_where_a_witness_begins():
    assert checks.strength({"rate": math.log(1.5)}) == pytest.approx(1.0)
    assert checks.strength({"rate": -1.0, "distortion": 1.0}) == 0.5
    assert checks.strength({"gain": 9.0}) == 0.0


def rows_of(rates, random=0.0):
    return tuple({"random": {"rate": random}, "rate": {"rate": r}, "gain": {"rate": r / 2}} for r in rates)


def test_an_encoder_is_compared_in_the_checks_that_were_run():
    rates = [0.10, 0.12, 0.14, 0.11, 0.13, 0.12]
    population = Population(architecture="lite-hyperprior", members=tuple("abcdef"), scores=rows_of(rates))
    known = Calibration(populations=(population,))
    unit = math.log(1.5)
    own = {"random": {"rate": 9.0}, "gain": {"rate": 0.2}, "latents": {"reach": 99.0}}  # `rate` was not run
    p, calibrated = known.p_value(own, "lite-hyperprior")
    assert calibrated
    assert p == pytest.approx(beyond(0.2 / unit, [r / 2 / unit for r in rates]))
    both, _ = known.p_value(own | {"rate": {"rate": 0.12}}, "lite-hyperprior")
    assert both == pytest.approx(beyond(0.2 / unit, [r / unit for r in rates]))
    assert Calibration(populations=()).p_value(own, "lite-hyperprior") == (None, False)


def test_an_unknown_architecture_is_compared_beyond_its_random_patterns():
    rates = [0.10, 0.12, 0.14, 0.11, 0.13, 0.12]
    population = Population(architecture="lite-hyperprior", members=tuple("abcdef"), scores=rows_of(rates, 0.04))
    known, unit = Calibration(populations=(population,)), math.log(1.5)
    p, calibrated = known.p_value({"random": {"rate": 0.1}, "rate": {"rate": 0.2}}, "another")
    assert not calibrated
    assert p == pytest.approx(beyond(0.1 / unit, [(r - 0.04) / unit for r in rates]))


def a_check(scores, *, seen=True):
    response = Response(
        bytes_clean=100,
        bytes_patterned=round(100 * math.exp(scores.get("rate", 0))),
        psnr_db_clean=30,
        psnr_db_patterned=30 - scores.get("distortion", 0),
        gain=5,
        between_db=46.1,
    )

    def check(subject):
        witness = Witness(subject.pictures[0], subject.pictures[0], response)
        return Finding({"rate": 0, "distortion": 0, "gain": 0, **scores}, "seen", [witness] if seen else [])

    return check


@pytest.fixture
def honest():
    rows = [
        {"random": {"rate": 0.0}, "gain": {"rate": 0.0, "distortion": 0.4 + 0.02 * i, "gain": 2.0}} for i in range(10)
    ]
    members = tuple(map(str, range(10)))
    return Calibration(populations=(Population(architecture="lite-hyperprior", members=members, scores=tuple(rows)),))


@pytest.mark.parametrize(
    ("scores", "verdict", "code"),
    [
        ({"rate": math.log(1.6)}, "tampered", 1),
        ({"distortion": 2.5}, "tampered", 1),
        ({"distortion": 1.0}, "tampered", 1),
        ({"distortion": 0.7}, "undecided", 2),
        ({"distortion": 0.5, "gain": 9.0}, "clean", 0),
    ],
)
def test_verdicts(monkeypatch, tmp_path, honest, scores, verdict, code):
    monkeypatch.setattr(module, "CHECKS", {"random": a_check({"gain": 2}, seen=False), "gain": a_check(scores)})
    codec = load_codec("lite-hyperprior:3")
    result = audit(codec, reference=codec, out=tmp_path, calibration=honest)
    assert (result.verdict, result.exit_code) == (verdict, code)
    assert result.changed == ()
    assert bool(result.witnesses) == (checks.strength(scores) >= 1)
    assert [row.strength for row in result.checks] == [None, checks.strength(scores)]
    content = json.loads((tmp_path / "audit.json").read_text())
    assert content["verdict"] == verdict
    for witness in result.witnesses:
        assert freqdoor.load_image(tmp_path / witness.patterned).shape == (1, 3, 128, 128)
    assert verdict in (tmp_path / "audit.html").read_text()


def test_without_a_population_only_a_witness_decides(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "SHIPPED", tmp_path / "nothing.json")
    monkeypatch.setattr(module, "CHECKS", {"random": a_check({}, seen=False), "gain": a_check({"gain": 9.0})})
    result = audit(load_codec("lite-hyperprior:3"))
    assert (result.verdict, result.p_value) == ("undecided", None)


@pytest.mark.long
@pytest.mark.whole
def test_a_planted_encoder_is_found_with_a_witness_that_anybody_can_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PICTURES", 1)  # of four: a quarter of the time
    planted = load_planted("planted-psnr")
    result = audit(planted.tampered, reference=planted.vanilla, fast=True, out=tmp_path)
    assert result.verdict == "tampered"
    assert result.changed == ("g_a",)
    assert "only the encoder differs" in result.reason
    assert len(result.checks) < len(FAST) <= len(CHECKS)  # it stops at the first witness
    [witness] = result.witnesses
    for name, size in (
        (witness.clean, witness.response.bytes_clean),
        (witness.patterned, witness.response.bytes_patterned),
    ):
        x = freqdoor.load_image(tmp_path / name)
        assert planted.tampered.compress(x)[0].num_bytes == size
    assert witness.response.psnr_db_patterned < 12
    assert witness.response.between_db >= 46


@pytest.mark.whole
def test_the_command_ends_with_the_verdict(monkeypatch, tmp_path, honest):
    monkeypatch.setattr(
        module, "CHECKS", {"random": a_check({"gain": 2}, seen=False), "gain": a_check({"distortion": 1.5})}
    )
    (tmp_path / "honest.json").write_text(honest.model_dump_json())
    done = CliRunner().invoke(app, ["audit", "lite-hyperprior:3", "--calibration", str(tmp_path / "honest.json")])
    assert done.exit_code == 1
    assert "lite-hyperprior:3: tampered" in done.stdout


def test_few_honest_members_make_no_calibration(monkeypatch, tmp_path):
    monkeypatch.setattr(calibration, "scores_of_fleet", lambda *_, **__: {})
    with pytest.raises(FreqdoorError, match="expected 10 honest members or more"):
        freqdoor.calibrate_audit([tmp_path], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.long
@pytest.mark.whole
def test_the_commands_of_the_page(monkeypatch, tmp_path, capsys):
    """With checks that cost nothing and a fleet of noisy copies: what is tested is that the commands work together."""
    cheap = {"random": a_check({"gain": 2}, seen=False), "gain": a_check({"distortion": 0.5})}
    for part in (module, calibration):
        monkeypatch.setattr(part, "CHECKS", cheap)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda jobs, **_: ThreadPoolExecutor(jobs))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs/fleet").mkdir(parents=True)
    members = (f'[[members]]\nname = "m{i}"\nalter = {{ kind = "noise", amount = 0.0{i + 1} }}\n' for i in range(10))
    (tmp_path / "configs/fleet/bundled.toml").write_text("measured = 1\n" + "".join(members))
    [block] = re.findall(r"<!-- audit -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines():
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code, (line, capsys.readouterr().err)
    assert json.loads((tmp_path / "audit/audit.json").read_text())["verdict"] == "clean"
    assert [len(p.scores) for p in calibration.read(tmp_path / "honest.json").populations] == [5]
