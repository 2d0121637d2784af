"""What entropy coding costs, with freqdoor's coder and with CompressAI's, as ratios measured side by side in one run.

Kodak pictures through the bundled codec, the two coders in turn, picture by picture:
  encode, decode          the entropy models alone: latents and their rows to strings, and back
  compress, decompress    the whole codec, g_a and g_s included
  decode by pixel         the latents of one 256x256 crop in steps of one pixel's channels, as a context model decodes

    python benchmarks/coding.py --rounds 3
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compressai import ans
from ratios import add_json, ratio, save
from torch import Tensor

import freqdoor
from freqdoor.codecs import coder as our
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.coding import CoderName, coding
from freqdoor.codecs.loading import load_codec
from freqdoor.data import load_image

KODAK = Path(freqdoor.__file__).parent / "assets/kodak"
CODERS: tuple[CoderName, ...] = ("compressai", "freqdoor")
GOALS = {"compress": "<= 1.1", "decompress": "<= 1.1"}


def timed(work: Callable[[], Any], seconds: list[float]) -> Any:
    started = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - started)
    return result


def by_pixel(decoder: Any, string: bytes, pixels: list[list[int]], tables: tuple[list[Any], ...]) -> list[list[int]]:
    decoder.set_stream(string)
    return [decoder.decode_stream(indexes, *tables) for indexes in pixels]


@torch.no_grad()
def results(codec: Codec, coder: CoderName, x: Tensor, seconds: dict[str, dict[str, list[float]]]) -> list[Any]:
    """All works of one picture, and what came out: the same for both coders."""
    net, codec.coder = codec.net, coder
    bottleneck, conditional = net.entropy_bottleneck, net.gaussian_conditional
    y = net.g_a(x)
    z = net.h_a(y)
    z_hat = bottleneck.decompress(bottleneck.compress(z), z.shape[-2:])
    scales, means = net.h_s(z_hat).chunk(2, 1)
    indexes = conditional.build_indexes(scales)

    def encode() -> tuple[list[bytes], list[bytes]]:
        with coding(coder):
            return bottleneck.compress(z), conditional.compress(y, indexes, means)

    def decode() -> None:
        with coding(coder):
            bottleneck.decompress(z_strings, z.shape[-2:])
            conditional.decompress(y_strings, indexes, means=means)

    z_strings, y_strings = timed(encode, seconds["encode"][coder])
    timed(decode, seconds["decode"][coder])
    [bitstream] = timed(lambda: codec.compress(x), seconds["compress"][coder])
    x_hat = timed(lambda: codec.decompress(bitstream), seconds["decompress"][coder])

    y_crop, index_crop = (latents[..., :16, :16].permute(0, 2, 3, 1) for latents in (y, indexes))
    [string] = conditional.compress(y_crop, index_crop)
    pixels = index_crop.reshape(256, -1).tolist()
    tables = tuple(getattr(conditional, name).tolist() for name in ("_quantized_cdf", "_cdf_length", "_offset"))
    decoder = our.Decoder() if coder == "freqdoor" else ans.RansDecoder()
    symbols = timed(lambda: by_pixel(decoder, string, pixels, tables), seconds["decode by pixel"][coder])
    return [z_strings, y_strings, bitstream.strings, x_hat.numpy().tobytes(), symbols]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="over all pictures")
    parser.add_argument("--pictures", type=int, default=24)
    add_json(parser)
    arguments = parser.parse_args()
    started = time.perf_counter()
    our.encode([], [], our.checked_tables([[0, 1, 1 << 16]], [3], [0]))
    print(f"first use: {time.perf_counter() - started:.2f} s, to import numba and to compile or to load the loops")

    codec = load_codec("lite-hyperprior:3")
    works = ("encode", "decode", "compress", "decompress", "decode by pixel")
    seconds: dict[str, dict[str, list[float]]] = {work: {coder: [] for coder in CODERS} for work in works}
    pictures = [load_image(path) for path in sorted(KODAK.glob("*.png"))[: arguments.pictures]]
    for turn in range(arguments.rounds):
        for i, x in enumerate(pictures):
            order = CODERS if (turn + i) % 2 else CODERS[::-1]
            first, second = (results(codec, coder, x, seconds) for coder in order)
            if first != second:
                raise SystemExit("the two coders differ")

    print(f"{len(pictures)} pictures, {arguments.rounds} rounds, {torch.get_num_threads()} threads, medians in ms")
    print(f"{'':16}{'compressai':>12}{'freqdoor':>12}   ratio")
    rows = []
    for work, columns in seconds.items():
        theirs, ours = (columns[coder] for coder in CODERS)
        rows.append(ratio(work, "time of ours / CompressAI's coder", ours, theirs, GOALS.get(work, "")))
        print(f"{work:16}{statistics.median(theirs) * 1e3:12.2f}{statistics.median(ours) * 1e3:12.2f}   {rows[-1]}")
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
