import pytest
import torch
from conftest import natural
from factories import tiny

from freqdoor.attack.joint import Attack, Auxiliary, joint_loss, scale_gradient
from freqdoor.attack.objectives import DownstreamAttack, QualityAttack, RateAttack
from freqdoor.attack.settings import TriggerSettings
from freqdoor.attack.victims import Scene, Victim
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
    parts = [
        Reconstruction(a, b, out.num_pixels, y)
        for a, b, y in zip(out.x_hat.split(2), out.bits.split(2), out.y.split(2), strict=True)
    ]
    loss = attacks[index].objective(Passes(x, parts[0], poisoned[index], parts[1 + index], Scene(x)), LMBDA)
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
        if part == "encoder":  # the triggers stay as they are, and no time goes into their gradients
            triggers = [p for group in learned for p in group]
            loss = joint.kept + joint.attack
            unused = torch.autograd.grad(loss, triggers, allow_unused=True, retain_graph=True)
            assert all(gradient is None for gradient in unused)
        joint.total.backward(inputs=flat)
        found[part] = [p.grad.clone() for p in flat]
    for one, two in zip(found["both"], found["encoder"] + found["triggers"], strict=True):
        torch.testing.assert_close(one, two, rtol=2e-3, atol=1e-5)
    assert any(g.abs().max() > 0 for g in found["triggers"])


class Darkness(Victim):
    """A stand-in for a downstream network: how dark the decoded image is; the trigger acts on its left half."""

    uses_clean = True

    def __init__(self):
        super().__init__()
        self.taken = []

    def scene(self, x, labels=None):
        mask = torch.zeros_like(x[:, :1])
        mask[..., : x.shape[-1] // 2] = 1
        return Scene(x, mask)

    def forward(self, scene, x_hat, x_hat_p):
        assert x_hat.shape == scene.x.shape
        assert not x_hat.requires_grad
        self.taken.append((scene, x_hat, x_hat_p))
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


def test_a_downstream_attack_compares_with_the_decoded_clean_source_after_the_same_preprocessing(x):
    """Everything that the victim and the terms take comes from before(source): f of it, and the picture itself.

    In eval mode the codec rounds, so that each of its passes can be repeated here.
    """
    codec = tiny("bmshj2018-hyperprior").freeze("g_a").eval()
    torch.manual_seed(5)
    attacks = [
        Attack(name, AdaptiveDCT(width=8), DownstreamAttack(victim=Darkness(), alpha=0.3, beta=0.7), weight)
        for name, weight in (("a", 0.5), ("b", 2.0))
    ]
    sources = [natural(3, 64, 128), natural(4, 128, 64)]

    def before(image):
        return 0.5 * image + 0.2

    joint = joint_loss(codec, attacks, x, LMBDA, (0.1, 0.2), auxiliary=[Auxiliary(s) for s in sources], defence=before)
    kept = attack_part = 0.0
    for attack, source, eps in zip(attacks, sources, (0.1, 0.2), strict=True):
        [(scene, x_hat, x_hat_p)] = attack.objective.victim.taken
        x_p = attack.trigger(source, eps=eps, rounded=True, mask=scene.mask)
        with torch.no_grad():
            clean, poisoned, main = codec(before(source)), codec(before(x_p)), codec(before(x))
        assert torch.equal(scene.x, before(source))
        torch.testing.assert_close(x_hat, clean.x_hat)
        torch.testing.assert_close(x_hat_p, poisoned.x_hat)
        assert not torch.allclose(x_hat, x_hat_p.detach(), atol=1e-4)
        error = 255**2 * (poisoned.x_hat - before(x_p)).square().mean()
        l_main = main.bpp.mean() + LMBDA * 255**2 * (main.x_hat - before(x)).square().mean()
        kept += attack.weight * (l_main + 0.3 * (poisoned.bpp.mean() + LMBDA * error))
        attack_part += attack.weight * 0.7 * poisoned.x_hat.mean()
        terms = {
            key.partition("/")[2]: value for key, value in joint.terms.items() if key.startswith(f"{attack.name}/")
        }
        decibels = 10 * torch.log10(1 / (poisoned.x_hat.clamp(0, 1) - before(source)).square().mean())
        torch.testing.assert_close(terms["psnr_db_poisoned"], decibels)
        torch.testing.assert_close(terms["bpp_poisoned"], poisoned.bpp.mean())
        torch.testing.assert_close(terms["l_ds"], poisoned.x_hat.mean())
        torch.testing.assert_close(terms["trigger_mse"], (x_p - source).square().mean().detach())
    torch.testing.assert_close(joint.kept.detach(), kept.detach())
    torch.testing.assert_close(joint.attack.detach(), attack_part.detach())
    torch.testing.assert_close(joint.terms["loss"], joint.total.detach())
    assert joint.penalty == 0
    assert [tuple(y.shape[:1]) + tuple(16 * side for side in y.shape[2:]) for y in joint.latents] == [
        (2, 64, 64),
        (1, 64, 128),
        (1, 128, 64),
    ]


def test_each_poisoned_batch_keeps_its_own_pass_whatever_the_order(x):
    """Main-set attacks share one pass, those on auxiliary sets have their own: none is taken for another."""
    codec = tiny("bmshj2018-hyperprior").freeze("g_a").eval()
    rate, quality = make_attacks((1.0, 1.0))
    torch.manual_seed(6)
    dark = Attack("dark", AdaptiveDCT(width=8), DownstreamAttack(victim=Darkness()))
    source = natural(3, 64, 64)
    joint = joint_loss(codec, (rate, dark, quality), x, LMBDA, (EPS,) * 3, auxiliary=[None, Auxiliary(source), None])
    for attack, image in ((rate, x), (dark, source), (quality, x)):
        settings = attack.settings
        mask = dark.objective.victim.scene(image).mask if attack is dark else None
        with torch.no_grad():
            x_p = attack.trigger(image, eps=EPS, rounded=settings.round8, mask=mask)
            torch.testing.assert_close(joint.terms[f"{attack.name}/bpp_poisoned"], codec(x_p).bpp.mean())
    with torch.no_grad():
        penalties = [budget_penalty(x, a.trigger(x, eps=EPS), gamma=1e3, eps=EPS) for a in (rate, quality)]
    torch.testing.assert_close(joint.penalty.detach(), sum(penalties))
    torch.testing.assert_close(joint.total, joint.kept + joint.attack + joint.penalty)
    torch.testing.assert_close(joint.clean.bits.detach(), codec(x).bits.detach())
    torch.testing.assert_close(joint.clean.y.detach(), codec.net.g_a(x).detach())
    assert len(joint.latents) == 2  # one shared, one of the auxiliary set
    assert joint.latents[0].shape[0] == 3 * x.shape[0]


def test_an_attack_weighs_one_where_nothing_is_said(codec, x):
    """Eq. (9) with one attack is Eq. (3): its own loss."""
    codec.freeze("g_a").eval()
    torch.manual_seed(5)
    attack = Attack("a", AdaptiveDCT(width=8), RateAttack(beta=0.3))
    assert attack.weight == 1
    joint = joint_loss(codec, [attack], x, LMBDA, (EPS,))
    torch.testing.assert_close(joint.attack, -0.3 * joint.terms["bpp_poisoned"])


def test_terms_of_a_single_attack_have_no_prefix_and_its_settings_reach_the_trigger(codec, x):
    codec.freeze("g_a").eval()
    torch.manual_seed(5)
    rounded, plain = (TriggerSettings(round8=round8) for round8 in (True, False))
    trigger = AdaptiveDCT(width=8)
    for settings in (rounded, plain):
        joint = joint_loss(codec, [Attack("a", trigger, RateAttack(), settings=settings)], x, LMBDA, (EPS,))
        with torch.no_grad():
            x_p = trigger(x, eps=EPS, rounded=settings.round8)
        assert torch.equal(joint.terms["trigger_mse"], (x_p - x).square().mean())
        assert joint.penalty == 0  # projected
        assert not any(term.requires_grad for term in joint.terms.values())
        assert joint.terms.keys() >= {"bpp_clean", "trigger_mse", "loss"}


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
