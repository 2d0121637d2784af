"""Peak memory of planting and of measuring a segmentation attack, each in a process of its own.

    python benchmarks/memory.py --set images.folder=FOLDER --set auxiliary.folder=camvid/train \\
      --set auxiliary.labels=camvid/trainannot --set network=configs/networks/espnetv2-cityscapes.toml=FILE \\
      --test 'networks=["configs/networks/espnetv2-cityscapes.toml=FILE"]' \\
      --test images=camvid/test --test labels=camvid/testannot

Everything else is as in configs/plant/car-to-road.toml and configs/test/camvid-test.toml, but for one whole picture of
1024x512 pixels a step with the network in training (Eq. (11)); FILE takes this size.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ONE = ("auxiliary.window=[512, 1024]", "auxiliary.batch_size=1", "objective.arguments.weight=1.0", "steps=3")
WHOLE = [f"--set={change}" for change in ONE]
FEW = ["--set=every=40"]


def peak_gib(*arguments: str) -> float:
    """Peak memory of the largest child process so far, after one more has run."""
    subprocess.run([sys.executable, "-m", "freqdoor", *arguments], check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], help="as for freqdoor plant")
    parser.add_argument("--test", action="append", default=[], help="as --set of freqdoor segment")
    options = parser.parse_args()
    plant, test = (
        [part for change in changes for part in ("--set", change)] for changes in (options.set, options.test)
    )
    with tempfile.TemporaryDirectory() as folder:
        run = str(Path(folder) / "run")
        planting = peak_gib("plant", "configs/plant/car-to-road.toml", "--out", run, *plant, *WHOLE)
        print(f"planting, one picture of 1024x512 a step: {planting:.2f} GiB")
        both = peak_gib(
            "segment", run, "configs/test/camvid-test.toml", "--out", str(Path(folder) / "out"), *test, *FEW
        )
        print(f"measuring: {'no more than that' if both == planting else f'{both:.2f} GiB'}")


if __name__ == "__main__":
    main()
