"""How often `verify-owner` takes a stranger's encoder for the owner's: its false-positive rate, and what it misses.

The owner's encoder is the shipped planted-bpp. Asked are
  strangers  the bundled codec untouched, the shipped planted-psnr and planted-face, and encoders planted here with the
             BPP attack in the same way as the owner's but with other seeds: the hardest case, since triggers of one
             kind live in the same frequencies
  copies     the owner's encoder with noise on its weights: what a thief's changes might leave of it

    python benchmarks/ownership.py --planted 9 --steps 300 --out ownership

Encoders that are planted already in OUT are not planted again.
"""

import argparse
import copy
from pathlib import Path

import torch

from freqdoor.attack.plant import plant
from freqdoor.attack.planted import load_planted
from freqdoor.attack.settings import ObjectiveSettings, PlantSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.loading import load_codec
from freqdoor.demonstration import demo_settings
from freqdoor.measure.watermark import false_positives, verify_owner
from freqdoor.samples import training_folder

NOISE = (0.01, 0.03, 0.1)  # of the RMS of each weight tensor


def planted_elsewhere(out: Path, count: int, steps: int) -> dict[str, Codec]:
    """Encoders with the BPP attack of other seeds, every third one with a larger beta."""
    codecs = {}
    for seed in range(1, count + 1):
        base = demo_settings("bpp", training_folder(out)).model_dump(exclude_unset=True)
        beta = 0.3 if seed % 3 == 0 else 0.1
        settings = PlantSettings(
            **base | {"steps": steps, "seed": seed, "objective": ObjectiveSettings(arguments={"beta": beta})}
        )
        codecs[f"BPP, seed {seed}, beta {beta}"] = plant(settings, out / f"bpp-{seed}").tampered
        print(f"planted {seed} of {count}", flush=True)
    return codecs


def noisy(codec: Codec, share: float) -> Codec:
    """A copy of a codec with Gaussian noise on the weights of its g_a."""
    generator = torch.Generator().manual_seed(0)
    changed = copy.deepcopy(codec)
    with torch.no_grad():
        for weight in changed.net.g_a.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += share * weight.square().mean().sqrt() * noise
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=int, default=9)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("ownership"))
    options = parser.parse_args()
    owner = load_planted("planted-bpp")
    strangers = {
        "lite-hyperprior:3": load_codec("lite-hyperprior:3"),
        "planted-psnr": load_planted("planted-psnr").tampered,
        "planted-face": load_planted("planted-face").tampered,
        **planted_elsewhere(options.out, options.planted, options.steps),
    }
    copies = {"the owner's own": owner.tampered}
    copies |= {f"with {100 * share:.0f} % noise": noisy(owner.tampered, share) for share in NOISE}
    asked = strangers | copies
    answers = verify_owner(owner, list(asked.values()), trigger="bpp")
    print("| encoder | trigger / clean | control / clean | images that answer | p | the owner's |")
    print("|---|---|---|---|---|---|")
    for name, answer in zip(asked, answers, strict=True):
        print(
            f"| {name} | {answer.trigger_ratio:.2f} | {answer.control_ratio:.2f} | "
            f"{answer.answering} of {answer.images} | {answer.p_value:.2g} | {'yes' if answer.owner else 'no'} |"
        )
    passed, count, upper = false_positives(answers[: len(strangers)])
    print(f"\n{passed} of {count} strangers pass: at most {100 * upper:.0f} % (exact 95 % interval)")


if __name__ == "__main__":
    main()
