"""`freqdoor fleet`: a population of encoders, honest and tampered, each in a folder of its own; one manifest."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from freqdoor.attack.plant import plant
from freqdoor.attack.planted import PLANTED, Planted, load_planted
from freqdoor.attack.settings import CodecSource, PlantSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.architectures import ARCHITECTURES
from freqdoor.codecs.loading import load_codec, save_codec
from freqdoor.data import centre, load_image, seed_for
from freqdoor.defence.settings import Alteration, FleetSettings, Member
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, write_text
from freqdoor.lock import alone
from freqdoor.measure.records import poisoned, through
from freqdoor.metrics import bpp_of_bytes, psnr_8bit
from freqdoor.notes import Count, Note, numbered
from freqdoor.samples import held_out
from freqdoor.settings import public
from freqdoor.training.train import EXPORT, train_codec
from freqdoor.types import Images, Result
from freqdoor.workers import Runner, check_workers, workers

MANIFEST, MEMBER = "fleet.json", "member.json"
CROP = 256  # pixels a side, from the centre, of the pictures that a member is measured on


class Answer(Result):
    """What an encoder makes of one kind of picture: means over the fleet's pictures, of real bytes."""

    bpp: float
    psnr_db: float


class MemberFacts(Result):
    """member.json: what a member is, and how it answers."""

    schema_version: Literal[1] = 1
    name: str
    family: str
    tampered: bool
    architecture: str
    base: str = ""  # the member that its codec comes from; none: the fleet's codec
    made_with: str  # SHA-256 of all that it was made with
    settings: dict[str, object]
    file: str  # the codec, in the member's folder
    module_hashes: dict[str, str]
    clean: Answer
    poisoned: dict[str, Answer]  # by trigger
    seconds: float


class Manifest(Result):
    """fleet.json: all members that are there."""

    schema_version: Literal[1] = 1
    members: tuple[MemberFacts, ...]

    def named(self, *, tampered: bool) -> list[MemberFacts]:
        """The honest members, or the tampered ones."""
        return [member for member in self.members if member.tampered == tampered]


class _Task(NamedTuple):
    """What one process makes."""

    settings: FleetSettings
    member: Member
    codec: CodecSource  # that the member comes from
    folder: Path
    made_with: str


@alone("fleet")
def fleet(
    settings: FleetSettings,
    out: Path | str,
    *,
    jobs: int = 1,
    runner: Runner = "local",
    only: Sequence[str] = (),
    note: Note | None = None,
) -> Manifest:
    """Make every member that is not there yet, and write fleet.json into `out`; the same call goes on.

    Args:
        jobs: members made side by side, each by a process with one thread; where a member comes from another one it
            waits.
        runner: "local" for processes of this machine, "ray" for a Ray cluster (`workers`).
        only: names of the members to make; by default all.
        note: told which member is made and how it answers.

    Raises:
        FreqdoorError: an unknown member, or what was wrong with members that could not be made, when all others are.
    """
    out = Path(out)
    check_workers(jobs, runner)
    names = [member.name for member in settings.members]
    if unknown := set(only) - set(names):
        raise FreqdoorError(f"only: expected some of {', '.join(names)}, found {', '.join(sorted(unknown))}")
    check_outputs([out / MANIFEST], "fleet")
    tasks = {member.name: _task(settings, member, out) for member in settings.members}
    wanted = _with_bases(settings, only or names)
    done = {name: facts for name in names if (facts := _made(tasks[name])) is not None}
    problems: dict[str, str] = {}
    lacking = [tasks[name] for name in names if name in wanted and name not in done]
    if note:
        note(Count("members made", 0, len(lacking)))
    told = numbered(note, len(lacking))
    for name, outcome in _make(lacking, done, jobs, runner):
        if isinstance(outcome, MemberFacts):
            done[name] = outcome
            _write(out, names, done)
        else:
            problems[name] = outcome
        told(f"{name}: {outcome if isinstance(outcome, str) else summary_of(outcome)}")
    manifest = _write(out, names, done)
    if problems:
        lines = "\n  ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise FreqdoorError(f"{len(problems)} of {len(wanted)} members could not be made:\n  {lines}")
    return manifest


def load_member(folder: Path, member: MemberFacts) -> Codec:
    """A member's codec, from its folder, ready to code; a stranger's architecture is imported by its factory's name."""
    path = str(folder / member.file)
    known = member.architecture in ARCHITECTURES
    return (load_codec(path) if known else load_codec(member.architecture, path)).prepare()


def summary_of(facts: MemberFacts) -> str:
    """One line on how a member answers."""
    attacks = (f"{name} {a.bpp:.2f} bpp, {a.psnr_db:.2f} dB" for name, a in facts.poisoned.items())
    return "; ".join([f"clean {facts.clean.bpp:.3f} bpp, {facts.clean.psnr_db:.2f} dB", *attacks])


def _write(out: Path, names: Sequence[str], done: dict[str, MemberFacts]) -> Manifest:
    manifest = Manifest(members=tuple(done[name] for name in names if name in done))
    write_text(out / MANIFEST, marked_json(manifest.model_dump_json(indent=1), "fleet"))
    return manifest


def _with_bases(settings: FleetSettings, names: Sequence[str]) -> set[str]:
    """The members of these names, and those that they come from."""
    wanted = set(names)
    for member in reversed(settings.members):
        if member.name in wanted and member.base:
            wanted.add(member.base)
    return wanted


def _task(settings: FleetSettings, member: Member, out: Path) -> _Task:
    codec = CodecSource(name=str(out / member.base / EXPORT)) if member.base else settings.codec
    made = settings.settings_of(member, CodecSource(name=member.base) if member.base else settings.codec)
    facts = public(made) if made else {}
    facts.pop("device", None)  # which says where it is made, not what
    content = [member.model_dump(), facts, settings.measured]
    made_with = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return _Task(settings, member, codec, out / member.name, made_with)


def _made(task: _Task) -> MemberFacts | None:
    """The facts of a member that is there as its settings say; None where it has to be made."""
    path = task.folder / MEMBER
    if not path.exists():
        return None
    facts = MemberFacts.read(path, "the facts of a fleet's member")
    if facts.made_with != task.made_with:
        raise FreqdoorError(
            f"{task.folder}: was made with other settings; delete this folder, or choose another one with --out"
        )
    return facts


def _make(
    tasks: Sequence[_Task], done: dict[str, MemberFacts], jobs: int, runner: Runner
) -> Iterator[tuple[str, MemberFacts | str]]:
    """Make members as soon as those that they come from are there: each one's facts, or what was wrong."""
    if not tasks:
        return
    waiting = {task.member.name: task for task in tasks}
    failed: set[str] = set()
    made = (task.settings.settings_of(task.member, task.codec) for task in tasks)
    with workers(jobs, runner, gpu=any(kind is not None and kind.device.startswith("cuda") for kind in made)) as pool:
        running: dict[Future[MemberFacts], str] = {}
        while waiting or running:
            for name, task in list(waiting.items()):
                if task.member.base in failed:
                    del waiting[name]
                    failed.add(name)
                    yield name, f"{task.member.base}, which it comes from, could not be made"
                elif (not task.member.base or task.member.base in done) and len(running) < jobs:
                    running[pool.submit(_member, task)] = name
                    del waiting[name]
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                name = running.pop(future)
                error = future.exception()
                if error is None:
                    yield name, future.result()
                else:
                    failed.add(name)
                    yield (name, str(error) if isinstance(error, FreqdoorError) else f"{type(error).__name__}: {error}")


def _member(task: _Task) -> MemberFacts:
    """Make one member and measure it."""
    started = time.monotonic()
    made = task.settings.settings_of(task.member, task.codec)
    codec: Codec | Planted
    if isinstance(made, PlantSettings):
        there = (task.folder / PLANTED).exists()
        source = made.codec
        codec = load_planted(task.folder, source.name, source.weights) if there else plant(made, task.folder)
    elif made is not None:
        codec = train_codec(made, task.folder)
    else:
        assert task.member.alter is not None  # the settings refuse others
        codec = load_codec(task.codec.name, task.codec.weights, multiple=task.codec.multiple)
        alter(codec, task.member.alter, seed_for(0, task.member.name))
        save_codec(codec, task.folder / EXPORT, altered=task.member.alter.model_dump())
    tampered = codec.tampered if isinstance(codec, Planted) else codec
    pictures = [centre(load_image(path), CROP) for path in held_out()[: task.settings.measured]]
    answers = {}
    if isinstance(codec, Planted):
        for name, trigger in codec.triggers.items():
            answers[name] = answer(tampered, [(x, poisoned(trigger, x)) for x in pictures])
    facts = MemberFacts(
        name=task.member.name,
        family=task.member.family
        or next(k for k in ("train", "alter", "plant") if getattr(task.member, k) is not None),
        tampered=task.member.tampered,
        architecture=tampered.spec.architecture,
        base=task.member.base,
        made_with=task.made_with,
        settings=json.loads(json.dumps(public(made or task.member))),
        file=EXPORT,
        module_hashes=tampered.module_hashes(),
        clean=answer(tampered, [(x, x) for x in pictures]),
        poisoned=answers,
        seconds=round(time.monotonic() - started, 1),
    )
    write_text(task.folder / MEMBER, facts.model_dump_json(indent=1))
    return facts


def answer(codec: Codec, pictures: Sequence[tuple[Images, Images]]) -> Answer:
    """What an encoder makes of pictures, each given as the clean one and as what enters the encoder."""
    codec.prepare()
    rates, qualities = [], []
    for x, entering in pictures:
        x_hat, size = through(codec, entering)
        rates.append(bpp_of_bytes(size, x))
        qualities.append(float(psnr_8bit(x_hat, x)))
    return Answer(bpp=sum(rates) / len(rates), psnr_db=sum(qualities) / len(qualities))


@torch.no_grad()
def alter(codec: Codec, alteration: Alteration, seed: int) -> None:
    """Alter the weights of an encoder, layer by layer, in place.

    Args:
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [m for m in codec.part("g_a").modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    for layer in layers:
        weight = layer.weight
        if alteration.kind == "prune":
            number = int(alteration.amount * weight.numel())
            if number:
                weight[weight.abs() <= weight.abs().flatten().kthvalue(number).values] = 0
        elif alteration.kind == "quantise":
            step = 2 * weight.abs().max() / (2**alteration.amount - 1)
            weight.copy_((weight / step).round() * step)
        else:
            deviation = alteration.amount * weight.std()
            weight.add_(deviation * torch.randn(weight.shape, generator=generator))
