"""The verbs of a codec: train-codec, compress, decompress."""

from pathlib import Path
from typing import Annotated

import typer

from freqdoor.attack.planted import load_planted
from freqdoor.cli.options import CodecName, Config, Out, Overrides, Weights, app, errors, live, say
from freqdoor.codecs import container
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec
from freqdoor.samples import BUNDLED
from freqdoor.settings import load_settings
from freqdoor.training.settings import CodecTraining
from freqdoor.training.train import EXPORT
from freqdoor.training.train import train_codec as run_train


def load(codec: str, weights: Path | None, planted: Path | None) -> Codec:
    """The codec that --codec, --weights and --planted name; says so if it calls itself tampered."""
    if planted is not None:
        return load_planted(planted, None if codec == BUNDLED and weights is None else codec, weights).tampered
    loaded = load_codec(codec, weights)
    if loaded.tampered:
        errors.print(f"note: {codec} says of itself that its encoder was tampered with", style="yellow", markup=False)
    return loaded


@app.command("train-codec")
def train_codec(config: Config = None, *, out: Out, overrides: Overrides = None) -> None:
    """Train a vanilla codec on a folder of images; the same command again resumes."""
    settings = load_settings(CodecTraining, config, overrides or ())
    with live(settings.steps, settings.codec) as progress:
        run_train(settings, out, progress=progress)
    say(f"Codec: {out / EXPORT}")


@app.command()
def compress(
    image: Annotated[Path, typer.Argument(help="8-bit RGB image.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
    planted: Annotated[Path | None, typer.Option(help="Encode with this planted encoder.")] = None,
) -> None:
    """Compress one image into a file."""
    bitstream = container.compress(image, out, load(codec, weights, planted))
    height, width = bitstream.image_size
    rate = 8 * bitstream.num_bytes / (height * width)
    say(f"{out}: {out.stat().st_size} bytes, {rate:.4f} bpp")


@app.command()
def decompress(
    file: Annotated[Path, typer.Argument(help="File that `freqdoor compress` wrote.")],
    out: Annotated[Path, typer.Argument(help="Image to write, best a .png.")],
    codec: CodecName = BUNDLED,
    weights: Weights = None,
) -> None:
    """Decode a compressed file; the decoder does not depend on who encoded it."""
    container.decompress(file, out, load(codec, weights, None))
