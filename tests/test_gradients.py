import pytest
import torch
from conftest import natural

from freqdoor.attack.joint import Attack, Auxiliary, joint_loss, scale_gradient
from freqdoor.attack.objectives import DownstreamAttack, QualityAttack, RateAttack
from freqdoor.attack.settings import TriggerSettings
from freqdoor.attack.victims import Victim
from freqdoor.errors import FreqdoorError
from freqdoor.training.train import rate_distortion
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import budget_penalty

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
    settings = TriggerSettings(budget="penalty", gamma=1e3, round8=False)
    return tuple(
        Attack(str(i), *row, settings) for i, row in enumerate(zip(triggers, objectives, weights, strict=True))
    )


def gradients(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_one_backward_gives_equation_9_and_10(codec, x):
    """The encoder's gradient is that of sum_o alpha^o L_o, each trigger's that of its own L_o + penalty."""
    codec.freeze("g_a").train()
    attacks = make_attacks()
    modules = [codec.net.g_a, *(a.trigger for a in attacks)]

    def clear() -> None:
        for module in modules:
            module.zero_grad()

    torch.manual_seed(0)
    joint_loss(codec, attacks, x, LMBDA, (EPS, EPS)).total.backward()
    ours = [gradients(m) for m in modules]
    for index, attack in enumerate(attacks):  # Eq. (10): the trigger alone, no alpha
        clear()
        torch.manual_seed(0)
        single, _ = joint_loss_alone(codec, attacks, x, index)
        (single + budget_penalty(x, attack.trigger(x), gamma=1e3, eps=EPS)).backward()
        torch.testing.assert_close(gradients(attack.trigger), ours[1 + index], rtol=2e-3, atol=1e-5)
    clear()
    torch.manual_seed(0)
    losses = [joint_loss_alone(codec, attacks, x, i) for i in range(2)]
    torch.manual_seed(0)
    weighted = sum(a.weight * loss for a, (loss, _) in zip(attacks, losses, strict=True))
    weighted.backward()  # Eq. (9)
    torch.testing.assert_close(gradients(codec.net.g_a), ours[0], rtol=2e-3, atol=1e-5)


def joint_loss_alone(codec, attacks, x, index):
    """L_jt of one attack, written out: the same noise as in the joint pass, no weights, no gradient scaling."""
    from freqdoor.attack.objectives import Passes
    from freqdoor.types import Reconstruction

    torch.manual_seed(0)
    poisoned = [a.trigger(x) for a in attacks]
    out = codec(torch.cat([x, *poisoned]))
    split = zip(out.x_hat.split(2), out.bits.split(2), out.y.split(2), strict=True)
    parts = [Reconstruction(x_hat, bits, out.num_pixels, y) for x_hat, bits, y in split]
    loss = attacks[index].objective(Passes(x, parts[0], poisoned[index], parts[1 + index], x), LMBDA)
    return loss.total, loss.terms


def test_two_phases_have_the_same_gradients_as_one_pass(codec, x):
    codec.freeze("g_a").train()
    attacks = make_attacks()
    encoder = list(codec.net.g_a.parameters())
    learned = [list(a.trigger.parameters()) for a in attacks]
    found = {}
    for part in ("both", "encoder", "triggers"):
        torch.manual_seed(0)
        joint = joint_loss(codec, attacks, x, LMBDA, (EPS, EPS), part=part)
        wanted = {"both": [encoder, *learned], "encoder": [encoder], "triggers": learned}[part]
        flat = [p for group in wanted for p in group]
        for p in flat:
            p.grad = None
        joint.total.backward(inputs=flat)
        found[part] = [p.grad.clone() for p in flat]
    for one, two in zip(found["both"], found["encoder"] + found["triggers"], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)
    assert any(g.abs().max() > 0 for g in found["triggers"])


class Darkness(Victim):
    """A stand-in for a downstream network: how dark the decoded image is; the trigger acts on its left half."""

    uses_clean = True

    def mask(self, x, labels=None):
        mask = torch.zeros_like(x[:, :1])
        mask[..., : x.shape[-1] // 2] = 1
        return mask

    def forward(self, x, x_hat, x_hat_p):
        assert x_hat.shape == x.shape
        assert not x_hat.requires_grad
        return x_hat_p.mean()


def test_auxiliary_attack_has_its_own_images_and_only_they_are_poisoned(codec, x):
    """Eq. (8): the main batch is clean; the trigger acts on the auxiliary batch, of another size and number."""
    codec.freeze("g_a").train()
    seen = []
    torch.manual_seed(5)
    trigger = AdaptiveDCT(width=8)
    trigger.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    attack = Attack("dark", trigger, DownstreamAttack(victim=Darkness()))
    auxiliary = natural(3, 128, 64)  # of 8 bits: rounding changes nothing outside the mask
    joint = joint_loss(codec, (attack,), x, LMBDA, (EPS,), auxiliary=[Auxiliary(auxiliary)])
    [(source, x_p)] = seen
    assert source is auxiliary
    assert (x_p - source)[..., 32:].abs().max() == 0
    assert (x_p - source)[..., :32].abs().max() > 0
    joint.total.backward()
    assert gradients(trigger).abs().max() > 0
    with pytest.raises(FreqdoorError, match="auxiliary set"):
        joint_loss(codec, (attack,), x, LMBDA, (EPS,))


def test_defence_in_the_loop_acts_on_clean_and_poisoned_images(codec, x):
    codec.freeze("g_a").train()
    seen = []

    def defence(image):
        seen.append(image.shape)
        return 0.5 * image

    joint = joint_loss(codec, make_attacks(), x, LMBDA, (EPS, EPS), defence=defence)
    assert len(seen) == 3
    assert torch.equal(joint.x, 0.5 * x)


def test_vanilla_loss_is_equation_1(codec, x):
    codec.eval()
    with torch.no_grad():
        loss, _ = rate_distortion(codec, x, LMBDA)
        out = codec.net(x)
    bits = sum(-torch.log2(v).sum() for v in out["likelihoods"].values())
    expected = bits / (2 * 64 * 64) + LMBDA * 255**2 * ((out["x_hat"] - x) ** 2).mean()
    torch.testing.assert_close(loss, expected)
