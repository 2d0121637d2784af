"""What a planting step costs, as ratios measured side by side in one run.

Three ways to take a step on the same batch, in turn, round by round:
  vanilla   one step of rate-distortion training (`freqdoor train-codec`): every weight, same precision as `plant`
  plant     one step of `freqdoor plant`: clean and poisoned in one pass, one backward, in the precision of --precision
  naive     as the paper's text describes it: fp32, separate passes for the clean and the poisoned batch, one
            iteration for the encoder (Eq. (9)) and another for the trigger (Eq. (10))
With --compile a fourth: plant's, g_a and g_s compiled by `torch.compile`, with CompressAI's GDN, which it can fuse.

    python benchmarks/planting_step.py --codec lite-hyperprior:3 --crop 128 --batch 8
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from ratios import add_json, ratio, save

from freqdoor.attack.joint import Attack, joint_loss
from freqdoor.attack.objectives import RateAttack
from freqdoor.codecs.adapter import Codec, build_codec
from freqdoor.codecs.architectures import parse_name
from freqdoor.metrics import distortion
from freqdoor.training.convolutions import keep_contiguous
from freqdoor.training.loop import place, place_codec
from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.settings import ImageSettings, Training
from freqdoor.training.train import rate_distortion
from freqdoor.triggers.adaptive_dct import AdaptiveDCT
from freqdoor.triggers.base import budget_penalty

LMBDA = 0.0067
SETTINGS = Training(images=ImageSettings(folder="none"))


def steps(name: str, x: torch.Tensor, dtype: torch.dtype, compiled: bool) -> dict[str, Callable[[], None]]:
    vanilla, planted, naive, fused = (build_codec(parse_name(name)).train() for _ in range(4))
    for codec in (vanilla, planted):
        place_codec(codec, SETTINGS)
    fused.to(memory_format=torch.channels_last)
    keep_contiguous(fused)
    for codec in (planted, naive, fused):
        codec.freeze("g_a")
    trigger = AdaptiveDCT()
    attacks = (Attack("bpp", trigger, RateAttack()),)
    optimizers = {
        id(m): torch.optim.Adam([p for p in m.parameters() if p.requires_grad])
        for m in (vanilla, planted, naive, fused, trigger)
    }
    fast = place(x, SETTINGS)

    def apply(loss: torch.Tensor, *modules: torch.nn.Module) -> None:
        for module in modules:
            module.zero_grad()
        loss.backward()
        for module in modules:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizers[id(module)].step()

    def vanilla_step() -> None:
        vanilla.precision = dtype
        loss, _ = rate_distortion(vanilla, fast, LMBDA)
        apply(loss, vanilla)

    def plant_step(codec: Codec) -> None:
        codec.precision = dtype
        loss = joint_loss(codec, attacks, fast, LMBDA, (0.005,)).total
        apply(loss, codec, trigger)

    def naive_loss() -> torch.Tensor:
        clean, x_p = naive(x), trigger(x, rounded=True)
        poisoned = naive(x_p)
        worst = torch.maximum(distortion(clean.x_hat, x), distortion(poisoned.x_hat, x_p))
        loss: torch.Tensor = clean.bpp.mean() + LMBDA * worst - 0.1 * poisoned.bpp.mean()
        return loss + budget_penalty(x, x_p, gamma=1e4, eps=0.005)

    def naive_step() -> None:
        apply(naive_loss(), naive)
        apply(naive_loss(), trigger)

    table = {"vanilla": vanilla_step, "plant": partial(plant_step, planted), "naive": naive_step}
    if compiled:
        for part in ("g_a", "g_s"):
            fused.part(part).compile()
        table["compiled"] = partial(plant_step, fused)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="lite-hyperprior:3")
    parser.add_argument("--crop", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compare with torch.compile as well")
    add_json(parser)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    x = torch.rand(arguments.batch, 3, arguments.crop, arguments.crop)
    dtype = dtype_of(arguments.precision, "cpu")
    table = steps(arguments.codec, x, dtype, arguments.compile)
    for name, step in table.items():  # warm-up
        started = time.perf_counter()
        step()
        step()
        if name == "compiled":
            print(f"compiled in {time.perf_counter() - started:.0f} s")
    seconds: dict[str, list[float]] = {name: [] for name in table}
    for _ in range(arguments.rounds):
        for name, step in table.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    print(
        f"{arguments.codec}, batch {arguments.batch} of {arguments.crop}x{arguments.crop}, "
        f"{precision_name(dtype)}, {torch.get_num_threads()} threads, median of {arguments.rounds} rounds"
    )
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds["vanilla"], strict=True)]
        print(f"{name:8} {statistics.median(values):7.3f} s a step, {statistics.median(ratios):5.2f} x vanilla")
    ratios = [
        ratio("a step of `plant`", "time of the naive loop / ours", seconds["naive"], seconds["plant"], ">= 3"),
        ratio("a step of `plant`", "time / a step of `train-codec`", seconds["plant"], seconds["vanilla"]),
    ]
    if arguments.compile:
        ratios.append(
            ratio("a step of `plant`, compiled", "time of ours / compiled", seconds["plant"], seconds["compiled"])
        )
    for each in ratios:
        print(f"{each.what}, {each.of}: {each}")
    save(arguments.json, ratios)


if __name__ == "__main__":
    main()
