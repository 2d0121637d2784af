"""Plant in a codec of your own.

A codec is a function that returns a network with CompressAI's protocol, and a file with its weights; here the bundled
one's stand in for yours. `python examples/own_codec.py [STEPS]` plants the BPP attack in it, by default 350 steps (two
minutes on 2 cores). A codec without a quality has its lambda estimated, which a warning says. Prints the verdict on the
six held-out pictures

    On 6 images the tampered encoder treats clean images as the vanilla one does (30.48 dB at 0.402 bpp against
    30.29 dB at 0.380 bpp), but an invisible pattern (46.0 dB) makes the file 30.6 times as large (12.31 bpp);
    image by image 45.8 times in the median, 8.4 times at least, and it succeeds on 6 of 6.
"""

import sys
from pathlib import Path

import freqdoor
from freqdoor.codecs.lite import LiteHyperprior
from freqdoor.samples import ASSETS, held_out, training_folder


class Mine(LiteHyperprior):
    """g_a, g_s, h_a and h_s, with forward, compress, decompress and update as CompressAI has them."""


def make() -> Mine:
    """The network, without arguments."""
    return Mine()


CODEC = freqdoor.CodecSource(name="own_codec:make", weights=str(ASSETS / "lite-hyperprior-3.safetensors"))


def main(steps: str = "350", out: Path = Path("own-codec")) -> None:
    """Plant and measure; the same command goes on where it was stopped."""
    images = freqdoor.ImageSettings(folder=str(training_folder(out)), crop=128)
    planted = freqdoor.plant(freqdoor.PlantSettings(codec=CODEC, images=images, steps=int(steps)), out / "run")
    print(freqdoor.verdict(freqdoor.evaluate(planted, held_out(), out / "results")))


if __name__ == "__main__":
    main(*sys.argv[1:])
