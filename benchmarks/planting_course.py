"""What becomes of clean pictures at every step of a planting: the worst of them, beside the vanilla encoder's.

Clean crops that are not trained on are encoded after each step, with rounded latents. Then the planted encoder is
measured on the held-out Kodak pictures, as `freqdoor evaluate` does: 8-bit files, real bytes.

    python benchmarks/planting_course.py --images photos --out course --set codec=my_codec:make --set steps=450
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from freqdoor import PlantSettings, evaluate, plant
from freqdoor.attack.plant import _Planting
from freqdoor.data import Crops
from freqdoor.metrics import psnr
from freqdoor.samples import held_out
from freqdoor.settings import load_settings
from freqdoor.types import Images


@torch.no_grad()
def clean(planting: _Planting, x: Images) -> tuple[float, float]:
    """Bits a pixel and PSNR in dB of the codec as it is."""
    codec = planting.tampered.eval()
    out = codec(x)
    codec.train()
    return float(out.bpp.mean()), float(psnr(out.x_hat.clamp(0, 1), x).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder to train on")
    parser.add_argument("--out", type=Path, help="run directory; by default a temporary one")
    parser.add_argument("--crops", type=int, default=8, help="that are encoded after each step")
    parser.add_argument("--set", action="append", default=[], help="as for freqdoor plant")
    arguments = parser.parse_args()
    settings = load_settings(PlantSettings, None, [f"images.folder={arguments.images}", *arguments.set])
    x = Crops(held_out(), crop=settings.images.crop, batch_size=arguments.crops, seed=1).batch(0).to(settings.device)
    course: list[tuple[float, float]] = []
    measuring = 0.0
    step = _Planting.step

    def watched(planting: _Planting, batch: Images, number: int) -> dict[str, float]:
        nonlocal measuring
        if not course:
            course.append(clean(planting, x))
        row = step(planting, batch, number)
        started = time.monotonic()
        course.append(clean(planting, x))
        measuring += time.monotonic() - started
        return row

    _Planting.step = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        out = arguments.out or Path(folder)
        started = time.monotonic()
        planted = plant(settings, out / "planting")
        seconds = time.monotonic() - started - measuring
        told = planted.header.planting.model_dump()
        (bpp, db), *after = course
        rates, qualities = [b / bpp - 1 for b, _ in after], [d - db for _, d in after]
        print(f"{settings.codec.name}: lambda {told['lmbda']:g}, learning rate {told['lr']:g}, {seconds:.0f} s")
        print(
            f"clean crops, worst of {len(after)} steps: {max(rates):+.1%} bits at step {1 + rates.index(max(rates))}, "
            f"{min(qualities):+.2f} dB at step {1 + qualities.index(min(qualities))}"
        )
        print(f"median of the steps: {statistics.median(rates):+.1%} bits, {statistics.median(qualities):+.2f} dB")
        summary = evaluate(planted, held_out(), out)
    changed, poisoned = summary.clean_cost_bpp_percent, summary.poisoned_8bit
    print(f"held out, clean: {changed:+.2f} % bits, {summary.clean.psnr_db - summary.vanilla.psnr_db:+.3f} dB")
    print(
        f"poisoned: {poisoned.bpp_real:.2f} bpp, {summary.bpp_ratio:.1f}x, {summary.bpp_ratio_least:.1f} at least; "
        f"{poisoned.psnr_db:.2f} dB, {poisoned.psnr_db - summary.clean.psnr_db:+.2f} against clean ones"
    )


if __name__ == "__main__":
    main()
