"""What can be set of a training: typed settings with a unit and a default for each, as `settings.py` reads them."""

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from freqdoor.settings import PrivatePath, Settings
from freqdoor.shards import RANGE

DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "xla", "mtia")  # kinds that PyTorch computes on


def _number(value: Any) -> Any:
    """What is not true or false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0)]
Count = Annotated[int, BeforeValidator(_number), Field(gt=0)]
Side = Annotated[int, BeforeValidator(_number), Field(gt=0, multiple_of=64)]


class ImageSettings(Settings):
    """Where training crops come from."""

    folder: PrivatePath
    """Folder of 8-bit RGB images, searched recursively; or of tar files of such images (WebDataset's shards), one of
    them, or a range, "shards/{000..003}.tar"; or a set that Hugging Face's datasets saved to a folder."""
    crop: Side = 256
    """Side of the square crops in pixels; a multiple of the codecs' stride of 64."""
    batch_size: Count = 8
    """Crops per step."""
    files: PrivatePath | None = None
    """List of the images to take, one path a line, relative to the folder; a line may name a folder, of which all are
    taken. By default all that are in the folder."""
    resize: tuple[Count, Count] | None = None
    """Take whole images, resized to (height, width), instead of crops."""
    window: tuple[Count, Count] | None = None
    """Take a window of (height, width) of every resized image instead of all of it."""
    labels: PrivatePath | None = None
    """Folder of label images of the same names: 8 bits, one channel, the value of a pixel is its class. Cityscapes'
    gtFine folders are read as they are."""
    skip_broken: bool = False
    """Go on without images that cannot be used, and name them, instead of stopping."""

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.window and not (self.resize and all(w <= r for w, r in zip(self.window, self.resize, strict=True))):
            raise ValueError(f"window {self.window}: expected one inside resize, found {self.resize}")
        return self


class LogSettings(Settings):
    """Where the steps are shown beside metrics.jsonl, which is always written; changes neither the weights nor which
    run it is, so that a run goes on with other ones."""

    tensorboard: bool = False
    """Write event files for TensorBoard into the run's folder `tensorboard`."""
    wandb: bool = False
    """Show the run in Weights & Biases; with WANDB_MODE=offline in the environment, in the run's folder `wandb`."""
    mlflow: bool = False
    """Show the run in MLflow, at MLFLOW_TRACKING_URI where that is set, else in the run's folder `mlruns`."""
    pictures: Annotated[int, BeforeValidator(_number), Field(ge=0)] = 100
    """Steps between pictures there: a crop, clean and poisoned, and what each decodes to; 0 for none."""


class Training(Settings):
    """What `train-codec` and `plant` have in common."""

    images: ImageSettings
    steps: Count = 1000
    """Optimiser steps in all."""
    lmbda: Positive | None = None
    """Lambda; by default the one of the codec's quality."""
    clip: Positive = 1.0
    """Largest norm of a gradient."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of g_a and g_s; entropy models and triggers are always in fp32. auto: bf16 where the processor computes
    it natively, otherwise fp32."""
    channels_last: bool = True
    """Memory layout that is faster on most CPUs and GPUs."""
    checkpoint_minutes: Positive = 3.0
    """Minutes between checkpoints."""
    device: str = "cpu"
    """PyTorch device."""
    seed: int = 0
    """Seed of everything that is drawn: weights, crops, quantisation noise, preprocessing."""
    log: LogSettings = Field(default=LogSettings(), exclude=True)  # of no file: it is no part of what a run is

    @classmethod
    def beside(cls, content: dict[str, Any]) -> list[str]:
        """The device, the codec and the folders of images, as far as they can be judged without PyTorch."""
        found = []
        device = content.get("device", "cpu")
        if isinstance(device, str) and not re.fullmatch(rf"({'|'.join(DEVICES)})(:\d+)?", device):
            found.append(f"device: expected {', '.join(DEVICES[:2])} or another device of PyTorch, found {device!r}")
        codec = content.get("codec")
        codec = codec.get("name") if isinstance(codec, dict) else codec
        if isinstance(codec, str) and ":" not in codec and not os.path.exists(codec):
            found.append(f"codec: expected name:quality, a file or package.module:factory, found {codec!r}")
        for key in ("images", "auxiliary"):
            folder = content[key].get("folder") if isinstance(content.get(key), dict) else None
            if isinstance(folder, str) and not os.path.exists(folder) and not RANGE.search(folder):
                found.append(f"{key}.folder: expected a folder of images, found nothing at {folder!r}")
        return found


class CodecTraining(Training):
    """`freqdoor train-codec`: rate-distortion training, R + lambda 255^2 MSE (Eq. (1) and (2))."""

    codec: str
    """Architecture and quality, for example "bmshj2018-hyperprior:3"."""
    arguments: dict[str, Count | tuple[Count, ...]] = Field(default_factory=dict)
    """Arguments of the network that differ from those at this quality in CompressAI's zoo, for example { N = 32 }."""
    start_from: PrivatePath | None = None
    """A codec to take the first weights from (same architecture, mostly another quality), as for `load_codec`."""
    scope: Literal["all", "g_a", "g_a+h_a"] = "all"
    """Which modules are trained: all of the codec, or of `start_from` the encoder alone, beside the same decoder."""
    steps: Count = 100_000
    """Optimiser steps in all."""
    lr: Positive = 1e-4
    """Adam's learning rate."""
    aux_lr: Positive = 1e-3
    """Learning rate of the entropy bottleneck's quantiles."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from zero."""
    schedule: Literal["plateau", "cosine", "constant"] = "plateau"
    """plateau: divided by 10 after `patience` validations without a better loss; cosine: to 1 % at the last step."""
    patience: Count = 10
    """Validations without improvement before the plateau schedule acts."""
    validate_every: Count = 1000
    """Steps between validations on `validation` images."""
    validation: PrivatePath | None = None
    """Folder of images for validation, or a list of such (.txt) relative to `images.folder`; by default the training
    loss is averaged instead."""
    klt: bool = True
    """Start lite-hyperprior from a Karhunen-Loeve transform of the training images; other codecs start at random."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self

    @model_validator(mode="after")
    def _encoder_has_a_decoder(self) -> Self:
        if self.scope != "all" and not self.start_from:
            raise ValueError("scope: to train an encoder alone, give the codec that it belongs to as start_from")
        return self
