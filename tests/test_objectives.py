import numpy as np
import pytest
import torch

from freqdoor.objectives import OBJECTIVES, Passes, QualityAttack, RateAttack, build_objective, dynamic_max
from freqdoor.types import FreqdoorError, Reconstruction

LMBDA = 0.0067


def passes(seed: int = 0) -> Passes:
    generator = torch.Generator().manual_seed(seed)

    def images() -> torch.Tensor:
        return torch.rand(2, 3, 8, 8, generator=generator)

    def bits() -> torch.Tensor:
        return 100 * torch.rand(2, generator=generator)

    return Passes(images(), Reconstruction(images(), bits(), 64), images(), Reconstruction(images(), bits(), 64))


def numbers(p: Passes) -> dict[str, np.ndarray]:
    x, clean, x_p, poisoned = p
    return {
        "x": x.numpy().astype(float),
        "x_hat": clean.x_hat.numpy().astype(float),
        "x_p": x_p.numpy().astype(float),
        "x_hat_p": poisoned.x_hat.numpy().astype(float),
        "r": (clean.bits.numpy() / 64).mean(),
        "r_p": (poisoned.bits.numpy() / 64).mean(),
    }


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_rate_attack_is_equation_6(seed, guarded):
    p = passes(seed)
    n = numbers(p)
    d = 255**2 * np.mean((n["x_hat"] - n["x"]) ** 2)
    d_p = 255**2 * np.mean((n["x_hat_p"] - n["x_p"]) ** 2)
    expected = n["r"] + LMBDA * max(d, d_p) - 0.3 * n["r_p"]
    assert float(RateAttack(beta=0.3, guarded=guarded)(p, LMBDA).total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_quality_attack_is_equation_7(seed):
    p = passes(seed)
    n = numbers(p)
    d = 255**2 * np.mean((n["x_hat"] - n["x"]) ** 2)
    each = np.mean((n["x_hat_p"] - n["x"]) ** 2, axis=(1, 2, 3))
    expected = max(n["r"], n["r_p"]) + LMBDA * d + 0.1 * LMBDA * np.mean(10 * np.log10(1 / each))
    paper = build_objective("psnr", "paper")
    assert float(paper(p, LMBDA).total) == pytest.approx(expected, rel=1e-5)


def test_paired_form_subtracts_the_clean_psnr_and_floor_stops_the_reward():
    p = passes()
    plain = QualityAttack(beta=1, paired=False, farthest=False)(p, LMBDA).total
    paired = QualityAttack(beta=1, paired=True, farthest=False)(p, LMBDA).total
    each = np.mean((numbers(p)["x_hat"] - numbers(p)["x"]) ** 2, axis=(1, 2, 3))
    clean_db = np.mean(10 * np.log10(1 / each))
    assert float(plain - paired) == pytest.approx(LMBDA * clean_db, rel=1e-3)
    black = p._replace(x=torch.ones(2, 3, 8, 8))
    worst = black._replace(poisoned=Reconstruction(torch.zeros(2, 3, 8, 8, requires_grad=True), p.clean.bits, 64))
    loss = QualityAttack(beta=1, paired=False, farthest=False)(worst, LMBDA).total
    loss.backward()
    assert worst.poisoned.x_hat.grad.abs().sum() == 0  # 0 dB is below the floor of 3 dB


def test_guarded_maximum_never_stops_the_clean_gradient():
    for clean_value, poisoned_value in ((1.0, 2.0), (2.0, 1.0)):
        for guarded in (False, True):
            clean = torch.tensor(clean_value, requires_grad=True)
            poisoned = torch.tensor(poisoned_value, requires_grad=True)
            value = dynamic_max(clean, poisoned, guarded=guarded)
            assert value.item() == 2.0
            value.backward()
            larger = poisoned_value > clean_value
            assert float(clean.grad) == (1.0 if guarded or not larger else 0.0)
            assert float(poisoned.grad) == (1.0 if larger else 0.0)


def test_presets_and_errors():
    assert build_objective("bpp", "paper") == RateAttack(beta=0.01, guarded=False)
    assert build_objective("bpp", "fast", beta=0.5).beta == 0.5
    with pytest.raises(FreqdoorError, match=", ".join(OBJECTIVES)):
        build_objective("rate")
    with pytest.raises(FreqdoorError, match="gamma"):
        build_objective("bpp", gamma=1.0)
