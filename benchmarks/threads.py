"""Whether files depend on the number of threads: each architecture's, of Kodak, written with 1 and read with 2.

Networks of the zoo's width at quality 3 have fixed random weights, scaled so that latents and tables' rows are spread
as in a trained codec; the bundled codec has its own. Every picture is written by one process and read by another, whose
numbers of threads differ, both ways round. A file counts as good where the two pictures differ by at most one of 255
levels. With `--control` all parts of a network run on as many threads as there are, as in CompressAI; what cannot be
decoded then is counted as bad. Context models take seconds a picture, so that theirs are crops from the centre.
`--price` measures what it costs: compress and decompress with all threads, the two ways in turn, in one process.

    python benchmarks/threads.py --out threads.json
    python benchmarks/threads.py --price --only bmshj2018-hyperprior
"""

import argparse
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import freqdoor
from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import ARCHITECTURES, parse_name
from freqdoor.data import load_image
from freqdoor.errors import FreqdoorError
from freqdoor.types import to_uint8

KODAK = Path(freqdoor.__file__).parent / "assets/kodak"
SERIAL = ("mbt2018", "cheng2020-anchor", "cheng2020-attn")  # decoded latent by latent
CROP = 256  # pixels a side, of pictures for these
SPREAD = {"g_a": 3.0, "h_a": 2.0, "h_s": 2.0, "entropy_parameters": 2.0}  # standard deviations of what parts give


@torch.no_grad()
def spread(net: nn.Module, x: Tensor) -> None:
    """Scale the last convolution of each part, in the order in which they run."""
    for name, deviation in SPREAD.items():
        for path, part in net.named_modules():
            if path.rpartition(".")[2] != name:
                continue
            outputs: list[Tensor] = []
            hook = part.register_forward_hook(lambda module, inputs, output, kept=outputs: kept.append(output))
            net(x)
            hook.remove()
            convolutions = [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
            if convolutions and outputs and isinstance(outputs[0], Tensor):
                convolutions[-1].weight.mul_(deviation / outputs[0].std())


def network(architecture: str) -> Codec:
    """The bundled codec, or an architecture of full width with random weights."""
    if architecture == "lite-hyperprior":
        return freqdoor.load_codec("lite-hyperprior:3")
    torch.manual_seed(0)
    codec = build_codec(parse_name(f"{architecture}:3"))
    codec.eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same weights in every process, to the last bit
    spread(codec.net, load_image(KODAK / "kodim05.png")[..., :CROP, :CROP])
    codec.update(force=True)
    torch.set_num_threads(threads)
    return codec.prepare()


def picture(path: Path, architecture: str) -> Tensor:
    x = load_image(path)
    if architecture not in SERIAL:
        return x
    top, left = (x.shape[-2] - CROP) // 2, (x.shape[-1] - CROP) // 2
    return x[..., top : top + CROP, left : left + CROP]


def work(role: str, architecture: str, pictures: int, folder: Path, control: bool) -> None:
    """What one process does: write all files and pictures, or read the files and compare the pictures."""
    codec = network(architecture)
    if control:
        codec._transforms.others_on_one_thread = nullcontext
    bad, started = 0, time.perf_counter()
    for path in sorted(KODAK.glob("*.png"))[:pictures]:
        file = folder / f"{path.stem}.pickle"  # our own, of a moment ago
        if role == "write":
            [bitstream] = codec.compress(picture(path, architecture))
            file.write_bytes(pickle.dumps((bitstream, to_uint8(codec.decompress(bitstream)))))
            continue
        bitstream, expected = pickle.loads(file.read_bytes())
        try:
            x_hat = to_uint8(codec.decompress(bitstream))
            bad += int((x_hat.int() - expected.int()).abs().max() > 1)
        except FreqdoorError:
            bad += 1
    print(json.dumps({"bad": bad, "seconds": time.perf_counter() - started, "threads": torch.get_num_threads()}))


def price(architecture: str, pictures: int) -> None:
    """Print what compress and decompress take with one thread for all but g_a and g_s, in what they take without."""
    codec = network(architecture)
    ratios: dict[str, list[float]] = {"compress": [], "decompress": []}
    for path in sorted(KODAK.glob("*.png"))[:pictures]:
        x = picture(path, architecture)
        seconds: dict[tuple[str, bool], float] = {}
        for control in (True, False, False, True):
            codec._transforms.__dict__.pop("others_on_one_thread", None)
            if control:
                codec._transforms.others_on_one_thread = nullcontext
            started = time.perf_counter()
            [bitstream] = codec.compress(x)
            between = time.perf_counter()
            codec.decompress(bitstream)
            ended = time.perf_counter()
            for work, spent in (("compress", between - started), ("decompress", ended - between)):
                seconds[work, control] = seconds.get((work, control), 0.0) + spent
        for work, each in ratios.items():
            each.append(seconds[work, False] / seconds[work, True])
    shown = ", ".join(f"{work} {statistics.median(each):.3f}" for work, each in ratios.items())
    print(f"{architecture}, {torch.get_num_threads()} threads, {pictures} pictures, median ratio of times: {shown}")


def process(role: str, threads: int, arguments: argparse.Namespace, architecture: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--role", role, "--only", architecture, "--folder", folder]
    command += ["--pictures", str(arguments.pictures), *(["--control"] if arguments.control else [])]
    variables = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "5000"}
    done = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["threads"] == threads
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--only", choices=ARCHITECTURES, help="one architecture")
    parser.add_argument("--control", action="store_true", help="let all parts run on all threads")
    parser.add_argument("--price", action="store_true", help="measure what one thread costs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--role", choices=("write", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role:
        work(arguments.role, arguments.only, arguments.pictures, arguments.folder, arguments.control)
        return
    if arguments.price:
        price(arguments.only or "lite-hyperprior", arguments.pictures)
        return
    rows = {}
    for architecture in [arguments.only] if arguments.only else ARCHITECTURES:
        rows[architecture] = {}
        for writing, reading in ((1, 2), (2, 1)):
            with tempfile.TemporaryDirectory() as folder:
                process("write", writing, arguments, architecture, folder)
                read = process("read", reading, arguments, architecture, folder)
            rows[architecture][f"written with {writing}, read with {reading}"] = read["bad"]
        print(f"{architecture}: of {arguments.pictures} files bad: {rows[architecture]}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
