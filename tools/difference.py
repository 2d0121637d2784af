"""How far apart two rows of a table of `freqdoor reproduce` are: the 95 % interval of the difference of their means.

Welch's, over the seeds that the table's JSON has. Two rows whose own intervals overlap may still differ; an interval
that has 0 in it leaves undecided which of the two is larger.

    python tools/difference.py docs/results/figure4.json 'ours' 'LIRA' 'poisoned bpp'
"""

import argparse
import json
from pathlib import Path

from scipy.stats import ttest_ind


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="NAME.json that `freqdoor reproduce` wrote")
    parser.add_argument("first", help="a row's name")
    parser.add_argument("second", help="another one's")
    parser.add_argument("column")
    arguments = parser.parse_args()
    if not arguments.table.is_file():
        parser.error(f"{arguments.table}: expected a file that freqdoor reproduce wrote, found none")
    table = json.loads(arguments.table.read_text(encoding="utf-8"))["table"]
    for row in (arguments.first, arguments.second):
        if arguments.column not in table.get(row, {}):
            parser.error(f"row {row!r}, column {arguments.column!r}: the rows are {', '.join(table)}")
    a, b = (table[row][arguments.column]["values"] for row in (arguments.first, arguments.second))
    low, high = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    said = "undecided" if low <= 0 <= high else "decided"
    means = sum(a) / len(a), sum(b) / len(b)
    print(f"{arguments.column}: {means[0]:.4f} - {means[1]:.4f}, difference {low:+.4f} to {high:+.4f}: {said}")


if __name__ == "__main__":
    main()
