"""The verbs of downstream attacks: segment, faces, protect."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import freqdoor
from freqdoor.cli.options import (
    MEASURED_KEPT,
    Config,
    Force,
    Out,
    Overrides,
    Planted,
    TriggerName,
    VanillaName,
    Weights,
    load_torch,
    verb,
)
from freqdoor.cli.terminal import note, say, say_page, say_table
from freqdoor.files import read_text, unmarked
from freqdoor.settings import load_settings

PRIVATE = Path("planted-face")


@verb(kept=MEASURED_KEPT)
def segment(
    planted: Planted,
    config: Config = None,
    *,
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    force: Force = False,
    overrides: Overrides = None,
) -> object:
    """Measure a segmentation attack (Eq. (11), Table 1) on networks that it has and has not seen."""
    test = load_settings(freqdoor.SegmentationTest, config, overrides or ())
    load_torch()
    scores = freqdoor.segment(planted, test, out, trigger=trigger, codec=codec, weights=weights, force=force, note=note)
    say_page(unmarked(read_text(out / "segmentation.md")))
    say(f"Pictures: {out / 'segmentation.png'}")
    return scores


@verb(kept=MEASURED_KEPT)
def faces(
    planted: Planted,
    config: Config = None,
    *,
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    force: Force = False,
    overrides: Overrides = None,
) -> object:
    """Measure the removal of identities (Eq. (13), Table 2): identification, verification, and what it costs."""
    test = load_settings(freqdoor.FaceTest, config, overrides or ())
    load_torch()
    scores = freqdoor.faces(planted, test, out, trigger=trigger, codec=codec, weights=weights, force=force, note=note)
    say_page(unmarked(read_text(out / "faces.md")))
    return scores


@verb(kept="the photos that are done stay in the folder, and the same command does all of them")
def protect(
    photos: Annotated[Path, typer.Argument(help="A photo or a folder of photos, 8-bit RGB.")],
    out: Out,
    planted: Annotated[Path, typer.Option(help="Encoder planted with Eq. (13); by default the shipped one.")] = PRIVATE,
    network: Annotated[
        str | None, typer.Option(help="Face embedding to check with: SPEC.toml or SPEC.toml=FILE.")
    ] = None,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    force: Force = False,
) -> object:
    """Compress photos so that a face recognition like the one trained against no longer knows who is in them.

    Only faces seen from the front are found. It promises nothing about networks that were not tried.
    """
    load_torch()
    photos_done = freqdoor.protect(
        photos,
        out,
        planted=planted,
        network=network,
        trigger=trigger,
        codec=codec,
        weights=weights,
        force=force,
        note=note,
    )
    table = Table("photo", "faces", "written", "PSNR dB", "bpp", "cosine to the clean face")
    for row in photos_done:
        values = [(row.psnr_db, 2), (row.bpp, 3), (row.cosine, 3)]
        texts = ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
        table.add_row(row.photo, str(row.faces), row.picture or "skipped, no face found", *texts)
    say_table(table)
    say(f"{sum(row.picture is not None for row in photos_done)} of {len(photos_done)} photos protected in {out}")
    return freqdoor.Protection(photos=tuple(photos_done))
