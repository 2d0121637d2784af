"""The verbs of the defender: fleet, audit, calibrate-audit, doctor, calibrate-guard, repair."""

from pathlib import Path
from typing import Annotated

import typer

import freqdoor
from freqdoor.cli.options import NOTHING_KEPT, Checkpoint, Force, Out, Overrides, RunnerName, Weights, load_torch, verb
from freqdoor.cli.terminal import live, note, say
from freqdoor.samples import KODAK
from freqdoor.settings import load_settings

Sarif = Annotated[Path | None, typer.Option(help="SARIF 2.1.0 file to write, for code scanning.")]
Junit = Annotated[Path | None, typer.Option(help="JUnit XML file to write, for a build's list of tests.")]


@verb(kept="the members that are made are kept, and the same command makes the others")
def fleet(
    config: Annotated[Path, typer.Argument(help="TOML file of the fleet's members.")],
    out: Out,
    jobs: Annotated[int, typer.Option(help="Members made side by side, one thread each.")] = 1,
    runner: RunnerName = "local",
    only: Annotated[str | None, typer.Option(help="Names of members, separated by commas; by default all.")] = None,
    overrides: Overrides = None,
) -> object:
    """Make a population of honest and tampered encoders; the same command goes on."""
    settings = load_settings(freqdoor.FleetSettings, config, overrides or ())
    load_torch()
    names = [name.strip() for name in (only or "").split(",") if name.strip()]
    manifest = freqdoor.fleet(settings, out, jobs=jobs, runner=runner, only=names, note=note)
    honest, tampered = (len(manifest.named(tampered=kind)) for kind in (False, True))
    say(f"{honest} honest and {tampered} tampered encoders: {out / 'fleet.json'}")
    return manifest


@verb(kept=NOTHING_KEPT)
def audit(
    checkpoint: Checkpoint,
    weights: Weights = None,
    reference: Annotated[str | None, typer.Option(help="The codec that it should be, to compare modules with.")] = None,
    images: Annotated[Path, typer.Option(help="Images to make patterns on; by default Kodak's.")] = KODAK,
    fast: Annotated[bool, typer.Option("--fast", help="Only the checks that find most.")] = False,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Go on once there is a witness.")] = False,
    device: Annotated[str, typer.Option(help="PyTorch device that patterns are optimised on.")] = "cpu",
    networks: Annotated[
        list[str] | None,
        typer.Option("--network", help="SPEC.toml or SPEC.toml=FILE: what decoded pictures are for; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for audit.html, audit.json and the witnesses.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="What honest encoders score, of calibrate-audit.")] = None,
    sarif: Sarif = None,
    junit: Junit = None,
    bom: Annotated[Path | None, typer.Option(help="CycloneDX file to write: the codec, and the verdict on it.")] = None,
    seed: Annotated[int, typer.Option(help="Of the patterns' beginnings.")] = 0,
    force: Force = False,
) -> object:
    """Does this encoder carry a backdoor? Exit code 0 clean, 1 tampered, 2 undecided."""
    load_torch()
    result = freqdoor.audit(
        checkpoint,
        weights=weights,
        reference=reference,
        images=images,
        fast=fast,
        exhaustive=exhaustive,
        device=device,
        networks=networks or (),
        out=out,
        calibration=calibration,
        sarif=sarif,
        junit=junit,
        bom=bom,
        seed=seed,
        force=force,
        note=note,
    )
    for row in result.checks:
        say(f"{row.check}: {row.said}")
    say(f"{result.codec}: {result.verdict}: {result.reason}")
    if out is not None:
        say(f"Report: {out / 'audit.html'}")
    return result


@verb("calibrate-audit")
def calibrate_audit(
    fleets: Annotated[list[Path], typer.Argument(help="Folders that `freqdoor fleet` wrote.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    jobs: Annotated[int, typer.Option(help="Members scored side by side, one thread each.")] = 1,
    device: Annotated[str, typer.Option(help="PyTorch device that patterns are optimised on.")] = "cpu",
    force: Force = False,
) -> object:
    """Measure what honest encoders score, for `freqdoor audit --calibration`."""
    load_torch()
    calibration = freqdoor.calibrate_audit(fleets, out, jobs=jobs, device=device, force=force, note=note)
    for population in calibration.populations:
        say(f"{population.architecture}: {len(population.members)} honest encoders")
    say(f"Calibration: {out}")
    return calibration


@verb(kept=NOTHING_KEPT)
def doctor(
    checkpoint: Checkpoint,
    weights: Weights = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the report.")] = None,
    fix: Annotated[Path | None, typer.Option(help="Safetensors file for the mended codec.")] = None,
    sarif: Sarif = None,
    junit: Junit = None,
    force: Force = False,
) -> object:
    """What is wrong with a codec's checkpoint, and what to do? Exit code 0 healthy, 1 wrong, 2 cannot be judged."""
    load_torch()
    result = freqdoor.doctor(
        checkpoint, weights=weights, out=out, fix=fix, sarif=sarif, junit=junit, force=force, note=note
    )
    for row in result.symptoms:
        say(f"{row.severity}: {row.what}: {row.said}. What to do: {row.remedy}.")
    if (seen := result.behaviour) is not None:
        say(
            f"on {seen.crops} Kodak crops of {seen.side} pixels: {seen.bpp_estimated:.3f} bpp estimated, "
            f"{seen.bpp_real:.3f} real, {seen.psnr_db:.2f} dB, {seen.channels - len(seen.dead_channels)} of "
            f"{seen.channels} channels in use"
        )
    if result.unexamined is not None:
        say(f"not looked at: {result.unexamined}")
    for line in filter(None, (result.fix, f"{checkpoint}: {result.verdict}")):
        say(line)
    if out is not None:
        say(f"Report: {out}")
    return result


@verb("calibrate-guard")
def calibrate_guard(
    codec: Checkpoint,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    images: Annotated[Path, typer.Option(help="Clean photographs; by default Kodak's.")] = KODAK,
    weights: Weights = None,
    force: Force = False,
) -> object:
    """Measure what a codec needs for clean photographs, for `freqdoor compress --guard`."""
    load_torch()
    calibration = freqdoor.calibrate_guard(codec, images, out, weights=weights, force=force, note=note)
    say(f"Calibration on {calibration.photographs} photographs: {out}")
    return calibration


@verb(kept="the steps of the repair are kept, and the same command goes on after them")
def repair(
    checkpoint: Checkpoint,
    out: Out,
    weights: Weights = None,
    reference: Annotated[str | None, typer.Option(help="A trusted codec with the same decoder, for distil.")] = None,
    images: Annotated[Path | None, typer.Option(help="Clean images; by default 18 of Kodak's.")] = None,
    method: Annotated[
        str | None, typer.Option(help="finetune, or of unlearn, inverted, sam, prune, distil, joined by +.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; by default 250.")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Audit with the checks that find most.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="What honest encoders score, of calibrate-audit.")] = None,
    overrides: Overrides = None,
) -> object:
    """Fine-tune an encoder until patterns do nothing, and audit it again; exit code 1 where it is still tampered."""
    given = {"reference": reference, "images.folder": images, "method": method, "steps": steps}
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    settings = load_settings(freqdoor.RepairSettings, None, [*(overrides or ()), *words])
    load_torch()
    with live(settings.steps, "repairing") as progress:
        result = freqdoor.repair(
            checkpoint,
            out,
            weights=weights,
            fast=fast,
            calibration=calibration,
            settings=settings,
            progress=progress,
            note=note,
        )
    for name, answer in (("before", result.before), ("after", result.after)):
        say(f"clean pictures {name}: {answer.bpp:.4f} bpp, {answer.psnr_db:.2f} dB")
    say(f"audit: {result.audit.verdict}: {result.audit.reason}")
    say(f"Repaired codec: {out / 'codec.safetensors'}")
    return result
