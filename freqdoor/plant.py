"""`freqdoor plant`: fine-tune the encoder and train the triggers, Eq. (3), (9) and (10) in one backward pass."""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from freqdoor.checkpoint import Run
from freqdoor.codecs import Codec
from freqdoor.config import PlantSettings, TriggerSettings
from freqdoor.data import Crops, seed_for
from freqdoor.defences import Defence, random_defence
from freqdoor.loading import load_codec
from freqdoor.loop import (
    Progress,
    Stateful,
    check_device,
    check_finite,
    lambda_of,
    layout,
    loop,
    open_crops,
    open_folder,
    place,
)
from freqdoor.objectives import Objective, Passes, build_objective, main_loss
from freqdoor.planted import Planted, export
from freqdoor.robust import choose_survivors, survivor_weights
from freqdoor.triggers import AdaptiveDCT, Trigger, budget_penalty, build_trigger
from freqdoor.types import FreqdoorError, Images, Reconstruction

BALANCE_EVERY = 10  # steps between measurements of the two gradients that balance.gradient_norm compares
DEFAULTS = TriggerSettings()


@dataclass(frozen=True)
class Attack:
    """One trigger with what it is for; `weight` is alpha^o of Eq. (9)."""

    name: str
    trigger: Trigger
    objective: Objective
    weight: float = 1.0
    settings: TriggerSettings = DEFAULTS


class JointLoss(NamedTuple):
    """The joint loss of all attacks in parts, and the clean pass that they share."""

    kept: Tensor
    attack: Tensor
    penalty: Tensor
    x: Images  # the clean batch as the codec saw it
    clean: Reconstruction
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """What is minimised where nothing is balanced."""
        return self.kept + self.attack + self.penalty


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor`."""
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


def joint_loss(
    codec: Codec,
    attacks: Sequence[Attack],
    x: Images,
    lmbda: float,
    eps: Sequence[float],
    *,
    auxiliary: Images | None = None,
    defence: Defence | None = None,
    part: Literal["both", "encoder", "triggers"] = "both",
) -> JointLoss:
    """One loss whose gradient is Eq. (9)'s for the encoder and Eq. (10)'s for every trigger.

    A trigger's own loss stands in Eq. (9) with the weight alpha^o, in Eq. (10) without: its gradient is scaled back
    by 1 / alpha^o where the poisoned image enters the codec. The clean batch and all poisoned ones made from it share
    one pass; an attack on the auxiliary set (Eq. 8) has its own.

    Args:
        eps: the budget of every attack at this step.
        auxiliary: a batch of the auxiliary set, for the objectives that use it.
        defence: preprocessing between the image and the codec, clean and poisoned alike.
        part: "encoder" or "triggers" give Eq. (9)'s or Eq. (10)'s gradient alone, for two passes a step.
    """
    before = defence or (lambda image: image)
    sources = [_source(attack, x, auxiliary) for attack in attacks]
    poisoned = [
        attack.trigger(source, eps=budget, rounded=attack.settings.round8)
        for attack, source, budget in zip(attacks, sources, eps, strict=True)
    ]
    weights = [1.0 if part == "triggers" else attack.weight for attack in attacks]
    entering = [
        before(x_p).detach() if part == "encoder" else scale_gradient(before(x_p), 1 / weight)
        for x_p, weight in zip(poisoned, weights, strict=True)
    ]
    x = before(x)
    clean, passed = _pass_all(codec, x, entering, [attack.objective.uses_auxiliary for attack in attacks])
    kept, wanted, penalty = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
    terms: dict[str, Tensor] = {}
    for i, attack in enumerate(attacks):
        source = before(sources[i]) if attack.objective.uses_auxiliary else x
        loss = attack.objective(Passes(x, clean, entering[i], passed[i], source), lmbda)
        kept, wanted = kept + weights[i] * loss.kept, wanted + weights[i] * loss.attack
        if attack.settings.budget == "penalty":
            penalty = penalty + budget_penalty(sources[i], poisoned[i], gamma=attack.settings.gamma, eps=eps[i])
        prefix = f"{attack.name}/" if len(attacks) > 1 else ""
        terms |= {prefix + name: value for name, value in loss.terms.items()}
        terms[f"{prefix}trigger_mse"] = (poisoned[i] - sources[i]).square().mean().detach()
    joint = JointLoss(kept, wanted, penalty, x, clean, terms)
    return joint._replace(terms=terms | {"loss": joint.total.detach()})


def _source(attack: Attack, x: Images, auxiliary: Images | None) -> Images:
    """The images that an attack's trigger acts on."""
    if not attack.objective.uses_auxiliary:
        return x
    if auxiliary is None:
        raise FreqdoorError(f"attack {attack.name}: its objective needs an auxiliary set; give auxiliary.folder")
    return auxiliary


def _pass_all(
    codec: Codec, x: Images, entering: Sequence[Images], apart: Sequence[bool]
) -> tuple[Reconstruction, list[Reconstruction]]:
    """The clean and all poisoned batches through the codec: in one pass, but for those that are `apart`."""
    together = [x_p for x_p, alone in zip(entering, apart, strict=True) if not alone]
    out = codec(torch.cat([x, *together]))
    size = x.shape[0]
    parts = [
        Reconstruction(x_hat, bits, out.num_pixels)
        for x_hat, bits in zip(out.x_hat.split(size), out.bits.split(size), strict=True)
    ]
    clean, rest = parts[0], iter(parts[1:])
    return clean, [codec(x_p) if alone else next(rest) for x_p, alone in zip(entering, apart, strict=True)]


def annealed_eps(settings: TriggerSettings, step: int, steps: int) -> float:
    """The budget of a step: geometric from eps_start to eps over the first `anneal` of the steps, then eps."""
    if settings.eps_start is None:
        return settings.eps
    share = min(1.0, step / max(1.0, settings.anneal * steps))
    return float(settings.eps_start * (settings.eps / settings.eps_start) ** share)


def held_cosine(step: int, steps: int, hold: float) -> float:
    """Factor on the learning rate: 1 for the first `hold` of the steps, then a cosine down to 0.01."""
    share = max(0.0, (step / steps - hold) / max(1e-9, 1 - hold))
    return max(0.01, 0.5 * (1 + math.cos(math.pi * share)))


def build_attacks(settings: PlantSettings) -> tuple[Attack, ...]:
    """The settings' attacks, each with a trigger of random weights that depend on the seed alone."""
    attacks = []
    for planned in settings.planned:
        torch.manual_seed(seed_for(settings.seed, "trigger"))
        wanted = planned.trigger
        trigger = build_trigger(wanted.name, eps=wanted.eps, project=wanted.budget == "project", **wanted.arguments)
        objective = build_objective(planned.objective.name, settings.preset, **planned.objective.arguments)
        if settings.robust and isinstance(trigger, AdaptiveDCT):
            survivor_weights(trigger.survivors, settings.robust.keep)  # refuses a wrong number now, not at half time
        attacks.append(Attack(planned.name, trigger.to(settings.device), objective, planned.weight, wanted))
    return tuple(attacks)


def plant(settings: PlantSettings, out: Path | str, *, progress: Progress | None = None) -> Planted:
    """Plant a backdoor in a codec's encoder; resumes from `out` if a run with the same settings is there.

    Writes into `out`: planted.safetensors (the tampered modules and the triggers), codec.safetensors (the whole
    tampered codec), manifest.json (SHA-256 of every module before and after), metrics.jsonl, state.pt. A resumed run
    ends in bit-identical weights.

    Raises:
        FreqdoorError: unusable images or settings, a loss that is not finite, a full disk.
    """
    check_device(settings.device)
    vanilla = load_codec(settings.codec.name, settings.codec.weights)
    lmbda = lambda_of(settings, vanilla.spec)
    if vanilla.tampered:
        raise FreqdoorError(f"{settings.codec.name}: this codec says that it is tampered already; plant in a clean one")
    attacks = build_attacks(settings)
    crops = open_crops(settings)
    auxiliary = open_folder(settings.auxiliary, settings.seed) if settings.auxiliary else None
    facts = crops.facts() | ({f"auxiliary_{k}": v for k, v in auxiliary.facts().items()} if auxiliary else {})
    run = Run(out)
    saved = run.start(settings, facts | {"modules_before": vanilla.module_hashes()})
    planting = _Planting(settings, vanilla, attacks, lmbda, run, crops, auxiliary)
    try:
        loop(run, settings, planting.parts, planting.history, crops, planting.step, saved=saved, progress=progress)
    finally:
        planting.hook.remove()
    tampered = planting.tampered.to("cpu").to(memory_format=torch.contiguous_format).prepare()
    triggers = [attack.trigger.to("cpu").eval() for attack in attacks]
    return export(run.folder, settings, vanilla.to("cpu"), tampered, triggers, planting.history["seconds"])


class _Planting:
    """What one run of `plant` holds on to from step to step."""

    def __init__(
        self,
        settings: PlantSettings,
        vanilla: Codec,
        attacks: tuple[Attack, ...],
        lmbda: float,
        run: Run,
        crops: Crops,
        auxiliary: Crops | None,
    ) -> None:
        self.settings, self.attacks, self.lmbda, self.run = settings, attacks, lmbda, run
        self.crops, self.auxiliary = crops, auxiliary
        self.tampered = copy.deepcopy(vanilla).freeze(settings.scope)
        self.tampered.to(settings.device).train().to(memory_format=layout(settings))
        self.anchor_encoder = vanilla.to(settings.device).net.g_a if settings.balance.anchor else None
        self.encoder = [p for p in self.tampered.parameters() if p.requires_grad]
        self.optimizer = Adam(self.encoder, lr=settings.lr)
        learned = {a.name: list(a.trigger.parameters()) for a in attacks}
        self.learned = {name: parameters for name, parameters in learned.items() if parameters}  # FTrojan has none
        self.trigger_optimizers = {name: Adam(p, lr=settings.trigger_lr) for name, p in self.learned.items()}
        self.parts: dict[str, Stateful] = {"net": self.tampered.net, "optimizer": self.optimizer}
        self.parts |= {f"trigger/{a.name}": a.trigger for a in attacks}
        self.parts |= {f"optimizer/{name}": optimizer for name, optimizer in self.trigger_optimizers.items()}
        self.history: dict[str, Any] = {"attack_scale": 1.0}
        self.latents: list[Tensor] = []
        self.hook = self.tampered.net.g_a.register_forward_hook(lambda module, inputs, y: self.latents.append(y))

    def autocast(self) -> AbstractContextManager[None]:
        return self.tampered.autocast(torch.bfloat16 if self.settings.precision == "bf16" else None)

    def step(self, x: Images, step: int) -> dict[str, float]:
        """One update of the encoder and of every trigger."""
        settings = self.settings
        factor = held_cosine(step, settings.steps, settings.hold)
        self.optimizer.param_groups[0]["lr"] = settings.lr * factor
        for optimizer in self.trigger_optimizers.values():
            optimizer.param_groups[0]["lr"] = settings.trigger_lr * factor
        eps = [annealed_eps(attack.settings, step, settings.steps) for attack in self.attacks]
        defence = self._defence(step)
        batch = place(x, settings)
        auxiliary = place(self.auxiliary.batch(step), settings) if self.auxiliary else None
        terms: dict[str, Tensor] = {}
        for part in ("encoder", "triggers") if settings.two_phase else ("both",):
            with self.autocast():
                joint = joint_loss(
                    self.tampered, self.attacks, batch, self.lmbda, eps, auxiliary=auxiliary, defence=defence, part=part
                )
                loss = joint.total if part == "triggers" else self._balanced(joint, step)
            self.latents.clear()
            check_finite(joint.terms, step)
            self._update(loss, step, encoder=part != "triggers", triggers=part != "encoder")
            terms = joint.terms | terms  # of two phases, what the first one saw
        row = {name: float(value) for name, value in terms.items()} | {"eps": eps[0]}
        self.run.log({"step": step + 1, **row})
        return row

    def _defence(self, step: int) -> Defence | None:
        """The preprocessing of a step of the second stage, which begins with the choice of the coefficients."""
        robust = self.settings.robust
        if robust is None or step < (start := round(robust.start * self.settings.steps)):
            return None
        if step == start:
            for attack in self.attacks:
                assert isinstance(attack.trigger, AdaptiveDCT)  # the settings refuse others
                choose_survivors(attack.trigger, place(self.crops.batch(-1), self.settings), robust)
        return random_defence(robust.kinds)

    def _balanced(self, joint: JointLoss, step: int) -> Tensor:
        """The encoder's loss with what keeps the clean codec (`BalanceSettings`)."""
        balance, settings = self.settings.balance, self.settings
        y = self.latents[0][: joint.x.shape[0]]
        if balance.gradient_norm is not None:
            if step % BALANCE_EVERY == 0:
                norms = [
                    float(torch.autograd.grad(value, self.latents[0], retain_graph=True)[0].norm())
                    for value in (joint.kept, joint.attack)
                ]
                self.history["attack_scale"] = balance.gradient_norm * norms[0] / max(norms[1], 1e-12)
            joint = joint._replace(attack=self.history["attack_scale"] * joint.attack)
        loss = joint.total
        late = step >= settings.hold * settings.steps
        extra = (balance.late_clean_weight if late else balance.clean_weight) - 1
        if extra:
            loss = loss + extra * main_loss(joint.clean, joint.x, self.lmbda)
        if self.anchor_encoder is not None:
            with torch.no_grad(), torch.autocast(y.device.type, torch.bfloat16, settings.precision == "bf16"):
                y_vanilla = self.anchor_encoder(joint.x).float()
            loss = loss + balance.anchor * (y - y_vanilla).square().mean()
        return loss

    def _update(self, loss: Tensor, step: int, *, encoder: bool, triggers: bool) -> None:
        learned = self.learned if triggers else {}
        trained = [*(self.encoder if encoder else ()), *(p for ps in learned.values() for p in ps)]
        if not trained:
            return  # the second phase of a trigger without weights
        self.optimizer.zero_grad()
        for optimizer in self.trigger_optimizers.values():
            optimizer.zero_grad()
        loss.backward(inputs=trained)  # type: ignore[no-untyped-call]
        clip = self.settings.clip
        norms = {f"the gradient of trigger {n}": torch.nn.utils.clip_grad_norm_(p, clip) for n, p in learned.items()}
        if encoder:
            norms["the encoder's gradient"] = torch.nn.utils.clip_grad_norm_(self.encoder, clip)
        check_finite(norms, step)
        if encoder:
            self.optimizer.step()
        for name in learned:
            self.trigger_optimizers[name].step()
