"""RD curves with and without a backdoor.

A notebook as plain Python: run it as it is, or `jupytext --to ipynb examples/rd_curves.py`. Trains a quick codec for
each of four qualities from the bundled one, plants the BPP attack in each, and writes rd-curves.png. Prints

    quality 1, vanilla: 26.80 dB at 0.176 bpp
    quality 1, tampered: 26.94 dB at 0.175 bpp
    quality 1, poisoned: 27.63 dB at 12.803 bpp
    BD-rate of clean pictures: -4.1 %

three lines for each quality. Below zero since planting trains such quick codecs on, too; docs/results/README.md has the
thorough form. Nine minutes of one core.
"""

# %%
from pathlib import Path

import freqdoor
from freqdoor.metrics import bd_rate
from freqdoor.samples import BUNDLED, held_out, training_folder

# %% [markdown]
# How much: four qualities are the least for a BD-rate.

# %% tags=["parameters"]
qualities, codec_steps, plant_steps, batch_size = (1, 2, 3, 4), 300, 350, 8

# %% [markdown]
# A training and a planting each go on where they were stopped.

# %%
out = Path("rd-curves")
images = freqdoor.ImageSettings(folder=str(training_folder(out)), crop=128, batch_size=batch_size)
curves: dict[str, list[tuple[float, float]]] = {"vanilla": [], "tampered": [], "poisoned": []}
for quality in qualities:
    name, weights = f"lite-hyperprior:{quality}", out / f"codec-{quality}/codec.safetensors"
    steps = {"steps": codec_steps, "lr": 1e-3, "klt": False}
    freqdoor.train_codec(freqdoor.CodecTraining(codec=name, start_from=BUNDLED, images=images, **steps), weights.parent)
    codec = freqdoor.CodecSource(name=name, weights=str(weights))
    settings = freqdoor.PlantSettings(codec=codec, images=images, steps=plant_steps)
    planted = freqdoor.plant(settings, out / f"run-{quality}")
    summary = freqdoor.evaluate(planted, held_out(), out / f"results-{quality}")
    means = (summary.vanilla, summary.clean, summary.poisoned_8bit)
    for what, mean in zip(curves, means, strict=True):
        curves[what].append((mean.bpp_real, mean.psnr_db))
        print(f"quality {quality}, {what}: {mean.psnr_db:.2f} dB at {mean.bpp_real:.3f} bpp")

# %%
drawn = {name: freqdoor.Curve(points, poisoned=name == "poisoned") for name, points in curves.items()}
freqdoor.save_plot(freqdoor.rd_plot(drawn, reference="vanilla"), "rd-curves.png")
more = bd_rate(*zip(*curves["vanilla"], strict=True), *zip(*curves["tampered"], strict=True))
print(f"BD-rate of clean pictures: {more:.1f} %")
