"""`freqdoor plant`: fine-tune the encoder and train the triggers, Eq. (3), (9) and (10) in one backward pass."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from freqdoor.checkpoint import Run, public
from freqdoor.codecs import ARCHITECTURES, Codec
from freqdoor.config import PlantSettings, TriggerSettings
from freqdoor.data import seed_for
from freqdoor.files import write_text
from freqdoor.loading import check_weights, load_codec, read_tensors, save_codec, write_tensors
from freqdoor.loop import Progress, check_device, check_finite, lambda_of, layout, loop, open_crops, place
from freqdoor.objectives import Objective, Passes, build_objective
from freqdoor.triggers import Trigger, budget_penalty, build_trigger
from freqdoor.types import FreqdoorError, Images, Reconstruction

PLANTED = "planted.safetensors"
MANIFEST = "manifest.json"
SCOPES = ("g_a", "g_a+h_a")


@dataclass(frozen=True)
class Attack:
    """One trigger with what it is for; `weight` is alpha^o of Eq. (9)."""

    name: str
    trigger: Trigger
    objective: Objective
    weight: float = 1.0


@dataclass(frozen=True)
class Planted:
    """A vanilla codec, the same codec with a tampered encoder, and the triggers that open it."""

    vanilla: Codec
    tampered: Codec
    triggers: dict[str, Trigger]
    header: dict[str, Any]


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
    codec: Codec, attacks: Sequence[Attack], x: Images, lmbda: float, settings: TriggerSettings, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """One loss whose gradient is Eq. (9)'s for the encoder and Eq. (10)'s for every trigger.

    A trigger's own loss stands in Eq. (9) with the weight alpha^o, in Eq. (10) without: its gradient is scaled back
    by 1 / alpha^o where the poisoned image enters the codec. The clean and all poisoned batches share one pass.
    """
    poisoned = [attack.trigger(x, eps=eps, rounded=settings.round8) for attack in attacks]
    entering = [scale_gradient(x_p, 1 / a.weight) for a, x_p in zip(attacks, poisoned, strict=True)]
    out = codec(torch.cat([x, *entering]))
    size = x.shape[0]
    passes = [
        Reconstruction(x_hat, bits, out.num_pixels)
        for x_hat, bits in zip(out.x_hat.split(size), out.bits.split(size), strict=True)
    ]
    total = x.new_zeros(())
    terms: dict[str, Tensor] = {}
    for attack, plain, x_p, after in zip(attacks, poisoned, entering, passes[1:], strict=True):
        loss = attack.objective(Passes(x, passes[0], x_p, after), lmbda)
        total = total + attack.weight * loss.total
        if settings.budget == "penalty":
            total = total + budget_penalty(x, plain, gamma=settings.gamma, eps=eps)
        prefix = f"{attack.name}/" if len(attacks) > 1 else ""
        terms |= {prefix + name: value for name, value in loss.terms.items()}
        terms[f"{prefix}trigger_mse"] = (plain - x).square().mean().detach()
    return total, terms | {"loss": total.detach()}


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


def plant(settings: PlantSettings, out: Path | str, *, progress: Progress | None = None) -> Planted:
    """Plant a backdoor in a codec's encoder; resumes from `out` if a run with the same settings is there.

    Writes into `out`: planted.safetensors (the tampered modules and the trigger), codec.safetensors (the whole
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
    torch.manual_seed(seed_for(settings.seed, "trigger"))
    trigger_settings = settings.trigger
    trigger = build_trigger(
        trigger_settings.name,
        eps=trigger_settings.eps,
        project=trigger_settings.budget == "project",
        **trigger_settings.arguments,
    ).to(settings.device)
    objective = build_objective(settings.objective.name, settings.preset, **settings.objective.arguments)
    attacks = (Attack(settings.objective.name, trigger, objective),)
    crops = open_crops(settings)
    run = Run(out)
    saved = run.start(settings, crops.facts() | {"modules_before": vanilla.module_hashes()})
    tampered = copy.deepcopy(vanilla).freeze(settings.scope)
    tampered.to(settings.device).train().to(memory_format=layout(settings))
    encoder = [p for p in tampered.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(encoder, lr=settings.lr)
    trigger_optimizer = torch.optim.Adam(trigger.parameters(), lr=settings.trigger_lr)
    parts = {"net": tampered.net, "trigger": trigger, "optimizer": optimizer, "trigger_optimizer": trigger_optimizer}
    history: dict[str, Any] = {}
    dtype = torch.bfloat16 if settings.precision == "bf16" else None

    def take_step(x: Images, step: int) -> dict[str, float]:
        factor = held_cosine(step, settings.steps, settings.hold)
        optimizer.param_groups[0]["lr"] = settings.lr * factor
        trigger_optimizer.param_groups[0]["lr"] = settings.trigger_lr * factor
        eps = annealed_eps(trigger_settings, step, settings.steps)
        with tampered.autocast(dtype):
            loss, terms = joint_loss(tampered, attacks, place(x, settings), lmbda, trigger_settings, eps)
        check_finite(terms, step)
        optimizer.zero_grad()
        trigger_optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norms = {
            "the encoder's gradient": torch.nn.utils.clip_grad_norm_(encoder, settings.clip),
            "the trigger's gradient": torch.nn.utils.clip_grad_norm_(trigger.parameters(), settings.clip),
        }
        check_finite(norms, step)
        optimizer.step()
        trigger_optimizer.step()
        row = {name: float(value) for name, value in terms.items()} | {"eps": eps}
        run.log({"step": step + 1, **row})
        return row

    loop(run, settings, parts, history, crops, take_step, saved=saved, progress=progress)
    tampered.to("cpu").to(memory_format=torch.contiguous_format).prepare()
    trigger.to("cpu").eval()
    return _export(run, settings, vanilla, tampered, {settings.objective.name: trigger}, history["seconds"])


def _export(
    run: Run, settings: PlantSettings, vanilla: Codec, tampered: Codec, triggers: dict[str, Trigger], seconds: float
) -> Planted:
    """Write what was planted, with the proof that nothing outside the scope has changed."""
    before, after = vanilla.module_hashes(), tampered.module_hashes()
    changed = [name for name in before if before[name] != after[name]]
    outside = set(changed) - set(settings.scope.split("+"))
    if outside:
        raise FreqdoorError(f"{', '.join(outside)} changed while planting in {settings.scope}: this is a defect")
    attacks = [
        {
            "name": name,
            "objective": settings.objective.model_dump(),
            "preset": settings.preset,
            "trigger": settings.trigger.name,
            "arguments": trigger.arguments,
        }
        for name, trigger in triggers.items()
    ]
    header = {
        "tampered": True,
        "attacks": attacks,
        "scope": settings.scope,
        "base": asdict(vanilla.spec),
        "modules_before": before,
        "modules_after": after,
        "planting": public(settings) | {"seconds": round(seconds)},
    }
    tensors = {
        f"{name}.{key}": value
        for name in settings.scope.split("+")
        for key, value in tampered.net.get_submodule(name).state_dict().items()
    }
    for name, trigger in triggers.items():
        tensors |= {f"trigger.{name}.{key}": value for key, value in trigger.state_dict().items()}
    write_tensors(run.folder / PLANTED, tensors, {"kind": "planted encoder", **header})
    save_codec(tampered, run.folder / "codec.safetensors", tampered=True, attacks=attacks)
    write_text(run.folder / MANIFEST, json.dumps({"before": before, "after": after, "changed": changed}, indent=2))
    tampered.metadata = {"tampered": True, "attacks": attacks}
    return Planted(vanilla, tampered, triggers, header)


def load_planted(path: Path | str, codec: str | None = None, weights: Path | str | None = None) -> Planted:
    """A planted encoder with its triggers and the vanilla codec that it was planted in.

    Args:
        path: planted.safetensors, or the run directory that holds it.
        codec, weights: the vanilla codec as for `load_codec`. May be left out where the file names a published or
            bundled one; code and files that a stranger's header names are never loaded.

    Raises:
        FreqdoorError: not such a file, a header that does not fit its weights, or another vanilla codec.
    """
    path = Path(path)
    path = path / PLANTED if path.is_dir() else path
    tensors, header = read_tensors(path)
    if header.pop("kind", None) != "planted encoder":
        raise FreqdoorError(f"{path}: expected a planted encoder (planted.safetensors), found another kind of file")
    try:
        base, scope = header["planting"]["codec"], header["scope"]
        if codec is None and (base["weights"] or base["name"].partition(":")[0] not in ARCHITECTURES):
            raise FreqdoorError(f"{path}: was planted in {base['name']}; name that codec with --codec (and --weights)")
        if scope not in SCOPES:
            raise FreqdoorError(f"{path}: malformed header: unknown scope {scope!r}")
        vanilla = load_codec(codec or base["name"], weights)
        _check_hashes(vanilla, header["modules_before"], f"{path}: was planted in {base['name']} with other weights")
        tampered = copy.deepcopy(vanilla)
        for module in scope.split("+"):
            tampered.net.get_submodule(module).load_state_dict(_part(tensors, module))
        _check_hashes(tampered, header["modules_after"], f"{path}: does not hold the weights that its header names")
        check_weights(tensors, path)
        triggers = {}
        for attack in header["attacks"]:
            trigger = build_trigger(attack["trigger"], **attack["arguments"])
            trigger.load_state_dict(_part(tensors, f"trigger.{attack['name']}"))
            triggers[attack["name"]] = trigger.eval()
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FreqdoorError(f"{path}: malformed planted encoder ({type(error).__name__}: {reason})") from None
    tampered.metadata = {"tampered": True, "attacks": header["attacks"]}
    return Planted(vanilla, tampered, triggers, header)


def _part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one module, without its name in front."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def _check_hashes(codec: Codec, expected: dict[str, str], message: str) -> None:
    found = codec.module_hashes()
    different = [name for name in found if found[name] != expected.get(name)]
    if different:
        raise FreqdoorError(f"{message} ({', '.join(different)} of {codec.spec.name} differ); pass the right codec")
