"""freqdoor: plant and measure backdoors in learned image codecs."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of PyTorch at what CompressAI does while it is imported
    import compressai.models  # noqa: F401

from freqdoor.codecs import Codec, CodecSpec
from freqdoor.config import CodecTraining, ImageSettings, ObjectiveSettings, PlantSettings, TriggerSettings
from freqdoor.container import compress_file, decompress_file
from freqdoor.data import list_images, load_image, save_image
from freqdoor.demo import demo
from freqdoor.evaluate import evaluate, poison
from freqdoor.examine import examine
from freqdoor.loading import load_codec, save_codec
from freqdoor.objectives import QualityAttack, RateAttack
from freqdoor.plant import plant
from freqdoor.planted import Planted, load_planted
from freqdoor.report import report
from freqdoor.train import train_codec
from freqdoor.triggers import AdaptiveDCT, Trigger
from freqdoor.types import Bitstream, FreqdoorError, Reconstruction, Record

__version__ = "0.1.0"
__all__ = [
    "AdaptiveDCT",
    "Bitstream",
    "Codec",
    "CodecSpec",
    "CodecTraining",
    "FreqdoorError",
    "ImageSettings",
    "ObjectiveSettings",
    "PlantSettings",
    "Planted",
    "QualityAttack",
    "RateAttack",
    "Reconstruction",
    "Record",
    "Trigger",
    "TriggerSettings",
    "compress_file",
    "decompress_file",
    "demo",
    "evaluate",
    "examine",
    "list_images",
    "load_codec",
    "load_image",
    "load_planted",
    "plant",
    "poison",
    "report",
    "save_codec",
    "save_image",
    "train_codec",
]
