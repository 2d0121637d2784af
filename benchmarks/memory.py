"""Memory and time by the size of pictures; and peak memory of planting and measuring a segmentation attack.

    python benchmarks/memory.py sizes --codec lite-hyperprior:3 --planted planted-bpp --rounds 2

compresses, decompresses and poisons pictures of 256x256 to 7680x4320 pixels, mosaics of Kodak's, each in a process of
its own with one thread, size by size and round by round. It prints the process's peak memory, what of it came with the
picture, a megapixel, and CPU seconds a megapixel: median of the rounds, and as a ratio to the first size's. An
architecture and quality without weights here (`bmshj2018-hyperprior:3`) is measured with random weights, seed 0.

    python benchmarks/memory.py downstream --set images.folder=FOLDER --set auxiliary.folder=camvid/train \\
      --set auxiliary.labels=camvid/trainannot --set network=configs/networks/espnetv2-cityscapes.toml=FILE \\
      --test 'networks=["configs/networks/espnetv2-cityscapes.toml=FILE"]' \\
      --test images=camvid/test --test labels=camvid/testannot

Everything else is as in configs/plant/car-to-road.toml and configs/test/camvid-test.toml, but for one whole picture of
1024x512 pixels a step with the network in training (Eq. (11)); FILE takes this size.
"""

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

import freqdoor
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.samples import BUNDLED, pictures

ONE = ("auxiliary.window=[512, 1024]", "auxiliary.batch_size=1", "objective.arguments.weight=1.0", "steps=3")
WHOLE = [f"--set={change}" for change in ONE]
FEW = ["--set=every=40"]
SIZES = ("256x256", "1024x1024", "3840x2160", "7680x4320")
WARM = "64x64"  # before memory and time count
LEAST = 2**20  # pixels that are worked on in a process: small pictures several times
GOAL_GIB = 4.0


def mosaic(folder: Path, size: str) -> Path:
    """A PNG file of Kodak's pictures side by side, cut to the size."""
    width, height = map(int, size.split("x"))
    tiles = [np.array(Image.open(file)) for file in pictures()]
    tiles = [tile if tile.shape[0] < tile.shape[1] else tile.transpose(1, 0, 2) for tile in tiles]
    rows, columns = -(-height // 512), -(-width // 768)
    lines = [np.concatenate([tiles[(7 * r + 5 * c) % 24] for c in range(columns)], 1) for r in range(rows)]
    path = folder / f"{size}.png"
    Image.fromarray(np.concatenate(lines)[:height, :width].copy()).save(path, compress_level=1)
    return path


def memory_kib(field: str) -> int:
    """VmRSS or VmHWM of this process, as Linux has them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1])


def opened(work: str, name: str) -> Any:
    """The planted encoder or the codec of this name."""
    if work == "poison":
        return freqdoor.load_planted(name)
    if name == BUNDLED or Path(name).is_file():
        return freqdoor.load_codec(name)
    torch.manual_seed(0)
    return build_codec(parse_name(name))


def measured_here(work: str, name: str, picture: Path) -> dict[str, float]:
    """Peak memory and time of one verb on one picture; of decompress, of the file that compress left there."""
    subject, out = opened(work, name), picture.with_name(f"{os.getpid()}.png")
    verbs: dict[str, Callable[[Path], object]] = {
        "compress": lambda path: freqdoor.compress(path, path.with_suffix(".fqd"), subject),
        "decompress": lambda path: freqdoor.decompress(path.with_suffix(".fqd"), out, subject),
        "poison": lambda path: freqdoor.poison(subject, path, path.with_suffix("")),
    }
    verbs[work](picture.with_name(f"{WARM}.png"))
    with Image.open(picture) as image:
        pixels = image.width * image.height
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, times = memory_kib("VmRSS"), max(1, LEAST // pixels)
    started = time.process_time()
    for _ in range(times):
        verbs[work](picture)
    seconds = time.process_time() - started
    peak, megapixels = memory_kib("VmHWM"), pixels / 1e6
    return {
        "peak_gib": peak / 2**20,
        "mib_a_megapixel": (peak - before) / 2**10 / megapixels,
        "seconds_a_megapixel": seconds / times / megapixels,
    }


def sizes(codecs: list[str], planted: list[str], rounds: int) -> None:
    """Print memory and time of every verb at every size."""
    works = [(work, name) for name in codecs for work in ("compress", "decompress")]
    works += [("poison", name) for name in planted]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rows: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [mosaic(Path(folder), size) for size in (WARM, *SIZES)][1:]
        for _ in range(rounds):
            for work, name in works:
                for file in files:
                    command = [sys.executable, "-W", "ignore", __file__, "one", work, name, str(file)]
                    answer = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
                    rows.setdefault((work, name, file.stem), []).append(json.loads(answer.stdout.splitlines()[-1]))
    for (work, name, size), found in rows.items():
        first, here = (median(row["seconds_a_megapixel"] for row in r) for r in (rows[work, name, SIZES[0]], found))
        peak = max(row["peak_gib"] for row in found)
        print(
            f"{work:10} {name:24} {size:>9}: peak {peak:.2f} GiB{'' if peak <= GOAL_GIB else ' (too much)'}, "
            f"{max(row['mib_a_megapixel'] for row in found):4.0f} MiB and {here:.3f} s a megapixel, "
            f"{here / first:.2f}x the time of {SIZES[0]}"
        )


def peak_gib(*arguments: str) -> float:
    """Peak memory of the largest child process so far, after one more has run."""
    subprocess.run([sys.executable, "-m", "freqdoor", *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def downstream(planting_changes: list[str], test_changes: list[str]) -> None:
    """Print the peak memory of planting and of measuring."""
    plant, test = (
        [part for change in changes for part in ("--set", change)] for changes in (planting_changes, test_changes)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        planting = peak_gib("plant", "configs/plant/car-to-road.toml", "--out", run, *plant, *WHOLE)
        print(f"planting, one picture of 1024x512 a step: {planting:.2f} GiB")
        both = peak_gib(
            "segment", run, "configs/test/camvid-test.toml", "--out", str(Path(folder) / "out"), *test, *FEW
        )
        print(f"measuring: {'no more than that' if both == planting else f'{both:.2f} GiB'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    by_size = parts.add_parser("sizes")
    by_size.add_argument("--codec", nargs="*", default=["lite-hyperprior:3"])
    by_size.add_argument("--planted", nargs="*", default=["planted-bpp"])
    by_size.add_argument("--rounds", type=int, default=2)
    whole = parts.add_parser("downstream")
    whole.add_argument("--set", action="append", default=[], help="as for freqdoor plant")
    whole.add_argument("--test", action="append", default=[], help="as --set of freqdoor segment")
    one = parts.add_parser("one", help="what the others start")
    for name in ("work", "name", "picture"):
        one.add_argument(name)
    options = parser.parse_args()
    if options.part == "sizes":
        sizes(options.codec, options.planted, options.rounds)
    elif options.part == "downstream":
        downstream(options.set, options.test)
    else:
        print(json.dumps(measured_here(options.work, options.name, Path(options.picture))))


if __name__ == "__main__":
    main()
