"""What coding with context models costs: CompressAI's own compress and decompress, and ours, in turn in one run.

A Kodak picture's crop through networks of random weights at full width, whose loops and tables cost what trained ones
cost; --codec takes others. The first column is the network's own method as CompressAI has it, on as many threads as
PyTorch has; the second is freqdoor's `Codec`. "loops" are the same without g_a or g_s. The strings are compared.

    python benchmarks/context_models.py --rounds 5
    python benchmarks/context_models.py --threads 1 --codec mbt2018:3=mbt2018.pth.tar
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ratios import add_json, ratio, save

import freqdoor
from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.codecs.loading import load_codec
from freqdoor.codecs.protocol import read_compress
from freqdoor.data import centre, load_image

PICTURE = Path(freqdoor.__file__).parent / "assets/kodak/kodim05.png"
CODECS = (
    "mbt2018:3",
    "cheng2020-anchor:3",
    "cheng2020-attn:3",
    "cheng2020-anchor-checkerboard:3",
    "elic2022-official:3",
)
GOALS = {"compress": ">= 20", "decompress": ">= 10"}


def opened(name: str) -> Codec:
    """A codec by name, or by name=weights."""
    name, _, weights = name.partition("=")
    if weights:
        return load_codec(name, weights).prepare()
    torch.manual_seed(0)
    codec = build_codec(parse_name(name))
    codec.update(force=True)
    return codec.prepare()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


@torch.no_grad()
def measure(codec: Codec, x: torch.Tensor, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds of both ways by work, round by round."""
    clock: dict[str, float] = {}
    for name in ("g_a", "g_s"):
        part = codec.part(name)
        part.register_forward_pre_hook(lambda m, i, name=name: clock.update({name: -time.perf_counter()}))
        part.register_forward_hook(lambda m, i, y, name=name: clock.update({name: clock[name] + time.perf_counter()}))
    seconds: dict[str, tuple[list[float], list[float]]] = {
        work: ([], []) for work in ("compress", "decompress", "loops, encoding", "loops, decoding")
    }

    def run(column: int, encode: Callable[[], Any], decode: Callable[[Any], Any]) -> Any:
        spent, coded = timed(encode)
        seconds["compress"][column].append(spent)
        seconds["loops, encoding"][column].append(spent - clock["g_a"])
        spent, _ = timed(lambda: decode(coded))
        seconds["decompress"][column].append(spent)
        seconds["loops, decoding"][column].append(spent - clock["g_s"])
        return coded

    ways = [
        lambda: run(0, lambda: codec.net.compress(x), lambda o: codec.net.decompress(o["strings"], o["shape"])),
        lambda: run(1, lambda: codec.compress(x)[0], codec.decompress),
    ]
    for way in ways:
        way()
    for values in seconds.values():
        values[0].clear(), values[1].clear()
    for turn in range(rounds):
        coded = {i: ways[i]() for i in ((0, 1) if turn % 2 else (1, 0))}
        theirs = read_compress(coded[0], codec.spec.name).strings
        if theirs != coded[1].strings and torch.get_num_threads() == 1:  # with more, CompressAI's hang on their number
            raise SystemExit(f"{codec.spec.name}: the strings differ")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", action="append")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_json(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = centre(load_image(PICTURE), arguments.side)
    print(f"{arguments.side} x {arguments.side} pixels, {arguments.threads} threads, {arguments.rounds} rounds, ms")
    print(f"{'':32}{'':18}{'compressai':>11}{'freqdoor':>10}   times faster")
    rows = []
    for name in arguments.codec or CODECS:
        for work, (theirs, ours) in measure(opened(name), x, arguments.rounds).items():
            row = ratio(f"{name}, {work}", "time of CompressAI's / ours", theirs, ours, GOALS.get(work, ""))
            before, now = (1000 * statistics.median(values) for values in (theirs, ours))
            print(f"{name:32}{work:18}{before:11.0f}{now:10.0f}   {row}", flush=True)
            rows.append(row)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
