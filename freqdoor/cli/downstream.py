"""The verbs of downstream attacks: segment, faces, protect."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from freqdoor.attack.planted import load_planted
from freqdoor.cli.options import (
    Config,
    Out,
    Overrides,
    Planted,
    TriggerName,
    VanillaName,
    Weights,
    app,
    console,
    note,
    say,
)
from freqdoor.measure.faces import faces as run_faces
from freqdoor.measure.faces import faces_table
from freqdoor.measure.faces import protect as run_protect
from freqdoor.measure.segmentation import PICTURES, segmentation_table
from freqdoor.measure.segmentation import segment as run_segment
from freqdoor.measure.testsets import FaceTest, SegmentationTest
from freqdoor.settings import load_settings

PRIVATE = Path("planted-face")


@app.command()
def segment(
    planted: Planted,
    config: Config = None,
    *,
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    overrides: Overrides = None,
) -> None:
    """Measure a segmentation attack (Eq. (11), Table 1) on networks that it has and has not seen."""
    test = load_settings(SegmentationTest, config, overrides or ())
    scores = run_segment(load_planted(planted, codec, weights), test, out, trigger=trigger, note=note)
    say(segmentation_table(scores))
    say(f"Pictures: {out / PICTURES}")


@app.command()
def faces(
    planted: Planted,
    config: Config = None,
    *,
    out: Out,
    trigger: TriggerName = None,
    codec: VanillaName = None,
    weights: Weights = None,
    overrides: Overrides = None,
) -> None:
    """Measure the removal of identities (Eq. (13), Table 2): identification, verification, and what it costs."""
    test = load_settings(FaceTest, config, overrides or ())
    say(faces_table(run_faces(load_planted(planted, codec, weights), test, out, trigger=trigger, note=note)))


@app.command()
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
) -> None:
    """Compress photos so that a face recognition like the one trained against no longer knows who is in them.

    Only faces seen from the front are found. It promises nothing about networks that were not tried.
    """
    loaded = load_planted(planted, codec, weights)
    table = Table("photo", "faces", "written", "PSNR dB", "bpp", "cosine to the clean face")
    done = run_protect(photos, out, planted=loaded, network=network, trigger=trigger, note=note)
    for row in done:
        values = [(row.psnr_db, 2), (row.bpp, 3), (row.cosine, 3)]
        texts = ["-" if value is None else f"{value:.{digits}f}" for value, digits in values]
        table.add_row(row.photo, str(row.faces), row.picture or "skipped, no face found", *texts)
    console.print(table)
    say(f"{sum(row.picture is not None for row in done)} of {len(done)} photos protected in {out}")
