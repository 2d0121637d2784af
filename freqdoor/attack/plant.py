"""`freqdoor plant`: fine-tune the encoder and train the triggers with the joint loss."""

import contextlib
import copy
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam

from freqdoor.attack.evasion import Evasion
from freqdoor.attack.joint import TRIGGER_MSE, Attack, Auxiliary, JointLoss, Part, joint_loss
from freqdoor.attack.objectives import DownstreamAttack, QualityAttack, RateAttack, build_objective, main_loss
from freqdoor.attack.planted import MANIFEST, PLANTED, Planted, export, load_planted, load_triggers
from freqdoor.attack.presence import check_presence
from freqdoor.attack.robust import choose_survivors, second_stage, survivor_weights
from freqdoor.attack.settings import OBJECTIVES, PlantSettings, TriggerSettings
from freqdoor.attack.victims import Scene
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec
from freqdoor.codecs.sides import SIDE
from freqdoor.data import Crops, seed_for
from freqdoor.errors import FreqdoorError, Mistakes
from freqdoor.lock import check_folder, holding
from freqdoor.preprocessing import Preprocessing
from freqdoor.training.estimates import BATCHES, fitting_lambda, step_size
from freqdoor.training.group import ALONE, Group
from freqdoor.training.loop import (
    Progress,
    Stateful,
    check_device,
    check_finite,
    loop,
    open_crops,
    open_folder,
    place,
    place_codec,
)
from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.processes import Share, check_processes, first_rank, together
from freqdoor.training.run import Run
from freqdoor.training.settings import ImageSettings
from freqdoor.training.trackers import check_trackers
from freqdoor.training.train import EXPORT, decoded
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.build import build_trigger
from freqdoor.types import Images

CAUGHT = {"bits": 2.6, "quality": 10.0}  # from which an attack is there: doublings of the rate, dB lost
LOST = {"bits": 1.3, "quality": 3.0}  # below which it is there no more
SAFE = {"bits": (3.0, 3.8), "quality": (18.0, 24.0)}  # between which the late weight of clean images comes in
FRESH = 0.3  # share of the last batch in what is compared with these
BACK, FURTHEST, LAST_BACK = 4, 0.3, 0.75  # steps that the budget goes back at a time; at most, and up to, shares of all
TRIED, LEAST_TRIED = 0.15, 20  # share of the budget's way, and steps, after which an attack is to have taken
TAKEN = {"bits": 0.14, "quality": 4.0}  # what it is to have done by then: doublings of the rate, dB lost
BALANCE_EVERY = 10  # steps between measurements of the two gradients that balance.gradient_norm compares


def annealed_eps(settings: TriggerSettings, step: int, steps: int) -> float:
    """The budget of a step: geometric from eps_start to eps over the first `anneal` of the steps, then eps."""
    if settings.eps_start is None:
        return settings.eps
    share = min(1.0, step / max(1.0, settings.anneal * steps))
    return float(settings.eps_start * (settings.eps / settings.eps_start) ** share)


def effect_of(row: Mapping[str, float], prefix: str, success: str) -> float | None:
    """What a trigger does to a batch: doublings of the rate, or dB lost, as its objective wants; else None.

    Args:
        row: the terms of a step.
        prefix: of the attack's own terms.
    """
    if success == "bits":
        return math.log2(row[f"{prefix}bpp_poisoned"] / row[f"{prefix}bpp_clean"])
    if success == "quality":
        return row[f"{prefix}psnr_db_clean"] - row[f"{prefix}psnr_db_poisoned"]
    return None


def _nothing_yet() -> dict[str, Any]:
    """What `_retreat` keeps in a run's history, where no step has been taken."""
    return {"effects": {}, "caught": [], "retreated": 1.0, "back": 0}


def held_cosine(step: int, steps: int, hold: float) -> float:
    """Factor on the learning rate: 1 for the first `hold` of the steps, then a cosine down to 0.01."""
    share = max(0.0, (step / steps - hold) / max(1e-9, 1 - hold))
    return max(0.01, 0.5 * (1 + math.cos(math.pi * share)))


def build_attacks(settings: PlantSettings, multiple: int = SIDE) -> tuple[Attack, ...]:
    """The settings' attacks, each with a trigger of random weights that depend on the seed alone.

    Args:
        multiple: what the codec pads to, so that triggers and latents stay aligned.
    """
    dtype = dtype_of(settings.precision, settings.device)
    attacks, mistakes = [], Mistakes()
    for planned in settings.planned:
        chosen = planned.trigger
        with mistakes:
            torch.manual_seed(seed_for(settings.seed, "trigger"))
            fixed = {"eps": chosen.eps, "project": chosen.budget == "project", "multiple": multiple}
            trigger = build_trigger(chosen.name, **fixed, **chosen.arguments)
            if settings.robust and isinstance(trigger, AdaptiveDCT):
                survivor_weights(trigger.survivors, settings.robust.keep)  # refuses a wrong number now, not later
        with mistakes:
            objective = build_objective(planned.objective.name, settings.preset, **planned.objective.arguments)
            if isinstance(objective, DownstreamAttack):
                objective.victim.to(settings.device).run_in(dtype)
        if not mistakes.found:
            attacks.append(Attack(planned.name, trigger.to(settings.device), objective, planned.weight, chosen))
    mistakes.stop()
    return tuple(attacks)


def open_auxiliary(settings: PlantSettings) -> list[Crops | None]:
    """The auxiliary set of every attack that uses one; attacks with the same settings share it."""
    sets = [
        (attack.auxiliary or settings.auxiliary) if attack.objective.uses_auxiliary else None
        for attack in settings.planned
    ]
    opened, mistakes = {}, Mistakes()
    for key in filter(None, dict.fromkeys(sets)):
        with mistakes:
            opened[key] = open_folder(key, settings.seed)
    mistakes.stop()
    return [opened[key] if key else None for key in sets]


def plant(
    settings: PlantSettings, out: Path | str, *, devices: int = 1, nodes: int = 1, progress: Progress | None = None
) -> Planted:
    """Plant a backdoor in a codec's encoder; resumes from `out` if a run with the same settings is there.

    Writes into `out`: planted.safetensors (the tampered modules and the triggers), codec.safetensors (the whole
    tampered codec), manifest.json (SHA-256 of every module before and after), metrics.jsonl, state.pt. A resumed run
    ends in bit-identical weights.

    Args:
        devices: processes on this machine that share every batch, each with a GPU or its part of the processor.
        nodes: machines that do so together, with MASTER_ADDR and NODE_RANK in their environment; the first one writes.

    Raises:
        FreqdoorError: unusable images or settings, all at once; another process in the folder, a trigger that has
            nothing to act on or never acted, a loss that is not finite, a full disk, a process that is gone.
    """
    mistakes = Mistakes()
    with mistakes:
        check_folder(out)
    with mistakes:
        check_processes(devices, nodes, settings.device, [pictures.batch_size for pictures in _image_sets(settings)])
    writes = not mistakes.found and first_rank(devices, nodes) == 0
    with holding(out, "plant") if writes else contextlib.nullcontext():
        opened = _opened(settings, mistakes)
        run = Run(out, [PLANTED, EXPORT, MANIFEST]) if writes else None
        facts = _facts(settings, opened.vanilla, opened.crops, opened.auxiliary, opened.closed)
        saved = run.start(settings, facts | {"processes": devices * nodes}) if run else None
        with together(partial(_prepared, settings), devices, nodes, settings.device) as group:
            planting = _planted(settings, opened, group, run, saved, progress)
        planting.check_acted()
        tampered = planting.tampered.to("cpu").to(memory_format=torch.contiguous_format).prepare()
        tampered.precision = torch.float32
        triggers = [attack.trigger.to("cpu").eval() for attack in planting.attacks]
        with contextlib.ExitStack() as aside:  # where another machine writes, the files here are nobody's
            folder = run.folder if run else Path(aside.enter_context(tempfile.TemporaryDirectory(prefix="freqdoor-")))
            return export(folder, settings, opened.vanilla.to("cpu"), tampered, triggers, planting.history)


def _image_sets(settings: PlantSettings) -> list[ImageSettings]:
    """Where the pictures of all batches come from."""
    auxiliary = [a.auxiliary or settings.auxiliary for a in settings.planned if a.objective.uses_auxiliary]
    closed = settings.evade.closed if settings.evade else None
    return [pictures for pictures in (settings.images, *auxiliary, closed) if pictures is not None]


def _prepared(settings: PlantSettings) -> Share:
    """What another process of the group does, which writes nothing."""
    return partial(_planted, settings, _opened(settings, Mistakes()))


def _planted(
    settings: PlantSettings,
    opened: "_Opened",
    group: Group,
    run: Run | None = None,
    saved: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> "_Planting":
    """Take all steps that are left."""
    vanilla, attacks, earlier, crops, auxiliary, closed = opened
    planting = _Planting(settings, vanilla, attacks, run, crops, auxiliary, closed, group)
    if earlier:
        planting.tampered.net.load_state_dict(earlier.tampered.net.state_dict())
        _take_over(earlier.triggers, attacks, "start_from")
    options: dict[str, Any] = {"saved": saved, "progress": progress, "shown": planting.shown, "group": group}
    with group.sharing(planting.tampered, [attack.trigger for attack in attacks]):
        loop(run, settings, planting.parts, planting.history, crops, planting.step, **options)
    return planting


class _Opened(NamedTuple):
    """What a planting's settings name, opened."""

    vanilla: Codec
    attacks: tuple[Attack, ...]
    earlier: Planted | None
    crops: Crops
    auxiliary: list[Crops | None]
    closed: Crops | None


def _opened(settings: PlantSettings, mistakes: Mistakes) -> _Opened:
    """Open everything that the settings name, or raise all that is wrong with it and the `mistakes` so far."""
    multiple, usable = SIDE, settings
    with mistakes:
        check_trackers(settings.log)
    try:
        check_device(settings.device)
    except FreqdoorError as error:
        mistakes.found.append(str(error))
        usable = settings.model_copy(update={"device": "cpu"})  # on which the rest can be tried
    with mistakes:
        vanilla = _open_vanilla(settings)
        multiple = vanilla.multiple
    with mistakes:
        attacks = build_attacks(usable, multiple)
        if settings.triggers_from:
            taken = load_triggers(settings.triggers_from)
            if lacking := [attack.name for attack in attacks if attack.name not in taken]:
                raise FreqdoorError(
                    f"triggers_from: it has {', '.join(taken)}, and none that is called {', '.join(lacking)}; call the "
                    "attacks as they are called there"
                )
            _take_over(taken, attacks, "triggers_from")
    with mistakes:
        earlier = _open_earlier(settings)
    with mistakes:
        crops = open_crops(settings)
    with mistakes:
        auxiliary = open_auxiliary(settings)
    with mistakes:
        closed = open_folder(settings.evade.closed, settings.seed) if settings.evade and settings.evade.closed else None
    mistakes.stop()
    for attack, pictures in zip(attacks, auxiliary, strict=True):
        if attack.victim and pictures:
            with mistakes:
                check_presence(attack.name, attack.victim, pictures, settings.device)
    mistakes.stop()
    return _Opened(vanilla, attacks, earlier, crops, auxiliary, closed)


def _open_earlier(settings: PlantSettings) -> Planted | None:
    """The planted encoder to go on from, if there is to be one."""
    if not settings.start_from:
        return None
    return load_planted(settings.start_from, settings.codec.name, settings.codec.weights)


def _open_vanilla(settings: PlantSettings) -> Codec:
    """The codec to plant in, which has to be a clean one."""
    source = settings.codec
    vanilla = load_codec(source.name, source.weights, multiple=source.multiple)
    if vanilla.tampered:
        raise FreqdoorError(f"{source.name}: this codec says that it is tampered already; plant in a clean one")
    return vanilla


def _facts(
    settings: PlantSettings, vanilla: Codec, crops: Crops, auxiliary: Sequence[Crops | None], closed: Crops | None
) -> dict[str, Any]:
    """What the weights depend on besides the settings: pictures, the vanilla codec, the precision."""
    facts: dict[str, Any] = dict(crops.facts())
    for i, pictures in enumerate(dict.fromkeys(filter(None, auxiliary))):
        facts |= {f"auxiliary{i or ''}_{key}": value for key, value in pictures.facts().items()}
    if closed:
        facts |= {f"closed_{key}": value for key, value in closed.facts().items()}
    precision = precision_name(dtype_of(settings.precision, settings.device))
    return facts | {"precision": precision, "modules_before": vanilla.module_hashes()}


def _take_over(triggers: Mapping[str, Trigger], attacks: Sequence[Attack], setting: str) -> None:
    """Give the attacks an earlier planting's triggers of the same names; `setting` named it."""
    for attack in attacks:
        if attack.name in triggers:
            try:
                attack.trigger.load_state_dict(triggers[attack.name].state_dict())
            except RuntimeError:
                raise FreqdoorError(
                    f"{setting}: its trigger {attack.name} is of another kind than {attack.settings.name} with the "
                    "settings' arguments; give both the same"
                ) from None


class _Planting:
    """What one run of `plant` holds on to from step to step."""

    def __init__(
        self,
        settings: PlantSettings,
        vanilla: Codec,
        attacks: tuple[Attack, ...],
        run: Run | None,
        crops: Crops,
        auxiliary: Sequence[Crops | None],
        closed: Crops | None = None,
        group: Group = ALONE,
    ) -> None:
        self.settings, self.attacks, self.run, self.group = settings, attacks, run, group
        self.crops, self.auxiliary, self.closed = crops, auxiliary, closed
        self.tampered = copy.deepcopy(vanilla).freeze(settings.scope)
        place_codec(self.tampered, settings)
        self.tampered.precision = dtype_of(settings.precision, settings.device)
        self.anchor_encoder = vanilla.to(settings.device).part("g_a") if settings.balance.anchor else None
        self.encoder = [p for p in self.tampered.parameters() if p.requires_grad]
        batches = (place(crops.batch(-1 - i), settings) for i in range(BATCHES))
        lmbda = fitting_lambda(settings, self.tampered, batches)
        lr = settings.lr or step_size(self.tampered, self.encoder, place(crops.batch(-1), settings), lmbda)
        self.history: dict[str, Any] = {"attack_scale": 1.0, "acted": [], "lmbda": lmbda, "lr": lr}
        self.history |= _nothing_yet()
        self.history |= {"opened": [], "begun": 0}  # by `_start_over`
        self.optimizer = Adam(self.encoder, lr=lr)
        learned = {a.name: list(a.trigger.parameters()) for a in attacks if not settings.triggers_from}
        self.learned = {name: parameters for name, parameters in learned.items() if parameters}  # FTrojan has none
        self.trigger_optimizers = {name: Adam(p, lr=settings.trigger_lr) for name, p in self.learned.items()}
        self.parts: dict[str, Stateful] = {"net": self.tampered.net, "optimizer": self.optimizer}
        self.parts |= {f"trigger/{a.name}": a.trigger for a in attacks}
        self.parts |= {f"optimizer/{name}": optimizer for name, optimizer in self.trigger_optimizers.items()}
        self.evasion = None
        if settings.evade:
            self.evasion = Evasion(settings.evade, vanilla.multiple, settings.device)
            self.parts |= self.evasion.parts
        self.success = {planned.name: OBJECTIVES[planned.objective.name].success for planned in settings.planned}
        self.tried = self._steps_to_try()
        unused = {name: part.state_dict() for name, part in self.parts.items()} if self.tried else {}
        self.unused = copy.deepcopy(unused)  # what `_start_over` goes back to

    @property
    def lmbda(self) -> float:
        """Lambda of the run, in which it does not change."""
        return float(self.history["lmbda"])

    @property
    def _behind(self) -> int:
        """Steps that the budget is behind those of the run."""
        return int(self.history["back"] + self.history["begun"])

    def step(self, x: Images, step: int) -> dict[str, float]:
        """One update of the encoder and of every trigger."""
        settings = self.settings
        factor = held_cosine(step, settings.steps, settings.hold)
        since = step - self.history["begun"]
        warmth = min(1.0, (since + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        self.optimizer.param_groups[0]["lr"] = self.history["lr"] * factor * warmth * self.history["retreated"]
        for optimizer in self.trigger_optimizers.values():
            optimizer.param_groups[0]["lr"] = settings.trigger_lr * factor
        eps = [annealed_eps(a.settings, step - self._behind, settings.steps) for a in self.attacks]
        defence = self._defence(step)
        batch = place(x, settings)
        auxiliary = self._auxiliary(step)
        closed = self._batch(self.closed, step) if self.closed else None
        terms: dict[str, Tensor] = {}
        parts: tuple[Part, ...] = ("encoder", "triggers") if settings.two_phase else ("both",)
        for part in parts:
            joint = joint_loss(
                self.tampered,
                self.attacks,
                batch,
                self.lmbda,
                eps,
                auxiliary=auxiliary,
                defence=defence,
                part=part,
                opened=self.history["opened"],
            )
            loss = joint.total if part == "triggers" else self._balanced(joint, step)
            seen = joint.terms
            if self.evasion:
                added, more = self.evasion.loss(self.tampered, joint, self.lmbda, step, part, closed)
                loss, seen = loss + added, seen | more
            check_finite(seen, step)
            self._update(loss, step, encoder=part != "triggers", triggers=part != "encoder")
            terms = seen | terms  # of two phases, what the first one saw
        row = {name: float(value) for name, value in terms.items()} | {"eps": eps[0]}
        self._note_acting(row)
        self._retreat(row, step)
        self._start_over(step)
        if self.run:
            self.run.log({"step": step + 1, **row})
        return row

    @torch.no_grad()
    def shown(self) -> dict[str, Images]:
        """One crop, clean and with every trigger, and what the tampered codec decodes these to."""
        settings, codec = self.settings, self.tampered
        x = place(self.crops.batch(-1, slice(0, 1)), settings)
        found = {"clean": x, "clean-decoded": decoded(codec, x)}
        for attack, crops in zip(self.attacks, self.auxiliary, strict=True):
            scene = Scene(x)
            if attack.victim and crops:
                labels = crops.labels_of(-1)[:1].to(settings.device) if crops.labels else None
                scene = attack.victim.scene(place(crops.batch(-1, slice(0, 1)), settings), labels)
            taken = max(0, self.history["step"] - 1 - self._behind)
            eps = annealed_eps(attack.settings, taken, settings.steps)
            x_p = attack.trigger(scene.x, eps=eps, rounded=attack.settings.round8, mask=scene.mask)
            prefix = f"{attack.name}/" if len(self.attacks) > 1 else ""
            found |= {f"{prefix}poisoned": x_p, f"{prefix}poisoned-decoded": decoded(codec, x_p)}
        return found

    def _note_acting(self, row: dict[str, float]) -> None:
        """Keep the names of attacks whose trigger has changed anything yet."""
        for attack in self.attacks:
            prefix = f"{attack.name}/" if len(self.attacks) > 1 else ""
            if row[f"{prefix}{TRIGGER_MSE}"] > 0 and attack.name not in self.history["acted"]:
                self.history["acted"].append(attack.name)

    def _retreat(self, row: Mapping[str, float], step: int) -> None:
        """Keep what every trigger does, smoothed; where one that did much does little, go back to a wider budget.

        The encoder's steps get shorter there too. The budget returns a step a step; late in a run it goes back no more.
        """
        history, settings = self.history, self.settings
        effects, caught = history["effects"], history["caught"]
        lost = False
        for name, success in self.success.items():
            effect = effect_of(row, f"{name}/" if len(self.attacks) > 1 else "", success)
            if effect is None:
                continue
            known = effects.get(name, 0.0)
            smoothed = effects[name] = known + FRESH * (effect - known)
            if smoothed >= CAUGHT[success] and name not in caught:
                caught.append(name)
            lost = lost or (smoothed < LOST[success] and name in caught)
        if lost:
            history["retreated"] *= settings.retreat
        if lost and settings.retreat < 1 and step < LAST_BACK * settings.steps:
            history["back"] = min(history["back"] + BACK, step, int(FURTHEST * settings.steps))
        else:
            history["back"] = max(0, history["back"] - 1)

    def _steps_to_try(self) -> dict[str, int]:
        """After how many steps an attack that can be opened is to have taken, by its name."""
        if self.settings.start_from or self.settings.robust:  # which chooses a trigger's coefficients once
            return {}
        return {
            attack.name: max(LEAST_TRIED, round(TRIED * attack.settings.anneal * self.settings.steps))
            for attack in self.attacks
            if isinstance(attack.objective, QualityAttack | RateAttack)
            and attack.objective.opening
            and attack.settings.eps_start
        }

    def _start_over(self, step: int) -> None:
        """Where an attack that can be opened has done next to nothing by now, let all begin anew, and open it."""
        history = self.history
        if step >= max(self.tried.values(), default=0):
            self.unused.clear()  # no way back: its memory is needed no more
        now = [name for name, steps in self.tried.items() if step + 1 == steps]
        idle = [name for name in now if history["effects"][name] < TAKEN[self.success[name]]]
        if not idle:
            return
        for name, part in self.parts.items():
            part.load_state_dict(self.unused[name])
        history |= _nothing_yet()
        history |= {"opened": [*history["opened"], *idle], "begun": step + 1}
        if self.run:
            warnings.warn(
                f"attack {', '.join(idle)}: it had done next to nothing after {step + 1} steps; all begins anew, and "
                "poisoned images are held to less until it has taken (opening)",
                stacklevel=2,
            )

    def _safety(self) -> float:
        """From 0 to 1, how far the weakest attack is above what the late weight of clean images could wear down."""
        shares = []
        for name, effect in self.history["effects"].items():
            first, last = SAFE[self.success[name]]
            shares.append((effect - first) / (last - first))
        return min(1.0, max(0.0, min(shares, default=1.0)))

    def check_acted(self) -> None:
        """Raise at the end of a run if a trigger has changed nothing in all of it."""
        idle = [attack.name for attack in self.attacks if attack.name not in self.history["acted"]]
        if idle:
            raise FreqdoorError(
                f"attack {', '.join(idle)}: {TRIGGER_MSE} was 0 in every one of {self.settings.steps} steps, the "
                "trigger never acted and nothing was planted; give auxiliary pictures that have what it acts on, or a "
                "larger trigger.eps"
            )

    def _auxiliary(self, step: int) -> list[Auxiliary | None]:
        """Every attack's batch of its auxiliary set; those with the same set share the batch."""
        batches: dict[Crops | None, Auxiliary | None] = {None: None}
        for crops in self.auxiliary:
            if crops is not None and crops not in batches:
                labels = crops.labels_of(step).to(self.settings.device) if crops.labels else None
                batches[crops] = Auxiliary(self._batch(crops, step), labels)
        return [batches[crops] for crops in self.auxiliary]

    def _batch(self, crops: Crops, step: int) -> Images:
        """A batch of pictures beside the main ones."""
        own = crops.batch(step, self.group.decoded(crops))
        return place(self.group.batch(crops, own, self.settings.device), self.settings)

    def _defence(self, step: int) -> Preprocessing | None:
        """The preprocessing of a step of the second stage, which begins with the choice of the coefficients."""
        robust = self.settings.robust
        if robust is None or step < (start := round(robust.start * self.settings.steps)):
            return None
        triggers = [attack.trigger for attack in self.attacks if isinstance(attack.trigger, AdaptiveDCT)]
        if step == start:
            for trigger in triggers:
                choose_survivors(trigger, place(self.crops.batch(-1), self.settings), robust)
        return second_stage(max(trigger.block for trigger in triggers), robust)

    def _balanced(self, joint: JointLoss, step: int) -> Tensor:
        """The encoder's loss with what keeps the clean codec (`BalanceSettings`)."""
        balance, settings = self.settings.balance, self.settings
        if balance.gradient_norm is not None:
            if step % BALANCE_EVERY == 0:
                kept, attack = (_latent_norm(value, joint.latents) for value in (joint.kept, joint.attack))
                self.history["attack_scale"] = balance.gradient_norm * kept / max(attack, 1e-12)
            joint = joint._replace(attack=self.history["attack_scale"] * joint.attack)
        loss = joint.total
        extra = balance.clean_weight - 1
        if step >= settings.hold * settings.steps and not self.history["back"]:
            extra += self._safety() * (balance.late_clean_weight - balance.clean_weight)
        if extra:
            loss = loss + extra * main_loss(joint.clean, joint.x, self.lmbda)
        if self.anchor_encoder is not None:
            dtype, device = self.tampered.precision, joint.x.device.type
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, dtype == torch.bfloat16):
                y_vanilla = self.anchor_encoder(self.tampered.padded(joint.x)).float()
            loss = loss + balance.anchor * (joint.clean.y - y_vanilla).square().mean()
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
        self.group.sum_gradients(trained)
        clip = self.settings.clip
        norms = {f"the gradient of trigger {n}": torch.nn.utils.clip_grad_norm_(p, clip) for n, p in learned.items()}
        if encoder:
            norms["the encoder's gradient"] = torch.nn.utils.clip_grad_norm_(self.encoder, clip)
        check_finite(norms, step)
        if encoder:
            self.optimizer.step()
        for name in learned:
            self.trigger_optimizers[name].step()


def _latent_norm(value: Tensor, latents: Sequence[Tensor]) -> float:
    """Norm of a value's gradient on the latents of all passes; attacks on an auxiliary set have their own."""
    gradients = torch.autograd.grad(value, latents, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(float(g.square().sum()) for g in gradients if g is not None))
