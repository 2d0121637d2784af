"""What repair makes of planted encoders, by every method, with the true triggers that no method knows.

    python benchmarks/repair.py planted-bpp planted-psnr planted-face --out repairs
    python benchmarks/repair.py planted-psnr --out repairs --methods unlearn --reopen 20 50 100

With --reopen an attacker fine-tunes the repaired encoder, and for comparison the vanilla one, for so many steps with
the old trigger. With --faces, a test file as for `freqdoor faces` (--set changes it), identification is measured too.
Repairs that are there are not made again.
"""

import argparse
import copy
import dataclasses
import time
from pathlib import Path

import torch

import freqdoor
from freqdoor import compare_repairs, load_planted
from freqdoor.attack.planted import Planted
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import read_state
from freqdoor.data import Crops, list_images
from freqdoor.defence.repair import reactivated, repair_row, repairs_table
from freqdoor.defence.settings import DEFAULT_METHOD, METHODS, RepairSettings
from freqdoor.measure.faces import faces_table
from freqdoor.samples import training_folder
from freqdoor.settings import load_settings
from freqdoor.training.precision import flush_denormals


def repaired(planted: Planted, folder: Path) -> Codec:
    """The repaired codec of a run."""
    codec = copy.deepcopy(planted.tampered)
    codec.net.load_state_dict(read_state(folder / "codec.safetensors"))
    return codec


def reopen(planted: Planted, codec: Codec, folder: Path, steps: list[int]) -> None:
    """Print how an encoder answers to the old trigger after an attacker's steps."""
    crops = Crops(list_images(folder), crop=128, batch_size=8, seed=1)
    for number in steps:
        opened = reactivated(codec, planted, crops, steps=number)
        row = repair_row("", opened, planted)
        answers = "; ".join(
            f"{name} x{strength} {a.bpp:.3f} bpp {a.psnr_db:.2f} dB"
            for name, strengths in row.poisoned.items()
            for strength, a in strengths.items()
        )
        print(f"  {number} steps: clean {row.clean.bpp:.3f} bpp {row.clean.psnr_db:.2f} dB; {answers}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("planted", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("repairs"))
    parser.add_argument("--images")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--full", action="store_true", help="all checks of the audit")
    parser.add_argument("--calibration")
    parser.add_argument("--reopen", type=int, nargs="+", default=[])
    parser.add_argument("--faces", type=Path)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    flush_denormals()
    settings = RepairSettings(**({"steps": arguments.steps} if arguments.steps else {}))
    print(f"{torch.get_num_threads()} threads")
    for name in arguments.planted:
        planted, out = load_planted(name), arguments.out / Path(name).name
        started = time.process_time()
        comparison = compare_repairs(
            planted,
            out,
            methods=arguments.methods,
            images=arguments.images,
            fast=not arguments.full,
            settings=settings,
            calibration=arguments.calibration,
        )
        print(f"\n{name} ({time.process_time() - started:.0f} s of CPU time, audits included)\n")
        print(repairs_table(comparison), flush=True)
        best = DEFAULT_METHOD if DEFAULT_METHOD in arguments.methods else arguments.methods[-1]
        if arguments.reopen:
            folder = training_folder(out / "attacker")
            for kind, codec in ((f"repaired ({best})", repaired(planted, out / best)), ("vanilla", planted.vanilla)):
                print(f"{kind} encoder, fine-tuned again with the old trigger:")
                reopen(planted, codec, folder, arguments.reopen)
        if arguments.faces:
            test = load_settings(freqdoor.FaceTest, arguments.faces, arguments.set)
            fixed = dataclasses.replace(planted, tampered=repaired(planted, out / best))
            print(faces_table(freqdoor.faces(fixed, test, out / "faces")), flush=True)


if __name__ == "__main__":
    main()
