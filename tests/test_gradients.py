import pytest
import torch

from freqdoor.config import TriggerSettings
from freqdoor.objectives import QualityAttack, RateAttack
from freqdoor.plant import Attack, joint_loss, scale_gradient
from freqdoor.train import rate_distortion
from freqdoor.triggers import AdaptiveDCT, budget_penalty
from freqdoor.types import FreqdoorError

LMBDA, EPS = 0.0067, 0.02


def test_rate_gradient_reaches_g_a_and_only_g_a(codec, x):
    codec.freeze("g_a").train()
    codec(x).bpp.mean().backward()
    with_gradient = {name.split(".")[1] for name, p in codec.named_parameters() if p.grad is not None}
    assert with_gradient == {"g_a"}
    assert max(p.grad.abs().max() for p in codec.net.g_a.parameters() if p.grad is not None) > 0


def test_entropy_models_in_eval_mode_are_refused(codec, x):
    """In eval mode they round, and the rate attack would silently train on nothing."""
    codec.train()
    codec.net.gaussian_conditional.eval()
    with pytest.raises(FreqdoorError, match="gaussian_conditional is in eval mode"):
        codec(x)


def test_scale_gradient():
    x = torch.rand(3, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 0.25))


def make_attacks(weights=(0.25, 2.0)) -> tuple[Attack, ...]:
    torch.manual_seed(5)
    # without projection, whose scale is a constant that two graphs would share all the same
    triggers = [AdaptiveDCT(width=8, project=False) for _ in weights]
    objectives = [RateAttack(beta=0.3), QualityAttack(beta=2.0)]
    return tuple(Attack(str(i), *pair) for i, pair in enumerate(zip(triggers, objectives, weights, strict=True)))


def gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_one_backward_gives_equation_9_and_10(codec, x):
    """The encoder's gradient is that of sum_o alpha^o L_o, each trigger's that of its own L_o + penalty."""
    codec.freeze("g_a").train()
    attacks = make_attacks()
    settings = TriggerSettings(budget="penalty", gamma=1e3, round8=False)
    modules = [codec.net.g_a, *(a.trigger for a in attacks)]

    def clear() -> None:
        for module in modules:
            module.zero_grad()

    torch.manual_seed(0)
    total, _ = joint_loss(codec, attacks, x, LMBDA, settings, EPS)
    total.backward()
    ours = [gradients(m) for m in modules]
    for index, attack in enumerate(attacks):  # Eq. (10): the trigger alone, no alpha
        clear()
        torch.manual_seed(0)
        single, _ = joint_loss_alone(codec, attacks, x, settings, index)
        (single + budget_penalty(x, attack.trigger(x), gamma=1e3, eps=EPS)).backward()
        torch.testing.assert_close(gradients(attack.trigger), ours[1 + index], rtol=2e-3, atol=1e-5)
    clear()
    torch.manual_seed(0)
    losses = [joint_loss_alone(codec, attacks, x, settings, i) for i in range(2)]
    torch.manual_seed(0)
    weighted = sum(a.weight * loss for a, (loss, _) in zip(attacks, losses, strict=True))
    weighted.backward()  # Eq. (9)
    torch.testing.assert_close(gradients(codec.net.g_a), ours[0], rtol=2e-3, atol=1e-5)


def joint_loss_alone(codec, attacks, x, settings, index):
    """L_jt of one attack, written out: the same noise as in the joint pass, no weights, no gradient scaling."""
    from freqdoor.objectives import Passes
    from freqdoor.types import Reconstruction

    torch.manual_seed(0)
    poisoned = [a.trigger(x) for a in attacks]
    out = codec(torch.cat([x, *poisoned]))
    parts = [Reconstruction(a, b, out.num_pixels) for a, b in zip(out.x_hat.split(2), out.bits.split(2), strict=True)]
    loss = attacks[index].objective(Passes(x, parts[0], poisoned[index], parts[1 + index]), LMBDA)
    return loss.total, loss.terms


def test_vanilla_loss_is_equation_1(codec, x):
    codec.eval()
    with torch.no_grad():
        loss, _ = rate_distortion(codec, x, LMBDA)
        out = codec.net(x)
    bits = sum(-torch.log2(v).sum() for v in out["likelihoods"].values())
    expected = bits / (2 * 64 * 64) + LMBDA * 255**2 * ((out["x_hat"] - x) ** 2).mean()
    torch.testing.assert_close(loss, expected)
