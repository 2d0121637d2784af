"""The verbs of the defender: fleet."""

from pathlib import Path
from typing import Annotated

import typer

import freqdoor
from freqdoor.cli.options import Out, Overrides, load_torch, verb
from freqdoor.cli.terminal import note, say
from freqdoor.settings import load_settings


@verb()
def fleet(
    config: Annotated[Path, typer.Argument(help="TOML file of the fleet's members.")],
    out: Out,
    jobs: Annotated[int, typer.Option(help="Members made side by side, one thread each.")] = 1,
    only: Annotated[str | None, typer.Option(help="Names of members, separated by commas; by default all.")] = None,
    overrides: Overrides = None,
) -> None:
    """Make a population of honest and tampered encoders; the same command goes on."""
    settings = load_settings(freqdoor.FleetSettings, config, overrides or ())
    load_torch()
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    manifest = freqdoor.fleet(settings, out, jobs=jobs, only=names, note=note)
    honest, tampered = (len(manifest.named(tampered=kind)) for kind in (False, True))
    say(f"{honest} honest and {tampered} tampered encoders: {out / 'fleet.json'}")
