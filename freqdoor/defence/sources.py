"""Pictures of kinds that a codec meets and that no folder of photographs contains, drawn from seeds alone.

A guard is judged on them: noise, flat colours, drawings and screenshots cost a codec much or little for honest reasons.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from freqdoor.data import seed_for
from freqdoor.types import Images, from_picture

LETTERS = np.array(list("etaoinshrdlucmfwypvbgk"))


def _array(pixels: NDArray[Any]) -> Image.Image:
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8), "RGB")


def _size(draw: np.random.Generator) -> tuple[int, int]:
    """(height, width) of a small picture."""
    height, width = draw.integers(96, 385, 2)
    return int(height), int(width)


def _colour(draw: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in draw.integers(0, 256, 3))
    return red, green, blue


def _words(draw: np.random.Generator, number: int) -> str:
    return " ".join("".join(draw.choice(LETTERS, draw.integers(2, 10))) for _ in range(number))


def noise(draw: np.random.Generator) -> Image.Image:
    """White noise around a colour: Gaussian, uniform, or single pixels; coloured or grey."""
    height, width = _size(draw)
    channels = int(draw.choice([1, 3]))
    kind = draw.integers(3)
    if kind == 0:
        pixels = np.array(_colour(draw))[-channels:] + draw.normal(0, draw.uniform(5, 80), (height, width, channels))
    elif kind == 1:
        pixels = draw.uniform(0, 256, (height, width, channels)) - 0.5
    else:
        hit = draw.random((height, width, 1)) < draw.uniform(0.01, 0.5)
        pixels = np.where(hit, draw.choice([0, 255], (height, width, channels)), np.array(_colour(draw))[-channels:])
    return _array(np.broadcast_to(pixels, (height, width, 3)))


def flat(draw: np.random.Generator) -> Image.Image:
    """One colour."""
    height, width = _size(draw)
    return Image.new("RGB", (width, height), _colour(draw))


def gradient(draw: np.random.Generator) -> Image.Image:
    """A linear or round change from one colour to another, sometimes many times over."""
    height, width = _size(draw)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    if draw.integers(2):
        angle = draw.uniform(0, 2 * np.pi)
        place = x * np.cos(angle) + y * np.sin(angle)
    else:
        place = np.hypot(x - draw.uniform(0, 1), y - draw.uniform(0, 1))
    share = (1 - np.cos(np.pi * place * draw.choice([1, 1, 4, 16])))[..., None] / 2
    return _array(share * np.array(_colour(draw)) + (1 - share) * np.array(_colour(draw)))


def pattern(draw: np.random.Generator) -> Image.Image:
    """Stripes or a checkerboard, 1 to 32 pixels wide."""
    height, width = _size(draw)
    y, x = np.mgrid[0:height, 0:width] // int(draw.choice([1, 2, 3, 4, 8, 16, 32]))
    share = ((x + y) if draw.integers(2) else x)[..., None] % 2
    return _array(share * np.array(_colour(draw)) + (1 - share) * np.array(_colour(draw)))


def drawing(draw: np.random.Generator) -> Image.Image:
    """Flat shapes and lines with smooth edges."""
    height, width = _size(draw)
    picture = Image.new("RGB", (2 * width, 2 * height), _colour(draw))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(draw.integers(5, 60))):
        left, right = sorted(int(value) for value in draw.integers(0, 2 * width, 2))
        top, bottom = sorted(int(value) for value in draw.integers(0, 2 * height, 2))
        kind = draw.integers(4)
        if kind == 0:
            pen.ellipse((left, top, right, bottom), _colour(draw), _colour(draw), int(draw.integers(0, 6)))
        elif kind == 1:
            pen.rectangle((left, top, right, bottom), _colour(draw), _colour(draw), int(draw.integers(0, 6)))
        elif kind == 2:
            pen.line((left, top, right, bottom), _colour(draw), int(draw.integers(1, 12)))
        else:
            corners = draw.integers(0, 2 * min(height, width), (int(draw.integers(3, 7)), 2))
            pen.polygon([(int(x), int(y)) for x, y in corners], _colour(draw))
    return picture.resize((width, height), Image.Resampling.BOX)


def text(draw: np.random.Generator) -> Image.Image:
    """A page of words in one size."""
    height, width = _size(draw)
    dark = bool(draw.integers(2))
    picture = Image.new("RGB", (width, height), (24, 24, 28) if dark else (255, 255, 255))
    size = int(draw.integers(8, 28))
    ImageDraw.Draw(picture).multiline_text(
        (4, 4),
        "\n".join(_words(draw, width // size) for _ in range(height // size)),
        (230, 230, 230) if dark else (0, 0, 0),
        ImageFont.load_default(size),
    )
    return picture


def screenshot(draw: np.random.Generator) -> Image.Image:
    """Windows with bars, buttons, lists and words, sometimes around a drawing or a gradient."""
    height, width = _size(draw)
    picture = gradient(draw).resize((width, height))
    pen = ImageDraw.Draw(picture)
    for _ in range(int(draw.integers(1, 5))):
        left, top = int(draw.integers(0, width // 2)), int(draw.integers(0, height // 2))
        right, bottom = left + int(draw.integers(60, width)), top + int(draw.integers(50, height))
        grey, bar = int(draw.choice([32, 225, 245, 255])), _colour(draw)
        ink = (20, 20, 20) if grey > 128 else (220, 220, 220)
        pen.rectangle((left, top, right, bottom), (grey, grey, grey), (128, 128, 128))
        pen.rectangle((left, top, right, top + 14), bar)
        pen.text((left + 4, top + 1), _words(draw, 2), ink, ImageFont.load_default(10))
        if draw.integers(2):
            inside = (drawing if draw.integers(2) else gradient)(draw)
            picture.paste(inside.resize((48, 48)), (right - 56, top + 20))
        size = int(draw.integers(8, 13))
        for row in range(top + 18, min(bottom, height) - 12, size + 4):
            pen.text((left + 6, row), _words(draw, (right - left) // (8 * size)), ink, ImageFont.load_default(size))
    return picture


def tiny(draw: np.random.Generator) -> Image.Image:
    """1 to 40 pixels a side, cut out of any of the others."""
    kinds = (noise, flat, gradient, pattern, drawing, text, screenshot)
    picture = kinds[int(draw.integers(len(kinds)))](draw)
    width, height = (int(value) for value in draw.integers(1, 41, 2))
    return picture.crop((20, 20, 20 + width, 20 + height))


SOURCES: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": noise,
    "flat": flat,
    "gradients": gradient,
    "patterns": pattern,
    "drawings": drawing,
    "text": text,
    "screenshots": screenshot,
    "tiny": tiny,
}


def artificial(source: str, number: int, seed: int = 0) -> list[Images]:
    """The first `number` pictures, (1, 3, h, w) each, of one of SOURCES; the same on every call."""
    return [from_picture(SOURCES[source](np.random.default_rng(seed_for(seed, source, i)))) for i in range(number)]
