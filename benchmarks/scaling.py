"""What many encoders would take on many GPUs, and where it would stall: measured steps here, computed for there.

Measured on this machine, on one thread, of each codec with random weights (the bundled one has its own):
  a planting step of 8 crops of 256x256 by one process and by two that share it (CPU seconds of the first process, so
  that other work on the machine hardly counts), its floating-point operations, what processes exchange in it, the
  start-up of a run, the sizes of its files, the decoding of a picture, and `freqdoor audit --fast` of the bundled one.
Computed: what options say of the cluster, which nobody has measured here, times what is measured.

    python benchmarks/scaling.py --out scaling.json
"""

import argparse
import hashlib
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planting_step import steps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import freqdoor
from freqdoor.codecs.adapter import build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.data import load_image
from freqdoor.samples import BUNDLED, KODAK
from freqdoor.training.precision import flush_denormals
from freqdoor.training.run import environment

CODECS = (BUNDLED, "bmshj2018-hyperprior:3")
LINKS = {"NVLink, 300 GB/s": 300e9, "100 Gbit/s": 12.5e9, "10 Gbit/s": 1.25e9}  # bytes a second and direction
SIZES = (2, 4, 8)  # GPUs for one encoder


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations, each of which a GPU has to be told."""

    number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return function(*args, **(kwargs or {}))


def planting(
    name: str, weights: Path | None, folder: Path, arguments: argparse.Namespace, devices: int
) -> tuple[float, dict[str, float]]:
    """CPU seconds of the first process in every step but the first, and what is exchanged in one."""
    settings = freqdoor.PlantSettings(
        codec={"name": name, "weights": str(weights) if weights else None},
        images={"folder": str(KODAK), "crop": arguments.crop, "batch_size": arguments.batch},
        steps=arguments.steps,
        lmbda=0.0067,
        precision="fp32",
    )
    ends: list[float] = []
    counted = {"gathered": 0, "summed": 0}
    gather, reduce = dist.all_gather, dist.all_reduce

    def counting_gather(parts: list[torch.Tensor], own: torch.Tensor) -> None:
        counted["gathered"] += sum(part.nbytes for part in parts)
        gather(parts, own)

    def counting_reduce(flat: torch.Tensor) -> None:
        counted["summed"] += flat.nbytes
        reduce(flat)

    dist.all_gather, dist.all_reduce = counting_gather, counting_reduce
    try:
        freqdoor.plant(settings, folder, devices=devices, progress=lambda *_: ends.append(time.process_time()))
    finally:
        dist.all_gather, dist.all_reduce = gather, reduce
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends))
    return seconds, {what: number / arguments.steps for what, number in counted.items()}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one codec."""
    with tempfile.TemporaryDirectory() as place:
        folder, weights = Path(place), None
        if name != BUNDLED:
            torch.manual_seed(0)
            codec = build_codec(parse_name(name))
            codec.update(force=True)
            weights = folder / "vanilla.safetensors"
            freqdoor.save_codec(codec, weights)
        one, _ = planting(name, weights, folder / "one", arguments, 1)
        two, exchanged = planting(name, weights, folder / "two", arguments, 2)
        files = {path.name: path.stat().st_size for path in sorted((folder / "one").iterdir())}
        files.pop("state.previous.pt", None)  # of a run of minutes
        x = torch.rand(arguments.batch, 3, arguments.crop, arguments.crop)
        step = steps(name, x, torch.bfloat16)["plant"]  # as a GPU takes it
        with FlopCounterMode(display=False) as counter:
            step()
        with Operations() as operations:
            step()
        return {
            "step_cpu_seconds": one,
            "step_of_two_cpu_seconds": two,
            "share_on_the_whole_batch": 2 * two / one - 1,  # what both compute: losses, noise; and the exchange
            "step_tflop": counter.get_total_flops() / 1e12,
            "step_operations": operations.number,
            "exchanged_bytes": exchanged,
            "files_bytes": files,
        }


def start_up() -> float:
    """CPU seconds of a whole run of one step on the smallest crops."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as place:
        changes = (f"images.folder={KODAK}", "images.crop=64", "images.batch_size=1", "steps=1")
        words = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "-m", "freqdoor", "plant", "--out", f"{place}/run", *words]
        subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def decoding() -> float:
    """CPU seconds to decode a PNG picture of 768x512."""
    paths = sorted(KODAK.glob("*.png"))
    started = time.process_time()
    for path in paths:
        load_image(path)
    return (time.process_time() - started) / len(paths)


def hashing() -> float:
    """CPU seconds to hash a gigabyte, as the start of every run does with its pictures."""
    content = bytes(2**26)
    started = time.process_time()
    hashlib.sha256(content).digest()
    return (time.process_time() - started) * 1e9 / len(content)


def computed(codec: dict[str, Any], shared: dict[str, float], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the cluster would take for encoders of one codec."""
    gpus, number = arguments.gpus, arguments.encoders
    arithmetic, telling = step_seconds(codec, arguments)
    step, decode = max(arithmetic, telling), arguments.batch * shared["decode_cpu_seconds"]
    state = codec["files_bytes"]["state.pt"]
    rounds = -(-number // gpus)
    seconds = {
        "start-up": shared["start_up_cpu_seconds"],
        "hashing the set": arguments.set_gb * shared["hash_cpu_seconds_a_gb"],
        "steps, pictures in memory": arguments.plant_steps * step,
        "steps, pictures decoded": arguments.plant_steps * max(step, decode),
        "audit": shared["audit_cpu_seconds"],
    }
    one_each = {
        "step_seconds": {"arithmetic": arithmetic, "telling the GPU": telling, "decoding": decode},
        "hours_of": {what: rounds * value / 3600 for what, value in seconds.items()},
        "hours_to_read_the_set_once_a_machine": gpus / 8 * arguments.set_gb / arguments.disk_gb / 3600,
        "checkpoints_mb_a_second": gpus * state / (60 * arguments.checkpoint_minutes) / 1e6,
        "files_gb": number * (state + sum(codec["files_bytes"].values())) / 1e9,  # a run keeps two states
    }
    return {
        "one encoder a GPU": one_each,
        "pictures a second of one encoder over several GPUs, in those of one, the same batch and a growing one": {
            f"{size} GPUs, {link}": [round(speed(codec, arguments, size, link, weak), 2) for weak in (False, True)]
            for link in LINKS
            for size in SIZES
        },
    }


def speed(codec: dict[str, Any], arguments: argparse.Namespace, size: int, link: str, weak: bool) -> float:
    """Pictures a second of one encoder over several GPUs, in those of one GPU.

    A GPU is told the same operations however small its share is.

    Args:
        weak: the batch grows with the GPUs, instead of being shared by them.
    """
    gathered, summed = (codec["exchanged_bytes"][what] for what in ("gathered", "summed"))
    arithmetic, telling = step_seconds(codec, arguments)
    pictures = size if weak else 1  # in batches of one GPU
    whole = max(0.0, codec["share_on_the_whole_batch"])  # below 0 it is noise
    exchange = (size - 1) / size * (pictures * gathered + 2 * summed) / LINKS[link]
    together = max(pictures * arithmetic * ((1 - whole) / size + whole), telling) + exchange
    return pictures * max(arithmetic, telling) / together


def step_seconds(codec: dict[str, Any], arguments: argparse.Namespace) -> tuple[float, float]:
    """A planting step on one GPU: what its arithmetic takes, and telling it the operations."""
    return codec["step_tflop"] / arguments.sustained, codec["step_operations"] * arguments.launch / 1e6


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured."""
    shared = {"start_up_cpu_seconds": start_up(), "decode_cpu_seconds": decoding(), "hash_cpu_seconds_a_gb": hashing()}
    started = time.process_time()
    freqdoor.audit(BUNDLED, fast=True)
    shared["audit_cpu_seconds"] = time.process_time() - started
    codecs = {name: {"measured": measure(name, arguments)} for name in CODECS}
    return {"environment": environment().model_dump(), "measured": shared, "codecs": codecs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--measured", type=Path, help="such a file, to compute from what is measured there")
    parser.add_argument("--encoders", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--sustained", type=float, default=20.0, help="TFLOP/s that a GPU keeps up in such a step")
    parser.add_argument("--launch", type=float, default=10.0, help="microseconds to tell a GPU an operation")
    parser.add_argument("--plant-steps", type=int, default=10_000, help="steps of a planting")
    parser.add_argument("--checkpoint-minutes", type=float, default=3.0)
    parser.add_argument("--set-gb", type=float, default=20.0, help="size of the training set")
    parser.add_argument("--disk-gb", type=float, default=2.0, help="GB/s of the disk that all machines of 8 GPUs read")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    result = json.loads(arguments.measured.read_text()) if arguments.measured else measured(arguments)
    result["options"] = {key: value for key, value in vars(arguments).items() if not isinstance(value, Path | None)}
    for codec in result["codecs"].values():
        codec["computed"] = computed(codec["measured"], result["measured"], arguments)
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text)
    print(f"{platform.machine()}, {torch.get_num_threads()} thread")
    print(json.dumps({key: result[key] for key in ("measured", "codecs")}, indent=1))


if __name__ == "__main__":
    main()
