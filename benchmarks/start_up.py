"""What it costs to start: seconds of commands that end at once, side by side, round by round.

Each command is timed as a whole process, in turn with bare Python and `import torch`; what is printed is the median
of its seconds, of what it takes beyond bare Python, and of what it takes beyond `import torch`.

    python benchmarks/start_up.py --rounds 7
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ratios import add_json, ratio, save

FREQDOOR = [sys.executable, "-W", "ignore", "-m", "freqdoor"]
WRONG = 'lr = "fast"\n[images]\ncrop = 63\n'


def commands(folder: Path) -> dict[str, list[str]]:
    """The commands by what they show; those after `import torch` need it."""
    config = folder / "wrong.toml"
    config.write_text(WRONG)
    picture = Path(__file__).parent.parent / "freqdoor/assets/kodak/kodim23.png"
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import freqdoor": [sys.executable, "-c", "import freqdoor"],
        "freqdoor --help": [*FREQDOOR, "--help"],
        "freqdoor --version": [*FREQDOOR, "--version"],
        "freqdoor plant --help": [*FREQDOOR, "plant", "--help"],
        "a wrong option": [*FREQDOOR, "plant", "--steps", "3"],
        "a wrong config": [*FREQDOOR, "plant", str(config), "--out", str(folder / "run")],
        "import torch": [sys.executable, "-W", "ignore", "-c", "import torch"],
        "compress of a picture that is not there": [*FREQDOOR, "compress", "absent.png", str(folder / "a.fqd")],
        "compress of 768x512 pixels": [*FREQDOOR, "compress", str(picture), str(folder / "b.fqd")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    add_json(parser)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = commands(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in table}
        for index in range(arguments.rounds + 1):  # the first round fills the disk cache
            for name, command in table.items():
                (Path(folder) / "b.fqd").unlink(missing_ok=True)
                started = time.perf_counter()
                subprocess.run(command, capture_output=True, check=False)
                if index:
                    seconds[name].append(time.perf_counter() - started)
    print(f"{'':42} seconds  beyond python  beyond import torch")
    for name, values in seconds.items():
        beyond = [
            statistics.median(a - b for a, b in zip(values, seconds[base], strict=True))
            for base in ("python -c pass", "import torch")
        ]
        print(f"{name:42} {statistics.median(values):7.2f} {beyond[0]:14.2f} {beyond[1]:20.2f}")
    save(
        arguments.json,
        [
            ratio(name, f"time / {base}", seconds[name], seconds[base])
            for name, base in (("freqdoor --help", "python -c pass"), ("compress of 768x512 pixels", "import torch"))
        ],
    )


if __name__ == "__main__":
    main()
