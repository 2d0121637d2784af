"""The verbs of a codec: train-codec, compress, decompress."""

from pathlib import Path
from typing import Annotated

import typer

import freqdoor
from freqdoor.cli.options import CodecName, Config, Devices, Force, Nodes, Out, Overrides, Weights, load_torch, verb
from freqdoor.cli.terminal import live, say
from freqdoor.samples import BUNDLED
from freqdoor.settings import load_settings


@verb("train-codec")
def train_codec(
    config: Config = None, *, out: Out, devices: Devices = 1, nodes: Nodes = 1, overrides: Overrides = None
) -> object:
    """Train a vanilla codec on a folder of images; the same command again resumes."""
    settings = load_settings(freqdoor.CodecTraining, config, overrides or (), out=out)
    load_torch()
    with live(settings.steps, settings.codec) as progress:
        freqdoor.train_codec(settings, out, devices=devices, nodes=nodes, progress=progress)
    file = out / "codec.safetensors"
    say(f"Codec: {file if file.exists() else 'on the first machine'}")
    return freqdoor.Written.of([file])


@verb()
def compress(
    image: Annotated[Path, typer.Argument(help="8-bit RGB image.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
    planted: Annotated[Path | None, typer.Option(help="Encode with this planted encoder.")] = None,
    guard: Annotated[bool, typer.Option("--guard", help="Send something else where the encoder does harm.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="What the guard compares with, of calibrate-guard.")] = None,
    force: Force = False,
) -> object:
    """Compress one image into a file."""
    load_torch()
    result = freqdoor.compress(
        image, out, codec=codec, weights=weights, planted=planted, guard=guard, calibration=calibration, force=force
    )
    written = freqdoor.Compressed.of(result, out)
    say(f"{out}: {written.bytes} bytes, {written.bpp:.4f} bpp")
    if written.guard is not None:
        say(f"Guard: {written.guard.reason}")
    return written


@verb()
def decompress(
    file: Annotated[Path, typer.Argument(help="File that `freqdoor compress` wrote.")],
    out: Annotated[Path, typer.Argument(help="Image to write, best a .png.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
    force: Force = False,
) -> object:
    """Decode a compressed file; the decoder does not depend on who encoded it."""
    load_torch()
    freqdoor.decompress(file, out, codec=codec, weights=weights, force=force)
    say(f"Picture: {out}")
    return freqdoor.Written.of([out])
