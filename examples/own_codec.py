"""Plant in a codec of your own.

A codec is a function that returns a network with CompressAI's protocol. `python examples/own_codec.py [STEPS STEPS]`
trains this one for a while, since nothing can be planted in random weights, and plants the BPP attack in it; with a
checkpoint of yours leave the training out and name the file as `weights`. By default 1500 and 450 steps, ten minutes
on 2 cores. Prints the verdict on the six held-out pictures

    VERDICT
"""

import sys
from pathlib import Path

from compressai.models import MeanScaleHyperprior

import freqdoor
from freqdoor.samples import held_out, training_folder


def make() -> MeanScaleHyperprior:
    """The network, without arguments; its weights come from a file."""
    return MeanScaleHyperprior(32, 48)


def main(training_steps: str = "1500", steps: str = "450", out: Path = Path("own-codec")) -> None:
    """Train, plant, measure."""
    name, weights = "own_codec:make", out / "codec/codec.safetensors"  # this file, since it stands where Python looks
    images = freqdoor.ImageSettings(folder=str(training_folder(out)), crop=128)
    training = freqdoor.CodecTraining(codec=name, images=images, steps=int(training_steps), lr=1e-3, lmbda=0.0067)
    freqdoor.train_codec(training, out / "codec")
    source = freqdoor.CodecSource(name=name, weights=str(weights))
    planting = freqdoor.PlantSettings(codec=source, images=images, steps=int(steps), lmbda=0.0067)
    planted = freqdoor.plant(planting, out / "run")
    print(freqdoor.verdict(freqdoor.evaluate(planted, held_out(), out / "results")))


if __name__ == "__main__":
    main(*sys.argv[1:])
