"""Preprocessing: what a careful user does to an image before the encoder sees it (Section 4.4, and beyond).

A preprocessing maps Images to Images of the same size in [0, 1]; where it has no gradient, the gradient is the identity
(straight-through), so that all can stand in a training loop. No preprocessing is None, and "none" in records.

Settings name preprocessings, so that what computes is imported where it is used.
"""

from __future__ import annotations

import ast
import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from freqdoor.errors import FreqdoorError
from freqdoor.settings import mistakes

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from freqdoor.types import Images

OF_SRGB = {  # linear light of a profile from that of sRGB; both are of white D65
    "display-p3": ((0.8224621, 0.1775380, 0.0), (0.0331941, 0.9668058, 0.0), (0.0170827, 0.0723974, 0.9105199)),
    "adobe-rgb": ((0.7151256, 0.2848744, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0411619, 0.9588381)),
}
ADOBE_GAMMA = 563 / 256
AXES = {"horizontal": -1, "vertical": -2}
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("expected an odd number")
    return value


Offset = Annotated[int, Field(ge=0, le=63)]
OddSide = Annotated[int, AfterValidator(_odd)]
Quality = Annotated[int, Field(ge=1, le=100)]


@dataclass(frozen=True, config=STRICT)
class Preprocessing(ABC):
    """Preprocessing of an image before the encoder; `undo` is what the receiver does after decoding.

    Raises:
        FreqdoorError: arguments of the wrong kind or out of their range, all in one sentence.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, content: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(content)
        except ValidationError as error:
            reasons = "; ".join(mistakes(error, [field.name for field in fields(cls)]))
            raise FreqdoorError(f"{cls.__name__}: {reasons}; expected {cls.form()}") from None

    @classmethod
    def form(cls) -> str:
        """How it is written, with the defaults: "GaussianBlur(sigma, size=5)"."""
        arguments = (f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(cls))
        return f"{cls.__name__}({', '.join(arguments)})"

    @abstractmethod
    def _apply(self, x: Images) -> Images: ...

    def __call__(self, x: Images) -> Images:
        """The images that the encoder is given instead of x, (b, 3, h, w), in [0, 1]."""
        y = self._apply(x)
        # the clamp passes the gradient: a filter's rounding errors must not stop it where the image is white
        return _straight_through(y, y.detach().clamp(0, 1))

    def undo(self, x_hat: Images) -> Images:
        """What the receiver does after decoding, so that x_hat compares with x pixel by pixel; mostly nothing."""
        return x_hat

    @property
    def name(self) -> str:
        """As `parse_defence` reads it, with the arguments that differ from the defaults: "GaussianBlur(sigma=0.5)"."""
        values = ((f, getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({', '.join(f'{f.name}={v!r}' for f, v in values if v != f.default)})"

    def __str__(self) -> str:
        return self.name


def preprocessing_name(defence: Preprocessing | None) -> str:
    """The value of a record's column: the defence's name, or "none"."""
    return defence.name if defence else "none"


@dataclass(frozen=True, config=STRICT)
class GaussianBlur(Preprocessing):
    """Convolution with a sampled Gaussian of `sigma` pixels on size x size taps, borders mirrored."""

    sigma: Annotated[float, Field(ge=0.01, le=100)]
    size: Annotated[OddSide, Field(ge=3, le=99)] = 5

    def _apply(self, x: Images) -> Images:
        from torchvision.transforms.v2.functional import gaussian_blur  # type: ignore[import-untyped]

        _sides(self, x, min(x.shape[-2:]) > self.size // 2, f"at least {self.size // 2 + 1}")
        blurred: Images = gaussian_blur(x, [self.size, self.size], [self.sigma, self.sigma])
        return blurred


@dataclass(frozen=True, config=STRICT)
class SqueezeBits(Preprocessing):
    """Each channel rounded to the nearest of 2^depth levels from 0 to 1; straight-through gradient."""

    depth: Annotated[int, Field(ge=1, le=8)]

    def _apply(self, x: Images) -> Images:
        top = 2**self.depth - 1
        return _straight_through(x, (x.detach().clamp(0, 1) * top).round() / top)


@dataclass(frozen=True, config=STRICT)
class _File(Preprocessing):
    quality: Quality

    kind: ClassVar[str]
    max_side: ClassVar[int]  # pixels

    def _apply(self, x: Images) -> Images:
        _sides(self, x, max(x.shape[-2:]) <= self.max_side, f"at most {self.max_side}")
        return _through_pillow(x, self._save_and_read)

    def _save_and_read(self, picture: Image.Image) -> Image.Image:
        from PIL import Image

        buffer = io.BytesIO()
        picture.save(buffer, self.kind, quality=self.quality)
        with Image.open(buffer) as image:
            return image.convert("RGB")


@dataclass(frozen=True, config=STRICT)
class Jpeg(_File):
    """Written as JPEG and read back: Pillow's defaults (4:2:0, baseline), 8 bits; straight-through gradient."""

    kind: ClassVar[str] = "JPEG"
    max_side: ClassVar[int] = 65_500


@dataclass(frozen=True, config=STRICT)
class WebP(_File):
    """Written as lossy WebP and read back: Pillow's defaults (4:2:0, method 4), 8 bits; straight-through gradient."""

    kind: ClassVar[str] = "WEBP"
    max_side: ClassVar[int] = 16_383


@dataclass(frozen=True, config=STRICT)
class Median(Preprocessing):
    """Median of size x size pixels of each channel, 8 bits, borders repeated (Pillow); straight-through gradient."""

    size: Annotated[OddSide, Field(ge=3, le=15)] = 3

    def _apply(self, x: Images) -> Images:
        from PIL import ImageFilter

        return _through_pillow(x, lambda picture: picture.filter(ImageFilter.MedianFilter(self.size)))


@dataclass(frozen=True, config=STRICT)
class Noise(Preprocessing):
    """Gaussian noise of standard deviation `sigma` ([0, 1] scale), clamped; `seed` alone decides it, on any device."""

    sigma: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def _apply(self, x: Images) -> Images:
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        # image by image: the first of a batch gets what it gets by itself, the others get their own
        noise = torch.stack([torch.randn(image.shape, generator=generator) for image in x])
        return x + self.sigma * noise.to(x)


@dataclass(frozen=True, config=STRICT)
class Resize(Preprocessing):
    """Reduced by `factor` with an antialiased bicubic filter and enlarged to the old size."""

    factor: Annotated[float, Field(ge=0.01, le=1)]

    def _apply(self, x: Images) -> Images:
        import torch.nn.functional as F

        height, width = x.shape[-2:]
        small = (max(1, round(height * self.factor)), max(1, round(width * self.factor)))
        reduced = F.interpolate(x, small, mode="bicubic", antialias=True)
        return F.interpolate(reduced, (height, width), mode="bicubic", antialias=True)


@dataclass(frozen=True, config=STRICT)
class Screenshot(Preprocessing):
    """Shown and captured: enlarged by `zoom` (bilinear), seen on a screen of exponent `gamma`, taken as sRGB in 8 bits.

    What is captured is reduced to the old size (antialiased bicubic) and stored in 8 bits; tones and rounding have a
    straight-through gradient.
    """

    zoom: Annotated[float, Field(ge=1.01, le=4)] = 1.25
    gamma: Annotated[float, Field(ge=1.8, le=2.6)] = 2.2

    def _apply(self, x: Images) -> Images:
        import torch.nn.functional as F

        from freqdoor.types import round8

        height, width = x.shape[-2:]
        shown = F.interpolate(x, (round(height * self.zoom), round(width * self.zoom)), mode="bilinear")
        tones = _srgb_of_light(shown.detach().clamp(0, 1) ** self.gamma)
        captured = _straight_through(shown, round8(tones))
        return round8(F.interpolate(captured, (height, width), mode="bicubic", antialias=True))


@dataclass(frozen=True, config=STRICT)
class ColourProfile(Preprocessing):
    """Converted from sRGB to another profile in 8 bits and back (relative colorimetric); straight-through gradient."""

    profile: Literal["display-p3", "adobe-rgb"] = "display-p3"

    def _apply(self, x: Images) -> Images:
        import torch

        from freqdoor.types import round8

        to_profile = torch.tensor(OF_SRGB[self.profile], dtype=torch.float64, device=x.device)
        light = _light_of_srgb(x.detach().clamp(0, 1).double())
        there = torch.einsum("ij,bjhw->bihw", to_profile, light).clamp(0, 1)
        if self.profile == "display-p3":  # whose tones are those of sRGB
            stored = _light_of_srgb(round8(_srgb_of_light(there)))
        else:
            stored = round8(there ** (1 / ADOBE_GAMMA)).double() ** ADOBE_GAMMA
        back = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_profile), stored).clamp(0, 1)
        return _straight_through(x, round8(_srgb_of_light(back).to(x)))


@dataclass(frozen=True, config=STRICT)
class Crop(Preprocessing):
    """`top` rows and `left` columns cut off, so that what was a grid of blocks begins elsewhere.

    The size stays as it is: the last row and column are repeated, as encoders do that pad. The receiver moves the
    picture back, and repeats its first row and column where they are gone.
    """

    top: Offset
    left: Offset

    def _apply(self, x: Images) -> Images:
        import torch.nn.functional as F

        self._check(x)
        return F.pad(x[..., self.top :, self.left :], (0, self.left, 0, self.top), mode="replicate")

    def undo(self, x_hat: Images) -> Images:
        """Moved back."""
        import torch.nn.functional as F

        self._check(x_hat)
        height, width = x_hat.shape[-2:]
        kept = x_hat[..., : height - self.top, : width - self.left]
        return F.pad(kept, (self.left, 0, self.top, 0), mode="replicate")

    def _check(self, x: Images) -> None:
        most = max(self.top, self.left)
        _sides(self, x, min(x.shape[-2:]) > most, f"at least {most + 1}")


@dataclass(frozen=True, config=STRICT)
class Rotate(Preprocessing):
    """Turned about its middle by `degrees` (bicubic), borders repeated; the receiver turns it back."""

    degrees: Annotated[float, Field(ge=-45, le=45)]

    def _apply(self, x: Images) -> Images:
        return self._turned(x, self.degrees)

    def undo(self, x_hat: Images) -> Images:
        """Turned back."""
        return self._turned(x_hat, -self.degrees)

    def _turned(self, x: Images, degrees: float) -> Images:
        import torch
        import torch.nn.functional as F

        height, width = x.shape[-2:]
        sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
        turn = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
        grid = F.affine_grid(torch.tensor([turn] * len(x)).to(x), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False)


@dataclass(frozen=True, config=STRICT)
class Flip(Preprocessing):
    """Mirrored left to right ("horizontal") or top to bottom ("vertical"); the receiver mirrors it back."""

    axis: Literal["horizontal", "vertical"] = "horizontal"

    def _apply(self, x: Images) -> Images:
        return x.flip(AXES[self.axis])

    def undo(self, x_hat: Images) -> Images:
        """Mirrored back."""
        return self._apply(x_hat)


def _several(defences: Any) -> tuple[Preprocessing, ...]:
    if isinstance(defences, list | tuple) and defences and all(isinstance(d, Preprocessing) for d in defences):
        return tuple(defences)
    raise ValueError("expected a tuple of one defence or more")


@dataclass(frozen=True, config=STRICT)
class Compose(Preprocessing):
    """One defence after the other; undone in reverse."""

    defences: Annotated[Any, BeforeValidator(_several)]

    def _apply(self, x: Images) -> Images:
        for defence in self.defences:
            x = defence(x)
        return x

    def undo(self, x_hat: Images) -> Images:
        """What each defence's `undo` does, the last one first."""
        for defence in reversed(self.defences):
            x_hat = defence.undo(x_hat)
        return x_hat

    @property
    def name(self) -> str:
        """As `parse_defence` reads it: "Compose(Flip(), Jpeg(quality=75))"."""
        return f"Compose({', '.join(d.name for d in self.defences)})"


def _sides(defence: Preprocessing, x: Images, fits: bool, expected: str) -> None:
    if not fits:
        size = " x ".join(map(str, x.shape[-2:]))
        raise FreqdoorError(f"{defence}: expected sides of {expected} pixels, found {size}; take another image")


def _straight_through(x: Images, y: Images) -> Images:
    """y with the identity as its gradient; unlike x + (y - x).detach(), the value is y to the last bit."""
    return y + (x - x.detach())


def _light_of_srgb(x: Images) -> Images:
    """Linear light of sRGB's tones (IEC 61966-2-1)."""
    return (x / 12.92).where(x <= 0.04045, ((x + 0.055) / 1.055) ** 2.4)


def _srgb_of_light(light: Images) -> Images:
    """The inverse of `_light_of_srgb`."""
    return (12.92 * light).where(light <= 0.0031308, 1.055 * light.clamp(min=0) ** (1 / 2.4) - 0.055)


def _through_pillow(x: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """Every image rounded to 8 bits and changed by `change`; straight-through gradient."""
    import torch

    from freqdoor.types import as_picture, from_picture

    changed = torch.cat([from_picture(change(as_picture(image[None]))) for image in x.detach()])
    return _straight_through(x, changed.to(x.device))


PREPROCESSINGS: dict[str, type[Preprocessing]] = {
    cls.__name__: cls
    for cls in (
        *(GaussianBlur, SqueezeBits, Jpeg, WebP, Median, Noise, Resize),
        *(Screenshot, ColourProfile, Crop, Rotate, Flip, Compose),
    )
}

PAPER = (*map(GaussianBlur, (0.2, 0.3, 0.5, 0.6)), *map(SqueezeBits, (7, 4, 3)))  # Table 5
FLIPS = (Flip("horizontal"), Flip("vertical"))
BEYOND = (*map(Jpeg, (90, 75, 50)), WebP(80), Median(3), Noise(0.01), Noise(0.04), Resize(0.5), *FLIPS)
FILES = (  # what becomes of a picture that is passed on as a file
    *map(Jpeg, (95, 85, 75)),
    *map(WebP, (90, 75)),
    *map(Resize, (0.9, 0.8, 0.75, 0.7, 0.6, 0.5)),
    *(Crop(offset, offset) for offset in range(1, 16)),  # of a grid of 16
    Rotate(1.0),
    Screenshot(),
    ColourProfile("display-p3"),
    ColourProfile("adobe-rgb"),
)
PRESETS: dict[str, tuple[Preprocessing, ...]] = {"none": (), "paper": PAPER, "all": PAPER + BEYOND, "files": FILES}


def _crop_at(place: int) -> Crop:
    """The crop whose offset is the n-th place in a block of 16."""
    return Crop(place // 16, place % 16)


def _profile_at(number: int) -> ColourProfile:
    """The first profile, or the second."""
    return ColourProfile("adobe-rgb" if number else "display-p3")


# kind -> defence and the range of its first argument, both ends included; drawn uniformly, between integers an integer
RANDOM: dict[str, tuple[Callable[..., Preprocessing], float, float] | None] = {
    "none": None,
    "blur": (GaussianBlur, 0.3, 0.8),
    "noise": (Noise, 0.005, 0.05),
    "jpeg": (Jpeg, 40, 95),
    "bits": (SqueezeBits, 3, 7),
    "resize": (Resize, 0.5, 0.95),
    "round8": (SqueezeBits, 8, 8),
    "webp": (WebP, 60, 95),
    "crop": (_crop_at, 0, 255),
    "rotate": (Rotate, -1.0, 1.0),
    "screenshot": (Screenshot, 1.1, 2.0),
    "profile": (_profile_at, 0, 1),
}


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise unless all are names in RANDOM."""
    unknown = [kind for kind in kinds if kind not in RANDOM]
    if unknown or not kinds:
        raise FreqdoorError(f"random defences: expected kinds out of {', '.join(RANDOM)}, found {unknown or 'none'}")


def random_preprocessing(kinds: Sequence[str], generator: torch.Generator | None = None) -> Preprocessing | None:
    """One of `kinds` (names in RANDOM, each as likely) with a random strength, for training; None for "none".

    Three numbers are drawn whatever comes out, from `generator` (on the CPU) or from torch's global one.
    """
    import torch

    check_kinds(kinds)
    choice, strength = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    seed = int(torch.randint(2**31, (), generator=generator))
    drawn = RANDOM[kinds[int(choice * len(kinds))]]
    if drawn is None:
        return None
    make, low, high = drawn
    value = low + (int(strength * (high - low + 1)) if isinstance(low, int) else strength * (high - low))
    return make(value, seed) if make is Noise else make(value)


def parse_defence(text: str) -> Preprocessing:
    """A defence from its name, such as "GaussianBlur(sigma=0.5)" or "Jpeg(75)"; nothing in the text is executed.

    FreqdoorError for an unknown name, wrong arguments or anything but literals.
    """
    return _build(_expression(text))


def parse_defences(text: str) -> tuple[Preprocessing, ...]:
    """Defences separated by ";" or ",", each also a preset's name ("paper", "all", "none"); every one once, in order.

    FreqdoorError as in `parse_defence`, and for an empty text.
    """
    if not text.strip("; \n\t"):
        raise FreqdoorError(
            f"defences: expected {', '.join(PRESETS)} or a list like 'Jpeg(75); Flip()', found {text!r}"
        )
    defences: list[Preprocessing] = []
    for piece in filter(str.strip, text.split(";")):
        node = _expression(piece)
        for part in node.elts if isinstance(node, ast.Tuple) else [node]:
            if isinstance(part, ast.Name) and part.id in PRESETS:
                defences += PRESETS[part.id]
            else:
                defences.append(_build(part))
    return tuple(dict.fromkeys(defences))


def _expression(text: str) -> ast.expr:
    try:
        return ast.parse(" ".join(text.split()), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise FreqdoorError(f"defence {text.strip()!r}: expected a form like 'Jpeg(75)'") from None


def _build(node: ast.expr) -> Preprocessing:
    """The defence that a call like `Jpeg(75)` or a bare name like `Median` stands for."""
    text = ast.unparse(node)
    call = ast.Call(node, [], []) if isinstance(node, ast.Name) else node
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise FreqdoorError(f"defence {text!r}: expected a form like 'Jpeg(75)'")
    if call.func.id not in PREPROCESSINGS:
        known = ", ".join(PREPROCESSINGS)
        raise FreqdoorError(f"defence {text!r}: expected one of {known} (or, in a list, {', '.join(PRESETS)})")
    cls = PREPROCESSINGS[call.func.id]
    if cls is Compose and not call.keywords:
        return Compose(tuple(_build(argument) for argument in call.args))
    names = [keyword.arg for keyword in call.keywords]
    if None in names or len(set(names)) < len(names):
        raise FreqdoorError(f"defence {text!r}: every argument is given once; expected {cls.form()}")
    try:
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (TypeError, ValueError):
        raise FreqdoorError(f"defence {text!r}: arguments are plain numbers and texts; expected {cls.form()}") from None
    return cls(*values, **named)
