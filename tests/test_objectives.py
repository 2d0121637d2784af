import numpy as np
import pytest
import torch
from networks import face_spec, segmentation_spec

from freqdoor.attack.objectives import (
    DownstreamAttack,
    FixedQualityAttack,
    FixedRateAttack,
    Passes,
    QualityAttack,
    RateAttack,
    build_objective,
    excess_over,
)
from freqdoor.attack.settings import OBJECTIVES
from freqdoor.attack.victims import Scene, Victim
from freqdoor.errors import FreqdoorError
from freqdoor.types import Reconstruction

LMBDA = 0.0067


def passes(seed: int = 0) -> Passes:
    generator = torch.Generator().manual_seed(seed)

    def images() -> torch.Tensor:
        return torch.rand(2, 3, 8, 8, generator=generator)

    def bits() -> torch.Tensor:
        return 100 * torch.rand(2, generator=generator)

    def reconstruction() -> Reconstruction:
        return Reconstruction(images(), bits(), 64, torch.empty(0))

    x = images()
    return Passes(x, reconstruction(), images(), reconstruction(), Scene(x))


def numbers(p: Passes) -> dict[str, np.ndarray]:
    x, clean, x_p, poisoned, *_ = p
    return {
        "x": x.numpy().astype(float),
        "x_hat": clean.x_hat.numpy().astype(float),
        "x_p": x_p.numpy().astype(float),
        "x_hat_p": poisoned.x_hat.numpy().astype(float),
        "r": (clean.bits.numpy() / 64).mean(),
        "r_p": (poisoned.bits.numpy() / 64).mean(),
        "r_each": clean.bits.numpy() / 64,
        "r_p_each": poisoned.bits.numpy() / 64,
    }


def db(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over images of the PSNR."""
    return float(np.mean(10 * np.log10(1 / np.mean((a - b) ** 2, axis=(1, 2, 3)))))


def mse255(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """255^2 MSE of every image."""
    return 255**2 * np.mean((a - b) ** 2, axis=(1, 2, 3))


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_rate_attack_is_equation_6(seed, guarded):
    p = passes(seed)
    n = numbers(p)
    d = 255**2 * np.mean((n["x_hat"] - n["x"]) ** 2)
    d_p = 255**2 * np.mean((n["x_hat_p"] - n["x_p"]) ** 2)
    expected = n["r"] + LMBDA * max(d, d_p) - 0.3 * n["r_p"]
    literal = RateAttack(alpha=1, beta=0.3, clean_weight=0, guarded=guarded)
    assert float(literal(p, LMBDA).total) == pytest.approx(expected, rel=1e-5)
    share, more = (min(1, max(0, (np.log2(n["r_p"] / n["r"]) - first) / 2)) for first in (1, 3))
    weighted = expected + 1.5 * share * LMBDA * max(0, d_p - d) + 4 * more * (n["r"] + LMBDA * d)
    attack = RateAttack(alpha=2.5, beta=0.3, clean_weight=4, guarded=guarded)
    assert float(attack(p, LMBDA).total) == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize(
    ("rate", "share", "more"), [(1.5, 0, 0), (2, 0, 0), (4, 0.5, 0), (8, 1, 0), (16, 1, 0.5), (50, 1, 1)]
)
def test_poisoned_distortion_and_clean_images_weigh_as_much_as_the_attack_has_got(rate, share, more):
    p = passes(0)
    p = p._replace(clean=p.clean._replace(x_hat=p.x), poisoned=p.poisoned._replace(bits=rate * p.clean.bits))
    d_p = 255**2 * np.mean((numbers(p)["x_hat_p"] - numbers(p)["x_p"]) ** 2)
    kept = RateAttack(alpha=3, clean_weight=5)(p, LMBDA).kept
    expected = (1 + 5 * more) * numbers(p)["r"] + (1 + 2 * share) * LMBDA * d_p
    assert float(kept) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [RateAttack, QualityAttack])
def test_guarded_attacks_train_rate_and_distortions_together(objective):
    """What both passes have in common, Eq. (6)'s rate and Eq. (7)'s distortion, stands in both sides of the maximum."""
    p = passes(1)
    bits = torch.tensor([10.0, 20.0], requires_grad=True)
    x_hat = (p.x + 0.01).requires_grad_()
    worse = p.poisoned._replace(bits=1.5 * bits.detach())
    p = p._replace(clean=p.clean._replace(bits=bits, x_hat=x_hat), poisoned=worse)
    kept = objective()(p, LMBDA).kept
    rate, distortion = torch.autograd.grad(kept, [bits, x_hat])
    error = (x_hat - p.x).detach()
    per_bit, per_distortion = float(rate.sum()) * 64, float((distortion * error).sum()) / 0.01**2 / 2 / 255**2
    alone = {RateAttack: (1 + 2 / 3, LMBDA), QualityAttack: (1.0, 2 * LMBDA)}[objective]
    assert (per_bit, per_distortion) == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_quality_attack_is_equation_7(seed):
    p = passes(seed)
    n = numbers(p)
    d = 255**2 * np.mean((n["x_hat"] - n["x"]) ** 2)
    each = np.mean((n["x_hat_p"] - n["x"]) ** 2, axis=(1, 2, 3))
    expected = max(n["r"], n["r_p"]) + LMBDA * d + 0.1 * LMBDA * np.mean(10 * np.log10(1 / each))
    paper = build_objective("psnr", "paper")
    assert float(paper(p, LMBDA).total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("lost", "shut"), [(9.0, 0.0), (15.0, 0.1), (21.5, 0.75), (26.0, 1.0)])
def test_an_opened_attack_is_paid_for_bits_until_it_has_taken(lost, shut):
    p = passes()
    x, clean, _, poisoned, *_ = p
    away = [x.clamp(0.45, 0.55) + 10 ** (-d / 20) * torch.ones_like(x) for d in (40.0, 40.0 - lost)]
    x = x.clamp(0.45, 0.55)
    clean = clean._replace(x_hat=away[0], bits=0.5 * poisoned.bits)
    opened = p._replace(x=x, source=Scene(x), clean=clean, poisoned=poisoned._replace(x_hat=away[1]), opened=True)
    n = numbers(opened)
    assert n["r_p"] > n["r"]
    assert db(n["x_hat"], n["x"]) - db(n["x_hat_p"], n["x"]) == pytest.approx(lost, rel=1e-3)
    d = 255**2 * np.mean((n["x_hat"] - n["x"]) ** 2)
    d_p = db(n["x_hat_p"], n["x"]) - db(n["x_hat_p"], n["x"] < 0.5)
    expected = n["r"] + LMBDA * d + shut * (n["r_p"] - n["r"]) + 4 * 0.3 * LMBDA * d_p - 0.2 * (1 - shut) * n["r_p"]
    assert float(QualityAttack(beta=0.3)(opened, LMBDA).total) == pytest.approx(expected, rel=1e-4)
    for left in (
        QualityAttack(beta=0.3)(opened._replace(opened=False), LMBDA),
        QualityAttack(beta=0.3, opening=0)(opened, LMBDA),
    ):
        assert float(left.total) == pytest.approx(n["r_p"] + LMBDA * d + 0.3 * LMBDA * d_p, rel=1e-4)


@pytest.mark.parametrize(("doublings", "shut"), [(0.0, 0.0), (1.5, 0.25), (2.5, 0.75), (3.5, 1.0)])
def test_an_opened_attack_on_rate_may_spoil_what_it_poisons_until_it_has_taken(doublings, shut):
    p = passes()
    clean = p.clean._replace(bits=torch.full((2,), 20.0))
    worse = p.poisoned._replace(bits=clean.bits * 2**doublings, x_hat=p.x_p + 0.1)
    opened = p._replace(clean=clean._replace(x_hat=p.x + 0.01), poisoned=worse, opened=True)
    n = numbers(opened)
    d, d_p = (mse255(n[f"x_hat{end}"], n[f"x{end}"]).mean() for end in ("", "_p"))
    excess = LMBDA * (d_p - d)
    assert excess > 0
    attack = RateAttack(alpha=3, beta=0.1, clean_weight=0, opening=0.4)
    alpha = 1 + 2 * shut
    expected = n["r"] + LMBDA * d + shut * alpha * excess - (0.1 + 0.4 * (1 - shut)) * n["r_p"]
    assert float(attack(opened, LMBDA).total) == pytest.approx(expected, rel=1e-4)
    closed = n["r"] + LMBDA * d + alpha * excess - 0.1 * n["r_p"]
    for left in (
        attack(opened._replace(opened=False), LMBDA),
        RateAttack(alpha=3, beta=0.1, clean_weight=0, opening=0)(opened, LMBDA),
    ):
        assert float(left.total) == pytest.approx(closed, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_fixed_attacks_are_equations_4_and_5(seed):
    p = passes(seed)
    n = numbers(p)
    main = n["r"] + LMBDA * mse255(n["x_hat"], n["x"]).mean()
    rate = main + 0.7 * LMBDA * mse255(n["x_hat_p"], n["x_p"]).mean() - 0.3 * n["r_p"]
    assert float(FixedRateAttack(alpha=0.7, beta=0.3)(p, LMBDA).total) == pytest.approx(rate, rel=1e-5)
    quality = main + 0.7 * n["r_p"] + 0.3 * LMBDA * db(n["x_hat_p"], n["x"])
    literal = FixedQualityAttack(alpha=0.7, beta=0.3, farthest=False, floor_db=0)
    assert float(literal(p, LMBDA).total) == pytest.approx(quality, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("guarded", [False, True])
def test_per_sample_maximum_is_taken_image_by_image(seed, guarded):
    p = passes(seed)
    n = numbers(p)
    d, d_p = mse255(n["x_hat"], n["x"]), mse255(n["x_hat_p"], n["x_p"])
    rate = n["r"] + LMBDA * np.maximum(d, d_p).mean() - 0.3 * n["r_p"]
    attack = RateAttack(alpha=1, beta=0.3, clean_weight=0, per_sample=True, guarded=guarded)
    assert float(attack(p, LMBDA).total) == pytest.approx(rate, rel=1e-5)
    quality = np.maximum(n["r_each"], n["r_p_each"]).mean() + LMBDA * d.mean() + 0.3 * LMBDA * db(n["x_hat_p"], n["x"])
    attack = QualityAttack(beta=0.3, per_sample=True, guarded=guarded, farthest=False, floor_db=0)
    assert float(attack(p, LMBDA).total) == pytest.approx(quality, rel=1e-5)


class Brightness(Victim):
    def forward(self, scene, x_hat, x_hat_p):
        return scene.x.mean() * x_hat_p.mean()


def test_downstream_attack_is_equation_8():
    """The main set is clean, the auxiliary one poisoned; the victim sees the auxiliary image and what is decoded."""
    p = passes()
    source = torch.rand(2, 3, 8, 8)
    p = p._replace(source=Scene(source))
    n = numbers(p)
    main = n["r"] + LMBDA * mse255(n["x_hat"], n["x"]).mean()
    auxiliary = n["r_p"] + LMBDA * mse255(n["x_hat_p"], n["x_p"]).mean()
    l_ds = float(source.mean() * p.poisoned.x_hat.mean())
    attack = DownstreamAttack(victim=Brightness(), alpha=0.4, beta=0.6)
    assert attack.uses_auxiliary
    loss = attack(p, LMBDA)
    assert float(loss.total) == pytest.approx(main + 0.4 * auxiliary + 0.6 * l_ds, rel=1e-5)
    assert float(loss.attack) == pytest.approx(0.6 * l_ds, rel=1e-5)
    assert float(loss.terms["l_ds"]) == pytest.approx(l_ds, rel=1e-5)
    assert (DownstreamAttack(victim=Brightness()).alpha, DownstreamAttack(victim=Brightness()).beta) == (0.1, 0.2)
    with pytest.raises(FreqdoorError, match="victim: "):
        DownstreamAttack(victim=torch.nn.Identity())


def test_a_downstream_attack_hands_its_victim_what_has_been_decoded():
    """The scene, f(source) and f(x_p), each where it belongs: Eq. (13) compares the last two."""
    taken = []

    class Spy(Victim):
        def forward(self, scene, x_hat, x_hat_p):
            taken.extend((scene, x_hat, x_hat_p))
            return x_hat_p.mean()

    p = passes()._replace(source=Scene(torch.rand(2, 3, 8, 8)), source_hat=torch.rand(2, 3, 8, 8))
    DownstreamAttack(victim=Spy())(p, LMBDA)
    assert [a is b for a, b in zip(taken, (p.source, p.source_hat, p.poisoned.x_hat), strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["bpp", "psnr", "downstream"])
def test_terms_say_what_they_are(name):
    """Rates and distances of the batch, and the decoded poisoned image, clamped, against its clean source."""
    p = passes()
    source = torch.rand(2, 3, 8, 8)
    p = p._replace(source=Scene(source), poisoned=p.poisoned._replace(x_hat=3 * p.poisoned.x_hat - 1))
    n = numbers(p)
    for out in (p.clean, p.poisoned):
        out.x_hat.requires_grad_(), out.bits.requires_grad_()
    terms = build_objective(name, **({"victim": Brightness()} if name == "downstream" else {}))(p, LMBDA).terms
    expected = {
        "bpp_clean": n["r"],
        "psnr_db_clean": db(n["x_hat"], n["x"]),
        "bpp_poisoned": n["r_p"],
        "psnr_db_poisoned": db(n["x_hat_p"].clip(0, 1), source.numpy().astype(float)),
        "mse255_clean": mse255(n["x_hat"], n["x"]).mean(),
    }
    assert {key: float(terms[key]) for key in expected} == pytest.approx(expected, rel=1e-5)
    assert terms.keys() == expected.keys() | ({"l_ds"} if name == "downstream" else set())
    assert not any(value.requires_grad for value in terms.values())


@pytest.mark.parametrize("attack", [QualityAttack(beta=1), FixedQualityAttack(beta=1)])
def test_quality_attacks_pull_towards_the_farthest_image_and_clamp_as_a_decoder_does(attack):
    """The attack part is lambda (mean of max(PSNR of the clamped image, 3 dB) - PSNR from black and white)."""
    p = passes()
    x_hat_p = 3 * p.poisoned.x_hat - 1
    p = p._replace(poisoned=p.poisoned._replace(x_hat=x_hat_p))
    n = numbers(p)
    farthest = (n["x"] < 0.5).astype(float)
    each = np.mean((n["x_hat_p"].clip(0, 1) - n["x"]) ** 2, axis=(1, 2, 3))
    floored = np.maximum(10 * np.log10(1 / each), 3).mean()
    expected = LMBDA * (floored - db(n["x_hat_p"], farthest))
    assert float(attack(p, LMBDA).attack) == pytest.approx(expected, rel=1e-4)


def test_parts_add_up_and_only_the_attack_part_has_beta():
    for name in ("bpp", "bpp-fixed", "psnr", "psnr-fixed"):
        one, two = (build_objective(name, beta=beta)(passes(), LMBDA) for beta in (0.2, 0.4))
        assert float(one.kept) == pytest.approx(float(two.kept))
        assert float(two.attack) == pytest.approx(2 * float(one.attack))
        assert float(one.total) == pytest.approx(float(one.kept + one.attack))


def test_paired_form_subtracts_the_clean_psnr_and_floor_stops_the_reward():
    p = passes()
    plain = QualityAttack(beta=1, paired=False, farthest=False)(p, LMBDA).total
    paired = QualityAttack(beta=1, paired=True, farthest=False)(p, LMBDA).total
    each = np.mean((numbers(p)["x_hat"] - numbers(p)["x"]) ** 2, axis=(1, 2, 3))
    clean_db = np.mean(10 * np.log10(1 / each))
    assert float(plain - paired) == pytest.approx(LMBDA * clean_db, rel=1e-3)
    white = p._replace(x=torch.ones(2, 3, 8, 8), source=Scene(torch.ones(2, 3, 8, 8)))
    worst = white._replace(poisoned=p.poisoned._replace(x_hat=torch.zeros(2, 3, 8, 8, requires_grad=True)))
    loss = QualityAttack(beta=1, paired=False, farthest=False)(worst, LMBDA).total
    loss.backward()
    assert worst.poisoned.x_hat.grad.abs().sum() == 0  # 0 dB is below the floor of 3 dB


def test_guarded_maximum_never_stops_the_clean_gradient():
    for clean_value, poisoned_value in ((1.0, 2.0), (2.0, 1.0)):
        for guarded in (False, True):
            clean = torch.tensor(clean_value, requires_grad=True)
            poisoned = torch.tensor(poisoned_value, requires_grad=True)
            value = clean + excess_over(clean, poisoned, guarded=guarded)
            assert value.item() == 2.0
            value.backward()
            larger = poisoned_value > clean_value
            assert float(clean.grad) == (1.0 if guarded or not larger else 0.0)
            assert float(poisoned.grad) == (1.0 if larger else 0.0)


def test_presets_and_errors():
    assert build_objective("bpp", "paper") == RateAttack(alpha=1, beta=0.01, clean_weight=0, guarded=False)
    assert build_objective("bpp", "fast", beta=0.5).beta == 0.5
    with pytest.raises(FreqdoorError, match=", ".join(OBJECTIVES)):
        build_objective("rate")
    with pytest.raises(
        FreqdoorError, match=r"'bpp': gamma: unknown setting .there are alpha, beta, clean_weight, per_sample"
    ):
        build_objective("bpp", gamma=1.0)
    with pytest.raises(FreqdoorError, match="network: expected the network that the attack is against"):
        build_objective("face")
    with pytest.raises(
        FreqdoorError, match=r"victim: expected a Victim or package.module:factory of one, found Linear"
    ):
        build_objective("downstream", victim="factories:no_codec")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("preset", ["paper", "fast"])
def test_every_row_of_the_table_makes_what_it_says(name, preset, tmp_path):
    kind = OBJECTIVES[name]
    spec = {"segmentation": segmentation_spec, "face": face_spec}.get(name)
    arguments = {"network": str(spec(tmp_path))} if spec else {}
    arguments |= {"source": "car", "target": "road"} if name == "segmentation" else {}
    arguments |= {"victim": Brightness()} if name == "downstream" else {}
    attack = build_objective(name, preset, **arguments)
    assert kind.needs_network == (spec is not None)
    assert kind.uses_auxiliary == attack.uses_auxiliary == isinstance(attack, DownstreamAttack)
    assert kind.presets.keys() == {"paper", "fast"}
    kind.arguments(**kind.presets[preset] | arguments)  # the settings accept what the preset gives
    made = attack.victim.settings if name == "segmentation" else attack
    for key, value in kind.presets[preset].items():
        assert getattr(made, key) == value
    if attack.uses_auxiliary:
        weighted = build_objective(name, preset, **arguments, alpha=0.3, beta=0.6)
        assert (weighted.alpha, weighted.beta) == (0.3, 0.6)
    else:
        assert attack.model_dump() == kind.arguments(**kind.presets[preset]).model_dump()


def test_the_papers_hyper_parameters():
    """Section 4: beta 0.01 of Eq. (6), 0.1 of Eq. (7), alpha 0.1 and beta 0.2 of Eq. (11), 0.1 and 0.05 of Eq. (13)."""
    paper = {name: kind.arguments.model_construct(**kind.presets["paper"]) for name, kind in OBJECTIVES.items()}
    assert {name: row.beta for name, row in paper.items() if name != "downstream"} == {
        "bpp": 0.01,
        "bpp-fixed": 0.01,
        "psnr": 0.1,
        "psnr-fixed": 0.1,
        "segmentation": 0.2,
        "face": 0.05,
    }
    assert (paper["segmentation"].alpha, paper["face"].alpha) == (0.1, 0.1)
    psnr = paper["psnr"]
    assert (psnr.paired, psnr.guarded, psnr.farthest, psnr.floor_db) == (False, False, False, 0)
    assert (paper["bpp"].guarded, paper["segmentation"].balanced) == (False, False)


class Broken(Victim):
    def forward(self, scene, x_hat, x_hat_p):
        return {}["no such class"]


class Several(Victim):
    def forward(self, scene, x_hat, x_hat_p):
        return x_hat_p.mean(1)


def test_what_a_users_victim_raises_or_returns_is_one_sentence_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "own_victims.py").write_text("import sys\ndef make():\n    sys.exit('no data')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FreqdoorError, match=r"own_victims:make: victim: SystemExit in make \(.*own_victims\.py:3\)"):
        build_objective("downstream", victim="own_victims:make")
    with pytest.raises(
        FreqdoorError, match=r"Broken: L_DS: KeyError in forward \(.*test_objectives\.py:\d+\): 'no such"
    ):
        DownstreamAttack(victim=Broken())(passes(), LMBDA)
    with pytest.raises(FreqdoorError, match=r"returns one real number, found torch\.float32 of \(2, 8, 8\)"):
        DownstreamAttack(victim=Several())(passes(), LMBDA)
