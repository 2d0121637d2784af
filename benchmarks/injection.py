"""What injecting a trigger costs, as ratios measured side by side in one run.

The paper's trigger, AdaptiveDCT, with its defaults, against the U-Net baseline LIRA with 5 and 4 levels at two widths.
Each poisons the same image, in turn, round by round: eval mode, no gradient, with the projection to the budget that all
of them share. The goal is that AdaptiveDCT is >= 10x faster than the 5-level LIRA U-Net of width 64.

    python benchmarks/injection.py --rounds 5
"""

import argparse
import statistics
import time

import torch

from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import Trigger
from freqdoor.triggers.lira import Lira

GOAL = 10
AGAINST = "lira, 5 levels, width 64"  # LIRA's defaults


def triggers() -> dict[str, Trigger]:
    table: dict[str, Trigger] = {"adaptive-dct": AdaptiveDCT()}
    for width in (64, 16):
        for levels in (5, 4):
            table[f"lira, {levels} levels, width {width}"] = Lira(levels=levels, width=width)
    return {name: trigger.eval() for name, trigger in table.items()}


@torch.no_grad()
def measure(table: dict[str, Trigger], x: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of every trigger in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for turn in range(rounds + 1):
        for name, trigger in table.items():
            started = time.perf_counter()
            trigger(x)
            if turn > 0:  # the first round is the warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.rand(1, 3, arguments.height, arguments.width)
    table = triggers()
    seconds = measure(table, x, arguments.rounds)
    print(
        f"one image of {arguments.width}x{arguments.height}, CPU, {torch.get_num_threads()} threads, "
        f"median of {arguments.rounds} rounds"
    )
    ratios = {}
    for name, values in seconds.items():
        each = [value / base for value, base in zip(values, seconds["adaptive-dct"], strict=True)]
        ratios[name] = statistics.median(each)
        millions = sum(p.numel() for p in table[name].parameters()) / 1e6
        print(
            f"{name:24} {millions:6.2f} M parameters {1000 * statistics.median(values):8.1f} ms, "
            f"{ratios[name]:6.1f} x adaptive-dct"
        )
    print(f"goal: >= {GOAL}x faster than the 5-level LIRA U-Net; measured ({AGAINST}): {ratios[AGAINST]:.1f}x")


if __name__ == "__main__":
    main()
