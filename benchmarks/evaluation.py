"""What `freqdoor evaluate` costs beyond the bare passes through the codecs: encoding and decoding of the same pictures.

Both are run in turn, round by round, in one process on one thread; CPU time, of each the least of the rounds. The goal
is <= 1.2x. What `evaluate` adds: triggers, PNG files, estimated rates, PSNR, MS-SSIM, curves of JPEG and a report.

    python benchmarks/evaluation.py --images 24 --rounds 3 --planted planted-bpp
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from freqdoor import Planted, evaluate, load_image, load_planted
from freqdoor.measure.records import conditions, input_of
from freqdoor.samples import pictures
from freqdoor.types import Images

GOAL = 1.2


def bare(planted: Planted, inputs: list[tuple[str, Images]]) -> None:
    """Every picture encoded and decoded by the encoder of its role."""
    for role, x in inputs:
        codec = planted.codec("tampered" if role == "tampered" else "vanilla")
        codec.decompress(codec.compress(x)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", default="planted-bpp")
    parser.add_argument("--codec", help="as for freqdoor evaluate")
    parser.add_argument("--images", type=int, default=24, help="how many of Kodak's")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    planted, paths = load_planted(arguments.planted, arguments.codec), pictures()[: arguments.images]
    asked = conditions(planted.triggers)
    inputs = [(row.role, input_of(planted, load_image(path), row)) for path in paths for row in asked]
    seconds: dict[str, list[float]] = {"bare": [], "evaluate": []}
    for index in range(arguments.rounds + 1):  # the first round loads what is imported when it is needed
        with tempfile.TemporaryDirectory() as folder:
            for name in seconds:
                few = slice(None) if index else slice(len(asked))
                started = time.process_time()
                if name == "bare":
                    bare(planted, inputs[few])
                else:
                    evaluate(planted, paths[: None if index else 1], Path(folder) / "out")
                if index:
                    seconds[name].append(time.process_time() - started)
    least = {name: min(values) for name, values in seconds.items()}
    more = (least["evaluate"] - least["bare"]) / len(inputs)
    print(
        f"{planted.vanilla.spec.name}, {len(paths)} x {len(asked)}: bare passes {least['bare']:.1f} s, "
        f"evaluate {least['evaluate']:.1f} s, {1000 * more:.0f} ms more a pass; "
        f"{least['evaluate'] / least['bare']:.2f}x (goal: <= {GOAL}x)"
    )


if __name__ == "__main__":
    main()
