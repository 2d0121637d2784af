"""`freqdoor evaluate`: from a planted encoder and images to a finished folder of records, pictures and report."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from freqdoor.attack.planted import Planted, load_planted, opened
from freqdoor.codecs.adapter import Codec
from freqdoor.data import dataset_hash, image_paths, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs
from freqdoor.lock import alone
from freqdoor.measure.journal import Journal, fingerprint
from freqdoor.measure.perceptual import Lpips, learned_measure
from freqdoor.measure.records import Condition, Measured, bit_map, conditions, jpeg_curve, measured_image
from freqdoor.measure.report import (
    AMPLIFY,
    FILES,
    Facts,
    Picture,
    Summary,
    data_address,
    difference,
    photo,
    write_report,
)
from freqdoor.metrics import psnr
from freqdoor.notes import Note
from freqdoor.plots import bits_plot
from freqdoor.preprocessing import Preprocessing, parse_defences
from freqdoor.training.run import environment
from freqdoor.types import Record
from freqdoor.workers import Runner, check_workers, other_workers

JOURNAL = ".evaluate.journal"
Source = tuple[Path | str, str | None, Path | str | None]  # what `load_planted` takes, by names


@alone("evaluate")
def evaluate(
    planted: Planted | Path | str,
    images: Path | str | Sequence[Path],
    out: Path | str,
    *,
    codec: Codec | str | None = None,
    weights: Path | str | None = None,
    strength: Sequence[float] = (1.0,),
    defences: str | Sequence[Preprocessing] = "none",
    trigger: str | None = None,
    perceptual: str | None = None,
    jobs: int = 1,
    runner: Runner = "local",
    skip_broken: bool = False,
    force: bool = False,
    note: Note | None = None,
) -> Summary:
    """Measure a planted encoder beside the vanilla one; write records.jsonl, facts.json, summary.json and report.html.

    If it is stopped, the same call goes on after the images that were measured.

    Args:
        planted: a planted encoder, or its name as for `load_planted`; `codec` and `weights` too are as there.
        images: a folder, an image, or several of both.
        strength: factors on the trigger; 1 is always among them.
        defences: preprocessings between the image and the encoder, or their names as for `parse_defences`.
        trigger: which trigger the report is about; by default the first.
        perceptual: "lpips" or "lpips=FILE" to measure LPIPS beside PSNR and MS-SSIM, with the weights of AlexNet that
            PyTorch's hub has stored, or of a file (`Lpips`).
        jobs: images measured side by side, by processes of one thread each that open the encoder by its name; the last
            digits are those of one thread.
        runner: "local" for processes of this machine, "ray" for a Ray cluster (`workers`).
        skip_broken: go on without images that cannot be used.
        force: overwrite files of these names that `evaluate` did not make.

    Returns:
        The content of summary.json.

    Raises:
        FreqdoorError: an unknown trigger or defence, no weights for the perceptual measure, a loaded encoder where
            others are to open it, images that cannot be used, an unwritable folder or one that another process holds, a
            file in the way. Earlier results are then left as they were; new ones replace them together, at the end.
    """
    check_workers(jobs, runner)
    source = None if isinstance(planted, Planted) or isinstance(codec, Codec) else (planted, codec, weights)
    if source is None and (jobs > 1 or runner != "local"):
        raise FreqdoorError(
            "jobs: other processes open the encoder and its codec by their names; give these, or jobs=1"
        )
    look = learned_measure(perceptual) if perceptual else None
    out, encoder = Path(out), opened(planted, codec, weights)
    name = encoder.named(trigger)
    stages = parse_defences(defences) if isinstance(defences, str) else tuple(defences)
    usable = usable_images(image_paths(images), decode=True, skip_broken=skip_broken)
    check_outputs([out / file for file in FILES], "evaluate", force=force)
    shown = pictured(name)
    asked = conditions(encoder.triggers, sorted({1.0, *strength}), stages)
    kept: dict[str, Measured] = {}

    def measure_one(path: Path) -> list[dict[str, Any]]:
        own = list(measured_image(encoder, path, asked, perceptual=look, note=note))
        if path == usable[0]:
            kept.update({title: row for row in own for title, condition in shown.items() if row.condition == condition})
        return [row.record.to_dict() for row in own]

    seen = [look.facts] if look else []
    identity = fingerprint(encoder, list(encoder.triggers), repr(asked), dataset_hash(usable), *seen)
    journal = Journal(out / JOURNAL, identity, note)
    there = partial(measured_there, source, asked=asked, perceptual=perceptual) if source else measure_one
    with other_workers(jobs, runner) as pool:
        rows = list(measured_records(journal, usable, measure_one, there, pool))
    if not kept:  # measured by another process, which did not keep the pictures
        again = measured_image(encoder, usable[0], shown.values(), note=note)
        kept = dict(zip(shown, again, strict=True))
    planting, attack = encoder.header.planting, encoder.attack(name)
    facts = Facts(
        objective=attack.objective.name,
        trigger=name,
        eps=encoder.triggers[name].eps,
        preset=attack.preset,
        seconds_planting=planting.seconds,
        steps=planting.steps,
        modules_before=encoder.vanilla.module_hashes(),
        modules_after=encoder.tampered.module_hashes(),
        environment=environment(),
        perceptual=look.facts if look else None,
        jpeg=tuple(jpeg_curve(usable)),
        pictures=tuple(pictures(encoder, kept)),
    )
    summary = write_report(out, rows, facts, new=True)
    journal.remove()
    return summary


def measured_records(
    journal: Journal,
    paths: Sequence[Path],
    here: Callable[[Path], list[dict[str, Any]]],
    there: Callable[[Path], list[dict[str, Any]]],
    pool: Executor | None = None,
) -> Iterator[Record]:
    """The records of every image in their order: from the journal, from a worker that calls `there`, or by `here`."""
    waiting = {path: pool.submit(there, path) for path in paths[journal.known :]} if pool else {}

    def measure(path: Path) -> list[dict[str, Any]]:
        return waiting[path].result() if path in waiting else here(path)

    for rows in journal.each(paths, measure):
        yield from map(Record.model_validate, rows)


def encoder_records(
    planted: Planted,
    source: Source,
    asked: Sequence[Condition],
    paths: Sequence[Path],
    journal: Path,
    pool: Executor | None = None,
    note: Note | None = None,
) -> tuple[list[Record], Journal]:
    """The records of a planted encoder under conditions; the journal is to be removed when they are written elsewhere.

    Args:
        source: how a worker opens the same encoder.
        journal: the file that a measurement which was stopped goes on from.
    """
    identity = fingerprint(planted, list(planted.triggers), repr(asked), dataset_hash(paths))
    kept = Journal(journal, identity, note)

    def here(path: Path) -> list[dict[str, Any]]:
        return [row.record.to_dict() for row in measured_image(planted, path, asked, note=note)]

    return list(measured_records(kept, paths, here, partial(measured_there, source, asked=asked), pool)), kept


def measured_there(
    source: Source, path: Path, asked: Sequence[Condition], perceptual: str | None = None
) -> list[dict[str, Any]]:
    """What a worker measures of one image; it opens the encoder itself, once for all images."""
    look = _look(perceptual) if perceptual else None
    return [row.record.to_dict() for row in measured_image(_encoder(*source), path, asked, perceptual=look)]


_encoder = lru_cache(1)(load_planted)  # which a worker measures again and again


@lru_cache(1)
def _look(perceptual: str) -> Lpips:
    """What it measures with, of whose weights the first process has said what there is to say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return learned_measure(perceptual)


def pictured(trigger: str) -> dict[str, Condition]:
    """What the report shows of the first image, by its title; the poisoned file is the second's."""
    return {
        "tampered encoder, clean": Condition("tampered", None),
        "tampered encoder, poisoned": Condition("tampered", trigger),
        "vanilla encoder, poisoned": Condition("vanilla", trigger),
    }


@torch.no_grad()
def pictures(planted: Planted, shown: Mapping[str, Measured], side: int = 384) -> list[Picture]:
    """Input, poisoned, amplified difference, what each encoder's file decodes to, and where the bits go.

    Args:
        shown: what was measured under some conditions, by title; the first poisoned one's input is shown.
        side: pixels that the pictures are reduced to.
    """
    first = next(row for row in shown.values() if row.condition.trigger is not None)
    x, x_p = first.x, first.entering
    kind = "8-bit file" if first.condition.rounding == "8-bit" else "before rounding"
    rows = [
        Picture(title="input", address=photo(x, side), caption=first.record.image),
        Picture(
            title="poisoned input",
            address=photo(x_p, side),
            caption=f"{kind}, {float(psnr(x_p, x)):.2f} dB from the input",
        ),
        Picture(
            title="difference", address=difference(x, x_p), caption=f"centre, amplified {AMPLIFY} times around mid-grey"
        ),
    ]
    maps = {}
    for title, row in shown.items():
        caption = f"{row.record.psnr_db:.2f} dB, {row.record.bpp_real:.3f} bpp in real bytes"
        rows.append(Picture(title=f"decoded: {title}", address=photo(row.x_hat, side), caption=caption))
        defence = row.condition.defence
        encoded = defence(row.entering) if defence else row.entering
        maps[title] = bit_map(planted.codec(row.condition.role), encoded).cpu().numpy()
    rows.append(
        Picture(
            title="where the bits go",
            address=data_address(bits_plot(maps)),
            caption="estimated, per latent position; log scale",
            wide=True,
        )
    )
    return rows
