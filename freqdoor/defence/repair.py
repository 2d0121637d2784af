"""`freqdoor repair`: an encoder fine-tuned against its frozen decoder until patterns do nothing, then audited again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Adam

from freqdoor.attack.joint import Attack, joint_loss
from freqdoor.attack.objectives import build_objective, main_loss
from freqdoor.attack.plant import held_cosine
from freqdoor.attack.planted import Planted, opened
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec, read_state, save_codec
from freqdoor.data import Crops, centre, load_image
from freqdoor.defence.audit import Audit, Verdict, audit
from freqdoor.defence.calibration import Calibration
from freqdoor.defence.fleet import CROP, Answer, answer
from freqdoor.defence.settings import METHODS, RepairSettings
from freqdoor.defence.unlearning import Patterns, at_the_sharpest, latents, prune_dormant
from freqdoor.errors import FreqdoorError, Mistakes
from freqdoor.files import marked_json, write_text
from freqdoor.lock import alone
from freqdoor.measure.records import poisoned
from freqdoor.notes import Note
from freqdoor.samples import held_out, training_folder
from freqdoor.settings import make_settings, public
from freqdoor.training.estimates import BATCHES, fitting_lambda
from freqdoor.training.loop import Progress, Stateful, check_device, check_finite, loop, open_folder, place, place_codec
from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.run import Environment, Run, environment
from freqdoor.training.trackers import check_trackers
from freqdoor.training.train import EXPORT, decoded
from freqdoor.types import Images, Result

RESULT = "repair.json"
HOLD = 0.5  # share of the steps at the full learning rate
STRENGTHS = (1.0, 3.0)  # of the true trigger; Table 6 uses 3


class Repair(Result):
    """repair.json."""

    schema_version: Literal[1] = 1
    codec: str
    method: str
    steps: int
    changed: tuple[str, ...]  # modules
    before: Answer  # to the bundled pictures that are held out, as the encoder came
    after: Answer
    seconds: float  # of the fine-tuning
    audit: Audit  # of the repaired encoder
    environment: Environment

    @property
    def exit_code(self) -> int:
        """What `freqdoor repair` ends with: 1 where the encoder is still tampered."""
        return self.audit.exit_code % 2


@alone("repair")
def repair(
    checkpoint: Codec | str,
    out: Path | str,
    *,
    weights: Path | str | None = None,
    reference: Codec | str | None = None,
    images: Path | str | None = None,
    method: str | None = None,
    steps: int | None = None,
    fast: bool = False,
    calibration: Calibration | Path | str | None = None,
    settings: RepairSettings | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
) -> Repair:
    """Repair a codec's encoder, write it to codec.safetensors in `out`, and audit it again; the same call goes on.

    The trigger need not be known: the frozen decoder and clean images are the teacher, and what has to be unlearnt are
    patterns that are driven against the encoder meanwhile. Beside the codec are a run's files, repair.json and the
    folder audit.

    Args:
        checkpoint, weights: the codec to repair, as for `load_codec`, or a loaded codec.
        reference: a trusted codec with the same decoder, for the method distil.
        images: a folder of clean images; by default the 18 bundled ones that nothing is measured on.
        method: parts of METHODS joined by "+".
        fast: the audit makes only the checks that find most.
        calibration: for the audit.
        settings: everything else; what is given beside them goes before them.

    Raises:
        FreqdoorError: an unusable codec, image or setting; another process in the folder, a loss that is not finite.
    """
    codec = checkpoint if isinstance(checkpoint, Codec) else load_codec(checkpoint, weights)
    given_settings = settings or RepairSettings()
    content = given_settings.model_dump() | {"log": given_settings.log}
    if isinstance(checkpoint, Codec):
        content["codec"]["name"] = checkpoint.spec.name
    else:
        content["codec"] |= {"name": checkpoint, "weights": None if weights is None else str(weights)}
    if images is not None:
        content["images"]["folder"] = str(images)
    trusted = reference.spec.name if isinstance(reference, Codec) else reference
    given = {"reference": trusted, "method": method, "steps": steps}
    chosen = make_settings(RepairSettings, content | {key: value for key, value in given.items() if value is not None})
    run = Run(out, [EXPORT, RESULT])
    repairing = _opened(chosen, codec, reference, run)
    saved = run.start(chosen, repairing.facts)
    before = clean_answer(codec)
    parts, history = repairing.parts, repairing.history
    loop(
        run,
        chosen,
        parts,
        history,
        repairing.crops,
        repairing.step,
        saved=saved,
        progress=progress,
        shown=repairing.shown,
    )
    repaired = repairing.finished()
    save_codec(repaired, run.folder / EXPORT, repaired=public(chosen))
    again = audit(repaired, fast=fast, out=run.folder / "audit", calibration=calibration, note=note)
    result = Repair(
        codec=codec.spec.name,
        method=chosen.method,
        steps=chosen.steps,
        changed=repairing.changed(),
        before=before,
        after=clean_answer(repaired),
        seconds=round(history["seconds"], 1),
        audit=again,
        environment=environment(),
    )
    write_text(run.folder / RESULT, marked_json(result.model_dump_json(indent=1), "repair"))
    return result


def _opened(settings: RepairSettings, codec: Codec, reference: Codec | str | None, run: Run) -> "_Repairing":
    """Open all that the settings name, or raise everything that is wrong with it."""
    mistakes = Mistakes()
    with mistakes:
        check_device(settings.device)
    with mistakes:
        check_trackers(settings.log)
    trusted = None
    with mistakes:
        if "distil" in settings.parts:
            trusted = reference if isinstance(reference, Codec) else load_codec(str(settings.reference))
            check_reference(trusted, codec)
    with mistakes:
        images = settings.images
        if not images.folder:
            images = images.model_copy(update={"folder": str(training_folder(run.folder))})
        crops = open_folder(images, settings.seed)
    mistakes.stop()
    return _Repairing(settings, codec, crops, trusted, run)


def check_reference(reference: Codec, codec: Codec) -> None:
    """Raise if a reference's latents mean something else than the codec's: if it has another decoder."""
    if reference.decoder_hash != codec.decoder_hash:
        raise FreqdoorError(
            f"reference: expected a codec with the decoder of {codec.spec.name}, found {reference.spec.name} with "
            "another one, whose latents mean something else; leave distil out of the method"
        )


class _Repairing:
    """What one run of `repair` holds on to from step to step."""

    def __init__(self, settings: RepairSettings, codec: Codec, crops: Crops, reference: Codec | None, run: Run) -> None:
        self.settings, self.crops, self.run = settings, crops, run
        self.dtype = dtype_of(settings.precision, settings.device)
        self.hashes = codec.module_hashes()
        self.codec = copy.deepcopy(codec).freeze(settings.scope)
        place_codec(self.codec, settings)
        self.codec.precision = self.dtype
        if "prune" in settings.parts:
            prune_dormant(self.codec, crops, settings.share)
        self.encoder = [p for p in self.codec.parameters() if p.requires_grad]
        self.optimizer = Adam(self.encoder, lr=settings.lr)
        self.patterns = [
            Patterns(settings, self.codec, found=part == "inverted")
            for part in settings.parts
            if part in ("unlearn", "inverted")
        ]
        lmbda = fitting_lambda(settings, self.codec, (place(crops.batch(-1 - i), settings) for i in range(BATCHES)))
        self.lmbda = lmbda * (settings.tilt if self.patterns else 1.0)
        teachers = [(codec, settings.anchor if self.patterns else 0.0), (reference, settings.weight)]
        self.teachers = [(copy.deepcopy(t).to(settings.device), weight) for t, weight in teachers if t and weight]
        self.parts: dict[str, Stateful] = {"net": self.codec.net, "optimizer": self.optimizer}
        self.parts |= {f"patterns/{i}": patterns for i, patterns in enumerate(self.patterns)}
        self.history: dict[str, Any] = {}

    @property
    def facts(self) -> dict[str, Any]:
        """What the weights depend on besides the settings."""
        return self.crops.facts() | {"precision": precision_name(self.dtype), "modules_before": self.hashes}

    def step(self, x: Images, step: int) -> dict[str, float]:
        """One update of the encoder."""
        settings = self.settings
        self.optimizer.param_groups[0]["lr"] = settings.lr * held_cosine(step, settings.steps, HOLD)
        x = place(x, settings)
        patterned = [patterns.patterned(x, step) for patterns in self.patterns]
        loss, terms = self._loss(x, patterned)
        check_finite(terms, step)
        self._differentiate(loss)
        if "sam" in settings.parts:
            with at_the_sharpest(self.encoder, settings.rho):
                self._differentiate(self._loss(x, patterned)[0])
        norm = torch.nn.utils.clip_grad_norm_(self.encoder, settings.clip)
        check_finite({"the encoder's gradient": norm}, step)
        self.optimizer.step()
        row = {name: float(value) for name, value in terms.items()}
        self.run.log({"step": step + 1, **row})
        return row

    def shown(self) -> dict[str, Images]:
        """One crop, and what the encoder that is repaired makes of it."""
        x = place(self.crops.batch(-1, slice(0, 1)), self.settings)
        return {"clean": x, "clean-decoded": decoded(self.codec, x)}

    def _differentiate(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def _loss(self, x: Images, patterned: Sequence[Images]) -> tuple[Tensor, dict[str, Tensor]]:
        """Eq. (1) of clean images; latents of patterned images as those of clean ones, and these as the teachers'."""
        clean = self.codec(x)
        loss = main_loss(clean, x, self.lmbda)
        terms = {"loss_clean": loss.detach()}
        for x_p in patterned:
            moved = (latents(self.codec, x_p) - clean.y.detach()).square().mean()
            loss = loss + self.settings.weight * moved
            terms["moved"] = moved.detach()
        for teacher, weight in self.teachers:
            with torch.no_grad():
                y = latents(teacher, x)
            loss = loss + weight * (clean.y - y).square().mean()
        return loss, terms | {"loss": loss.detach()}

    def finished(self) -> Codec:
        """The repaired codec, ready to code; nothing outside the scope has changed."""
        self.codec.precision = torch.float32
        self.codec.to("cpu").to(memory_format=torch.contiguous_format).requires_grad_(False).prepare()
        outside = set(self.changed()) - set(self.settings.scope.split("+"))
        if outside:
            raise FreqdoorError(f"{', '.join(outside)} changed while repairing {self.settings.scope}: this is a defect")
        return self.codec

    def changed(self) -> tuple[str, ...]:
        """The modules that are not as they came."""
        return tuple(name for name, value in self.codec.module_hashes().items() if value != self.hashes[name])


def clean_answer(codec: Codec) -> Answer:
    """What an encoder makes of the bundled pictures that are held out."""
    return answer(codec, [(x, x) for x in _held_out()])


def _held_out() -> list[Images]:
    return [centre(load_image(path), CROP) for path in held_out()]


class RepairRow(Result):
    """One encoder in the table: as it came, vanilla, or after one method."""

    method: str
    clean: Answer
    poisoned: dict[str, dict[str, Answer]]  # by trigger, then by strength
    seconds: float  # of the fine-tuning
    verdict: Verdict | None  # of the audit afterwards


class Comparison(Result):
    """What every method makes of one planted encoder."""

    schema_version: Literal[1] = 1
    rows: tuple[RepairRow, ...]
    environment: Environment


def compare_repairs(
    planted: Planted | Path | str,
    out: Path | str,
    *,
    methods: Sequence[str] = METHODS,
    strengths: Sequence[float] = STRENGTHS,
    images: Path | str | None = None,
    fast: bool = True,
    settings: RepairSettings | None = None,
    calibration: Calibration | Path | str | None = None,
    note: Note | None = None,
) -> Comparison:
    """Repair a planted encoder by every method, and try on the results its own triggers, which no method knows.

    The repairs are runs in folders of `out`, so that the same call goes on. Two rows stand before them: the vanilla
    encoder, which is also what distil learns from, and the tampered one.

    Args:
        strengths: factors on the triggers.
        images, fast, settings, calibration: as for `repair`.

    Raises:
        FreqdoorError: as `repair`.
    """
    planted = opened(planted)
    rows = [repair_row("vanilla", planted.vanilla, planted, strengths)]
    rows.append(repair_row("tampered", planted.tampered, planted, strengths))
    for method in methods:
        if note:
            note(f"{planted.tampered.spec.name}: {method}")
        result = repair(
            planted.tampered,
            Path(out) / method,
            reference=planted.vanilla if "distil" in method else None,
            images=images,
            method=method,
            fast=fast,
            settings=settings,
            calibration=calibration,
        )
        repaired = copy.deepcopy(planted.tampered)
        repaired.net.load_state_dict(read_state(Path(out) / method / EXPORT))
        rows.append(repair_row(method, repaired, planted, strengths, result))
    return Comparison(rows=tuple(rows), environment=environment())


def repair_row(
    method: str, codec: Codec, planted: Planted, strengths: Sequence[float] = STRENGTHS, result: Repair | None = None
) -> RepairRow:
    """What a codec makes of held-out pictures, clean and with the triggers of a planted encoder."""
    pictures = _held_out()
    return RepairRow(
        method=method,
        clean=answer(codec, [(x, x) for x in pictures]),
        poisoned={
            name: {
                f"{strength:g}": answer(codec, [(x, poisoned(trigger, x, strength=strength)) for x in pictures])
                for strength in strengths
            }
            for name, trigger in planted.triggers.items()
        },
        seconds=result.seconds if result else 0.0,
        verdict=result.audit.verdict if result else None,
    )


def repairs_table(comparison: Comparison) -> str:
    """A comparison as Markdown."""
    triggers = [(name, strength) for name, row in comparison.rows[0].poisoned.items() for strength in row]
    titles = ["method", "clean bpp", "clean dB", "seconds", "audit"]
    titles += [f"{name} x{strength} {unit}" for name, strength in triggers for unit in ("bpp", "dB")]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for row in comparison.rows:
        answers = [row.poisoned[name][strength] for name, strength in triggers]
        cells = [row.method, f"{row.clean.bpp:.4f}", f"{row.clean.psnr_db:.2f}", f"{row.seconds:.0f}"]
        cells += [row.verdict or "-", *(cell for a in answers for cell in (f"{a.bpp:.4f}", f"{a.psnr_db:.2f}"))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def reactivated(
    codec: Codec, planted: Planted, crops: Crops, *, trigger: str | None = None, steps: int, lr: float = 1e-3
) -> Codec:
    """A copy of a codec whose encoder was fine-tuned again with the trigger of an earlier planting, as its owner would.

    The trigger stays as it is: how few steps open a repaired encoder again, beside how many an encoder needs that was
    never planted in, says how deep the repair goes.

    Args:
        crops: the attacker's images.
        trigger: which one; by default the first.
        lr: Adam's learning rate.

    Raises:
        FreqdoorError: a trigger whose objective needs an auxiliary set, or a codec without a lambda.
    """
    facts = planted.attack(planted.named(trigger))
    objective = build_objective(facts.objective.name, facts.preset, **facts.objective.arguments)
    chosen = planted.triggers[facts.name]
    attack = Attack(facts.name, chosen, objective)
    if codec.spec.lmbda is None:
        raise FreqdoorError(f"{codec.spec.name}: this codec has no quality that lambda follows from")
    opening = copy.deepcopy(codec).freeze("g_a").train()
    encoder = list(opening.part("g_a").parameters())
    optimizer = Adam(encoder, lr=lr)
    for step, x in enumerate(crops.batches(0, steps)):
        joint = joint_loss(opening, [attack], x, codec.spec.lmbda, [chosen.eps], part="encoder")
        check_finite(joint.terms, step)
        optimizer.zero_grad()
        joint.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(encoder, 1.0)
        optimizer.step()
    return opening.requires_grad_(False).prepare()
