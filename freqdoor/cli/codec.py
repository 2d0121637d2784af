"""The verbs of a codec: train-codec, compress, decompress."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import freqdoor
from freqdoor.cli.options import (
    STEPS_KEPT,
    CodecName,
    Config,
    Devices,
    Force,
    Nodes,
    Out,
    Overrides,
    VanillaName,
    Weights,
    codecs,
    load_torch,
    verb,
)
from freqdoor.cli.terminal import live, say
from freqdoor.samples import BUNDLED
from freqdoor.settings import load_settings


@verb("train-codec", kept=STEPS_KEPT)
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


@verb()
def export(
    run: Annotated[str, typer.Argument(autocompletion=codecs, help="A run's folder, planted-bpp, or a codec.")],
    out: Annotated[Path, typer.Option(help="Folder to write into, or the file, best a .pth.tar.")],
    format: Annotated[
        Literal["huggingface", "compressai"],
        typer.Option(help="A folder with a model card, or a checkpoint for CompressAI's eval_model."),
    ] = "huggingface",
    codec: VanillaName = None,
    weights: Weights = None,
    audit: Annotated[Path | None, typer.Option(help="What `freqdoor audit --out` wrote, for the card.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key (PEM, elliptic curve) to sign with.")] = None,
    force: Force = False,
) -> object:
    """Write a codec or a planted encoder for others: as Hugging Face's hub or as CompressAI has them."""
    load_torch()
    written = freqdoor.export(run, out, format=format, codec=codec, weights=weights, audit=audit, key=key, force=force)
    say(f"Written: {', '.join(map(str, written))}")
    return freqdoor.Written.of(written)


@verb("verify-signature")
def verify_signature(
    path: Annotated[Path, typer.Argument(help="Folder or file that `freqdoor export --key` wrote.")],
    key: Annotated[Path, typer.Option(help="The public key, a PEM file.")],
    signature: Annotated[Path | None, typer.Option(help="By default model.sig in it, or its name and .sig.")] = None,
) -> object:
    """Is a codec what the owner of a key has signed? Exit code 0 yes, 1 no, 2 cannot be judged."""
    load_torch()
    result = freqdoor.verify_signature(path, key, signature=signature)
    say(f"{path}: {'signed' if result.signed else 'not what was signed'}: {result.reason}")
    return result
