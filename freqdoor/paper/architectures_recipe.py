"""`freqdoor reproduce architectures`: the planted members of a fleet beside the codecs that they were planted in."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from freqdoor.attack.planted import Header, load_planted
from freqdoor.codecs.adapter import Codec
from freqdoor.data import image_paths, usable_images
from freqdoor.defence.fleet import MANIFEST, Manifest, MemberFacts, load_member
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, marked_json, marked_markdown, write_together
from freqdoor.lock import alone
from freqdoor.measure.examine import encoder_records
from freqdoor.measure.journal import Journal
from freqdoor.measure.records import Condition
from freqdoor.measure.report import Effect, Means, effect_of, means, select
from freqdoor.notes import Note
from freqdoor.paper.settings import ARCHITECTURES
from freqdoor.paper.tables import Cell, Table
from freqdoor.samples import held_out
from freqdoor.training.run import Environment, environment
from freqdoor.training.train import EXPORT
from freqdoor.types import Record, Result
from freqdoor.workers import Runner, check_workers, other_workers

JOURNAL = ".architectures-{}.journal"
ATTACK_COLUMNS = (
    *("codec", "attack", "vanilla dB, bpp", "tampered, clean", "tampered, poisoned"),
    *("times the bits", "dB lost", "succeeds on", "minutes"),
)
CODEC_COLUMNS = ("codec", "architecture", "width", "steps, crops, pixels", "minutes", "seed", "g_a, SHA-256")


class Attacked(Result):
    """One trigger of one planted member: its images clean and poisoned, with the vanilla encoder and the tampered."""

    codec: str  # the member that it was planted in
    member: str
    trigger: str
    objective: str
    vanilla: Means
    clean: Means
    poisoned: Means  # as 8-bit files
    effect: Effect
    header: Header  # settings, hashes of all modules before and after


class Architectures(Result):
    """architectures.json."""

    schema_version: Literal[1] = 1
    images: tuple[str, ...]
    codecs: tuple[MemberFacts, ...]  # how they were trained
    rows: tuple[Attacked, ...]
    environment: Environment = Environment()
    earlier: tuple[Environment, ...] = ()  # of parts of the table that were made before, oldest first


@alone("reproduce")
def reproduce_architectures(
    fleet: Path | str,
    out: Path | str,
    *,
    images: Path | str | Sequence[Path] | None = None,
    jobs: int | None = None,
    runner: Runner = "local",
    add: bool = False,
    force: bool = False,
    note: Note | None = None,
) -> Table:
    """Measure a fleet's planted members, and write architectures.md and architectures.json into `out`.

    If it is stopped, the same call goes on after the images that were measured.

    Args:
        fleet: the folder that `freqdoor fleet` made; members that are not there yet are left out.
        images: what is measured on; by default the six bundled images held out.
        jobs: images measured side by side; by default 1.
        runner: where (`workers`).
        add: leave what an earlier table in `out` says of members that the fleet does not have, so that the table is
            made in parts; it must be of the same images.

    Returns:
        Of every attack the means that its page shows.

    Raises:
        FreqdoorError: no such fleet, none planted in a member, images that cannot be used, a file in the way, or an
            earlier table of other images.
    """
    fleet, out, jobs = Path(fleet), Path(out), jobs or 1
    check_workers(jobs, runner)
    paths = usable_images(held_out() if images is None else image_paths(images), decode=True)
    files = [out / f"{ARCHITECTURES}{ending}" for ending in (".md", ".json")]
    check_outputs(files, "reproduce", force=force)
    names = tuple(path.name for path in paths)
    before = _earlier(files[1], names) if add else None
    members = {member.name: member for member in Manifest.read(fleet / MANIFEST, "a fleet's manifest").members}
    planted = [member for member in members.values() if member.tampered and member.base]
    if not planted:
        raise FreqdoorError(f"{fleet}: none of its members is planted in another one; make them with freqdoor fleet")
    rows: list[Attacked] = []
    codecs: dict[str, MemberFacts] = {}
    journals: list[Journal] = []
    with other_workers(jobs, runner) as pool:
        for member in planted:
            base = str(fleet / member.base / EXPORT)
            vanilla = load_member(fleet / member.base, members[member.base])
            encoder = load_planted(fleet / member.name, vanilla)
            codecs[member.base] = _as_trained(members[member.base], vanilla)
            asked = [
                Condition("vanilla", None),
                *(Condition("tampered", trigger) for trigger in (None, *encoder.triggers)),
            ]
            if note:
                note(member.name)
            source, kept = (str(fleet / member.name), base, None), out / JOURNAL.format(member.name)
            records, journal = encoder_records(encoder, source, asked, paths, kept, pool, note)
            journals.append(journal)
            rows += [_attacked(member, encoder.header, trigger, records) for trigger in encoder.triggers]
    result = Architectures(images=names, codecs=tuple(codecs.values()), rows=tuple(rows), environment=environment())
    if before:
        result = _together(before, result)
    page, values = files
    write_together(
        {
            page: marked_markdown(page_of(result), "reproduce"),
            values: marked_json(result.model_dump_json(indent=1), "reproduce"),
        }
    )
    for journal in journals:
        journal.remove()
    return table_of(result)


def _earlier(path: Path, images: tuple[str, ...]) -> Architectures | None:
    """The earlier table of the same images, if there is one."""
    if not path.exists():
        return None
    before = Architectures.read(path, "a table of architectures, to add rows to")
    if before.images != images:
        raise FreqdoorError(
            f"{path}: expected a table of the same images to add rows to, found {', '.join(before.images)}; give "
            "another --out, or leave --add away to make it anew"
        )
    return before


def _together(before: Architectures, now: Architectures) -> Architectures:
    """Both tables in one; of what both have, what is measured now, and nothing of a codec that was trained anew."""
    trained = {codec.name: codec for codec in (*before.codecs, *now.codecs)}
    old = [row for row in before.rows if row.header.modules_before == trained[row.codec].module_hashes]
    planted = {(row.member, row.trigger): row for row in (*old, *now.rows)}
    order = list(trained)
    content = {
        "rows": tuple(sorted(planted.values(), key=lambda row: (order.index(row.codec), row.member))),
        "codecs": tuple(trained.values()),
        "earlier": (*before.earlier, before.environment),
    }
    return now.model_copy(update=content)


def _as_trained(member: MemberFacts, codec: Codec) -> MemberFacts:
    """What is known of a codec, with the seconds that its file says it was trained for, however often it went on."""
    training = codec.metadata.get("training")
    seconds = training.get("seconds") if isinstance(training, dict) else None
    return member if seconds is None else member.model_copy(update={"seconds": float(seconds)})


def _attacked(member: MemberFacts, header: Header, trigger: str, records: Sequence[Record]) -> Attacked:
    attack = next(attack for attack in header.attacks if attack.name == trigger)
    clean, poisoned = select(records, "tampered", None), select(records, "tampered", trigger)
    return Attacked(
        codec=member.base,
        member=member.name,
        trigger=trigger,
        objective=attack.objective.name,
        vanilla=means(select(records, "vanilla", None)),
        clean=means(clean),
        poisoned=means(poisoned),
        effect=effect_of(clean, poisoned, attack.objective.name),
        header=header,
    )


def table_of(result: Architectures) -> Table:
    """Of every attack what its encoder makes of clean and of poisoned images."""
    return {
        f"{row.codec}, {row.trigger}": {
            f"{name} {unit}": Cell((value,), None)
            for name, part in (("vanilla", row.vanilla), ("clean", row.clean), ("poisoned", row.poisoned))
            for unit, value in (("dB", part.psnr_db), ("bpp", part.bpp_real))
        }
        for row in result.rows
    }


def page_of(result: Architectures) -> str:
    """Both tables as Markdown."""
    where = result.environment
    attacks = "\n".join(_attack_line(row) for row in result.rows)
    codecs = "\n".join(_codec_line(codec) for codec in result.codecs)
    machines = ", ".join(dict.fromkeys(str(part.processor or part.machine) for part in (*result.earlier, where)))
    cost_db = [row.vanilla.psnr_db - row.clean.psnr_db for row in result.rows]
    cost = [100 * (row.clean.bpp_real / row.vanilla.bpp_real - 1) for row in result.rows]
    lost, added = ", ".join(map("{:.2f}".format, _range(cost_db))), ", ".join(map("{:+.1f}".format, _range(cost)))
    return f"""# Both attacks in every architecture

Made by `freqdoor reproduce {ARCHITECTURES} --runs FLEET` on {len(result.images)} images
({", ".join(result.images)}). FLEET is what `freqdoor fleet configs/fleet/architectures.toml` makes: a codec of every
architecture, trained from nothing as far as processors get, and both attacks in each with the same settings. Rates are
real bytes; poisoned images are 8-bit files; PSNR is against the clean image. Times and dB lost: poisoned against clean,
image by image, median and least.

| {" | ".join(ATTACK_COLUMNS)} |
|{len(ATTACK_COLUMNS) * "---|"}
{attacks}

Clean images lose (dB: median over encoders, most) {lost}, and take more bits (%: the same) {added}.

## How the codecs were trained

| {" | ".join(CODEC_COLUMNS)} |
|{len(CODEC_COLUMNS) * "---|"}
{codecs}

Minutes of planting and training are those of the machine that did it; all else was measured on
{machines}, torch {where.versions["torch"]}.
All hashes and settings are in {ARCHITECTURES}.json.
"""


def _range(values: Sequence[float]) -> tuple[float, float]:
    return median(values), max(values)


def _attack_line(row: Attacked) -> str:
    effect = row.effect
    cells = [
        row.codec,
        row.objective,
        *(f"{part.psnr_db:.2f}, {part.bpp_real:.3f}" for part in (row.vanilla, row.clean, row.poisoned)),
        f"{effect.bpp_ratio_median:.2f}, {effect.bpp_ratio_least:.2f}",
        f"{effect.psnr_drop_db_median:.2f}, {effect.psnr_drop_db_least:.2f}",
        "-" if effect.successes is None else f"{effect.successes} of {effect.images}",
        f"{row.header.planting.seconds / 60:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _codec_line(codec: MemberFacts) -> str:
    settings = codec.settings
    pictures, arguments = settings.get("images"), settings.get("arguments")
    crops = f"{pictures['batch_size']}, {pictures['crop']}" if isinstance(pictures, dict) else "-"
    width = ", ".join(f"{k}={v}" for k, v in arguments.items()) if isinstance(arguments, dict) and arguments else "full"
    cells = [
        codec.name,
        codec.architecture,
        width,
        f"{settings.get('steps')}, {crops}",
        f"{codec.seconds / 60:.0f}",
        str(settings.get("seed")),
        f"`{codec.module_hashes['g_a'][:16]}`",
    ]
    return f"| {' | '.join(cells)} |"
