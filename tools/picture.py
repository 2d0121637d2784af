"""Make the pictures of README and docs/attack.md from a held-out photo and the shipped encoders.

python tools/picture.py
"""

from pathlib import Path

from matplotlib.figure import Figure

import freqdoor
from freqdoor.measure.records import bit_map
from freqdoor.measure.report import AMPLIFY
from freqdoor.metrics import psnr, psnr_8bit
from freqdoor.plots import COLOURS, bits_plot, save_plot
from freqdoor.samples import KODAK
from freqdoor.types import as_picture

PHOTO = KODAK / "kodim20.png"
DOCS = Path(__file__).parent.parent / "docs"
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
ATTACKS = ("bpp", "psnr")
CLOSE = (slice(236, 364), slice(96, 224))  # the part of the photo that is shown pixel by pixel


def main() -> None:
    x = freqdoor.load_image(PHOTO)
    planted = {attack: freqdoor.load_planted(f"planted-{attack}") for attack in ATTACKS}
    save("picture", what_happens(x, planted))
    save("attack-pattern", the_pattern(x, planted["bpp"]))
    save("attack-strength", the_strength(x, planted))
    x_p = freqdoor.poisoned(planted["bpp"].triggers["bpp"], x)
    panels = {"vanilla, clean": (planted["bpp"].vanilla, x), "vanilla, poisoned": (planted["bpp"].vanilla, x_p)}
    panels |= {"tampered, clean": (planted["bpp"].tampered, x), "tampered, poisoned": (planted["bpp"].tampered, x_p)}
    maps = {name: bit_map(codec, image).numpy() for name, (codec, image) in panels.items()}
    save_plot(bits_plot(maps), DOCS / "attack-bits.png", force=True)


def what_happens(x: freqdoor.types.Images, planted: dict[str, freqdoor.Planted]) -> Figure:
    """A photo, clean and with each shipped trigger, and what tampered encoders make of it."""
    figure = Figure(figsize=(12, 5.7), layout="constrained")
    axes = figure.subplots(2, 3)
    pixels = x.shape[-2] * x.shape[-1]
    for column, attack in enumerate((None, *ATTACKS)):
        encoder = planted[attack or "bpp"]
        x_p = freqdoor.poisoned(encoder.triggers[attack], x) if attack else x
        bitstream = encoder.tampered.compress(x_p)[0]
        decoded = encoder.tampered.decompress(bitstream)
        above = f"with an invisible pattern ({float(psnr(x_p, x)):.1f} dB)" if attack else "a photo"
        below = f"{bitstream.num_bytes / 1024:.0f} kB ({8 * bitstream.num_bytes / pixels:.2f} bpp)"
        below += f", decoded to {float(psnr_8bit(decoded, x)):.1f} dB"
        for row, (picture, title) in enumerate(((x_p, above), (decoded, below))):
            axes[row, column].imshow(as_picture(picture))
            axes[row, column].set_title(title, fontsize=11)
            axes[row, column].set_axis_off()
    return figure


def the_pattern(x: freqdoor.types.Images, encoder: freqdoor.Planted) -> Figure:
    """A part of the photo, the pattern that is added to it, and their sum."""
    x_p = freqdoor.poisoned(encoder.triggers["bpp"], x)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    shown = {
        "clean": x,
        f"what is added, {AMPLIFY} times as strong": (0.5 + AMPLIFY * (x_p - x)).clamp(0, 1),
        "poisoned": x_p,
    }
    for axis, (title, picture) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        axis.imshow(as_picture(picture[..., *CLOSE]), interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    return figure


def the_strength(x: freqdoor.types.Images, planted: dict[str, freqdoor.Planted]) -> Figure:
    """Bits and decoded quality against the trigger's strength, by the tampered encoder and by the vanilla one."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rate, quality = figure.subplots(1, 2)
    for axis, attack in ((rate, "bpp"), (quality, "psnr")):
        encoder = planted[attack]
        inputs = [x, *(freqdoor.poisoned(encoder.triggers[attack], x, strength=s) for s in STRENGTHS)]
        for name, codec, colour in (
            ("tampered", encoder.tampered, "poisoned"),
            ("vanilla", encoder.vanilla, "vanilla"),
        ):
            bitstreams = [codec.compress(image)[0] for image in inputs]
            values = [
                8 * stream.num_bytes / x.shape[-2:].numel()
                if attack == "bpp"
                else float(psnr_8bit(codec.decompress(stream), x))
                for stream in bitstreams
            ]
            axis.plot((0, *STRENGTHS), values, "o-", color=COLOURS[colour], label=f"{name} encoder")
        axis.set_xlabel("strength of the trigger (1: as planted)")
        axis.set_title(f"planted-{attack}", fontsize=11)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    rate.set_ylabel("bits per pixel, real bytes")
    quality.set_ylabel("PSNR of the decoded picture, dB")
    return figure


def save(name: str, figure: Figure) -> None:
    path = DOCS / f"{name}.jpg"
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85, "optimize": True})
    print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
