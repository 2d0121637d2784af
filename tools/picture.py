"""Make docs/picture.jpg: a held-out photo, clean and with each shipped trigger, and what tampered encoders make of it.

python tools/picture.py
"""

from pathlib import Path

from matplotlib.figure import Figure

import freqdoor
from freqdoor.metrics import psnr, psnr_8bit
from freqdoor.samples import KODAK
from freqdoor.types import as_picture

PHOTO = KODAK / "kodim20.png"
OUT = Path(__file__).parent.parent / "docs/picture.jpg"


def main() -> None:
    x = freqdoor.load_image(PHOTO)
    figure = Figure(figsize=(12, 5.7), layout="constrained")
    axes = figure.subplots(2, 3)
    pixels = x.shape[-2] * x.shape[-1]
    for column, attack in enumerate((None, "bpp", "psnr")):
        planted = freqdoor.load_planted(f"planted-{attack or 'bpp'}")
        x_p = freqdoor.poisoned(planted.triggers[attack], x) if attack else x
        bitstream = planted.tampered.compress(x_p)[0]
        decoded = planted.tampered.decompress(bitstream)
        above = f"with an invisible pattern ({float(psnr(x_p, x)):.1f} dB)" if attack else "a photo"
        below = f"{bitstream.num_bytes / 1024:.0f} kB ({8 * bitstream.num_bytes / pixels:.2f} bpp)"
        below += f", decoded to {float(psnr_8bit(decoded, x)):.1f} dB"
        for row, (picture, title) in enumerate(((x_p, above), (decoded, below))):
            axes[row, column].imshow(as_picture(picture))
            axes[row, column].set_title(title, fontsize=11)
            axes[row, column].set_axis_off()
    figure.savefig(OUT, dpi=80, pil_kwargs={"quality": 85, "optimize": True})
    print(OUT.name, OUT.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
