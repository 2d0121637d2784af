"""All benchmarks of speed, as ratios measured side by side in one run: as the processor is, and held to AVX2.

Each benchmark is a process of its own and can be run alone; here with few rounds. Held to AVX2, neither PyTorch nor
oneDNN computes in bf16 or with AVX-512, as on processors that lack both. Other work on the machine hits both sides of a
ratio, but not evenly: the intervals (95 %, bootstrap over rounds) say how evenly.

    python benchmarks/speed.py --out speed.json --table speed.md
    python benchmarks/speed.py --only "context models" --short
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from ratios import Ratio, load

from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.run import environment

HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
SETS: dict[str, tuple[str, ...]] = {
    "context models": ("context_models.py", "--rounds=5"),
    "entropy coding": ("coding.py", "--rounds=2", "--pictures=6"),
    "planting step": ("planting_step.py", "--codec=bmshj2018-hyperprior:3", "--crop=256", "--rounds=5"),
    "planting step, bundled codec": ("planting_step.py", "--rounds=7"),
    "start": ("start_up.py", "--rounds=5"),
}
SHORT: dict[str, tuple[str, ...]] = {  # seconds instead of minutes: whether they run, and the order of magnitude
    "context models": ("--rounds=1", "--codec=mbt2018:1", "--side=128"),
    "entropy coding": ("--rounds=1", "--pictures=1"),
    "planting step": ("--rounds=1", "--crop=64", "--batch=2"),
    "planting step, bundled codec": ("--rounds=1", "--crop=64", "--batch=2"),
    "start": ("--rounds=1",),
}


def measured(command: list[str], held: bool) -> list[Ratio]:
    """The ratios of one benchmark, run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ratios.json"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(Path(__file__).parent / command[0]), *command[1:], f"--json={path}"],
            env=os.environ | (HELD if held else {}),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        return load(path)


def table(results: dict[str, dict[str, list[Ratio]]], columns: tuple[str, ...]) -> str:
    """Markdown: a line for each ratio, a column for each kind of processor."""
    lines = [f"| benchmark | | ratio | {' | '.join(columns)} | goal |", "|---|---|---|" + "---|" * (len(columns) + 1)]
    for name, by_column in results.items():
        for rows in zip(*(by_column[column] for column in columns), strict=True):
            values = " | ".join(map(str, rows))
            lines.append(f"| {name} | {rows[0].what} | {rows[0].of} | {values} | {rows[0].goal} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    parser.add_argument("--only", action="append", choices=SETS)
    parser.add_argument("--short", action="store_true", help="small and once: whether everything runs")
    parser.add_argument("--as-it-is", action="store_true", help="do not hold the processor to AVX2 as well")
    arguments = parser.parse_args()
    native = precision_name(dtype_of("auto", "cpu"))
    columns = (f"as it is ({native})",) if arguments.as_it_is else (f"as it is ({native})", "held to AVX2 (fp32)")
    results: dict[str, dict[str, list[Ratio]]] = {}
    started = time.monotonic()
    for name in arguments.only or SETS:
        command = [*SETS[name], *(SHORT[name] if arguments.short else ())]
        results[name] = {column: measured(command, held=i == 1) for i, column in enumerate(columns)}
        print(table({name: results[name]}, columns), flush=True)
    machine = environment()
    where = f"{machine.processor}, {machine.threads} threads, torch {torch.__version__}"
    if arguments.table:
        head = f"Made by `python benchmarks/speed.py --table {arguments.table.name}` on {where}.\n\n"
        arguments.table.write_text(head + table(results, columns))
    if arguments.out:
        plain = {name: {c: [asdict(r) for r in rows] for c, rows in each.items()} for name, each in results.items()}
        arguments.out.write_text(json.dumps({"machine": where, "results": plain}, indent=1))
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
