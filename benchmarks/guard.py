"""What a guard costs, and whom it stops among clean images: ratios measured side by side, counts with their intervals.

Each image is compressed by the codec alone, behind a guard that looks at the rate only, and behind one that decodes and
compares as well, in turn, round by round; CPU time of this process. The goals are <= 1.3x and <= 2.5x. Then clean
images: photographs of the folders given, and artificial ones of each source; false alarms with exact (Clopper-Pearson)
95 % intervals. Nothing of them was calibrated on, if the calibration is the one that comes along and no folder Kodak's.

    python benchmarks/guard.py --photographs imagenet_sample --each 100
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from scipy.stats import binomtest

from freqdoor import Guard, artificial, guard_rates, list_images, load_codec, load_image
from freqdoor.defence.sources import SOURCES
from freqdoor.samples import KODAK
from freqdoor.types import Images

GOALS = {"rate": 1.3, "rate and verify": 2.5}
SEED = 100  # of the artificial images: none that the guard's limits were chosen on


def seconds(work: Callable[[Images], object], x: Images) -> float:
    started = time.process_time()
    work(x)
    return time.process_time() - started


def overheads(codec_name: str, calibration: Path | None, images: list[Images], rounds: int) -> None:
    """Print what both guards cost, as ratios of the codec alone."""
    codec = load_codec(codec_name)
    ways: dict[str, Callable[[Images], object]] = {
        "codec": codec.compress,
        "rate": Guard(codec, calibration, verify=False).compress,
        "rate and verify": Guard(codec, calibration).compress,
    }
    codec.compress(images[0])
    ratios: dict[str, list[float]] = {name: [] for name in GOALS}
    for x in images:
        rows = [{name: seconds(way, x) for name, way in ways.items()} for _ in range(rounds)]
        least = {name: min(row[name] for row in rows) for name in ways}  # what other processes added is left out
        for name, values in ratios.items():
            values.append(least[name] / least["codec"])
    for name, values in ratios.items():
        print(
            f"{name:16} {statistics.mean(values):.2f}x the time of encoding alone, "
            f"median {statistics.median(values):.2f}, most {max(values):.2f} (goal: <= {GOALS[name]}x)",
            flush=True,
        )


def alarms(codec_name: str, calibration: Path | None, sources: dict[str, list[Images]]) -> None:
    """Print how many clean images of every source are stopped."""
    codec, totals = load_codec(codec_name), [0, 0]
    for name, images in sources.items():
        clean = guard_rates(codec, calibration, images, []).clean
        totals = [totals[0] + clean.stopped, totals[1] + clean.images]
        print(f"{name:16} {said(clean.stopped, clean.images)}", flush=True)
    print(f"{'all':16} {said(*totals)}")


def said(stopped: int, images: int) -> str:
    """A share with its interval."""
    interval = binomtest(stopped, images).proportion_ci(0.95, method="exact")
    return f"{stopped:3} of {images:4} stopped, {stopped / images:6.2%} ({interval.low:.2%} to {interval.high:.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="lite-hyperprior:3")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--photographs", type=Path, nargs="*", default=[], help="folders of clean images")
    parser.add_argument("--each", type=int, default=20, help="clean images of every source")
    parser.add_argument("--timed", type=Path, default=KODAK, help="folder of the images that are timed")
    parser.add_argument("--images", type=int, default=8, help="how many of them")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def some(folder: Path, number: int) -> list[Images]:
        paths = list_images(folder)
        return [load_image(path) for path in paths[:: max(1, len(paths) // number)][:number]]

    overheads(arguments.codec, arguments.calibration, some(arguments.timed, arguments.images), rounds=arguments.rounds)
    sources = {folder.name: some(folder, arguments.each) for folder in arguments.photographs}
    sources |= {name: artificial(name, arguments.each, SEED) for name in SOURCES}
    alarms(arguments.codec, arguments.calibration, sources)


if __name__ == "__main__":
    main()
