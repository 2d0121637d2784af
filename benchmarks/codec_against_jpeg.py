"""A codec against JPEG at equal real rate, on a folder of images (the bundled Kodak-24 by default).

python benchmarks/codec_against_jpeg.py --codec lite-hyperprior:3
"""

import argparse
from pathlib import Path

import numpy as np

from freqdoor.codecs.loading import load_codec
from freqdoor.data import list_images, load_image
from freqdoor.measure.records import Condition, jpeg_curve, measure
from freqdoor.measure.report import means
from freqdoor.samples import KODAK

QUALITIES = (6, 8, 10, 12, 15, 17, 20, 22, 25, 30, 35, 40, 50, 60, 70, 80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="lite-hyperprior:3")
    parser.add_argument("--weights")
    parser.add_argument("--images", type=Path, default=KODAK)
    arguments = parser.parse_args()
    codec, paths = load_codec(arguments.codec, arguments.weights), list_images(arguments.images)
    images = [(path, load_image(path)) for path in paths]
    row = means([measure(codec, x, x, path.name, Condition("vanilla", None))[0] for path, x in images])
    print(
        f"{arguments.codec} on {len(paths)} images: {row.psnr_db:.2f} dB at {row.bpp_real:.4f} bpp "
        f"(estimated {row.bpp_estimated:.4f}), {row.encode_seconds:.2f} s to encode one"
    )
    curve = jpeg_curve(paths, QUALITIES)
    jpeg = float(np.interp(np.log(row.bpp_real), [np.log(p.bpp) for p in curve], [p.psnr_db for p in curve]))
    print(f"JPEG (Pillow, optimised, progressive, 4:2:0) at {row.bpp_real:.4f} bpp: {jpeg:.2f} dB")
    print(f"difference: {row.psnr_db - jpeg:+.2f} dB")


if __name__ == "__main__":
    main()
