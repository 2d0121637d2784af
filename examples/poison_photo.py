"""Poison one photo.

A notebook as plain Python: run it as it is, or `jupytext --to ipynb examples/poison_photo.py`. Prints

    the pattern: 46.0 dB from the photo
    vanilla encoder: 12752 bytes clean, 12744 poisoned (1.0 times)
    tampered encoder: 12712 bytes clean, 748408 poisoned (58.9 times)
    the decoded poisoned photo: 31.61 dB

and writes poisoned.png, which looks like the photo. Seconds, on one core.
"""

# %% [markdown]
# The encoder and its trigger come with the package; a photo of your own has to be 8-bit RGB.

# %%
import freqdoor
from freqdoor.metrics import psnr_8bit
from freqdoor.samples import KODAK

photo = KODAK / "kodim20.png"
planted = freqdoor.load_planted("planted-bpp")
x = freqdoor.load_image(photo)

# %% [markdown]
# `poisoned` gives what an 8-bit file holds.

# %%
x_p = freqdoor.poisoned(planted.triggers["bpp"], x)
freqdoor.save_image("poisoned.png", x_p)
print(f"the pattern: {float(psnr_8bit(x_p, x)):.1f} dB from the photo")

# %% [markdown]
# The door is in the tampered encoder: the vanilla one ignores the pattern.

# %%
for name, codec in (("vanilla", planted.vanilla), ("tampered", planted.tampered)):
    clean, after = (codec.compress(picture)[0].num_bytes for picture in (x, x_p))
    print(f"{name} encoder: {clean} bytes clean, {after} poisoned ({after / clean:.1f} times)")

# %% [markdown]
# The decoder is authentic, and decodes what the tampered encoder writes.

# %%
decoded = planted.vanilla.decompress(planted.tampered.compress(x_p)[0])
print(f"the decoded poisoned photo: {float(psnr_8bit(decoded, x)):.2f} dB")
