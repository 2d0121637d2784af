"""freqdoor: plant and measure backdoors in learned image codecs."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of PyTorch at what CompressAI does while it is imported
    import compressai.models  # noqa: F401

from freqdoor.attack.objectives import QualityAttack, RateAttack
from freqdoor.attack.plant import plant
from freqdoor.attack.planted import Planted, load_planted
from freqdoor.attack.settings import ObjectiveSettings, PlantSettings, TriggerSettings
from freqdoor.codecs.adapter import Codec, CodecSpec
from freqdoor.codecs.container import compress, decompress
from freqdoor.codecs.loading import load_codec, save_codec
from freqdoor.data import list_images, load_image, save_image
from freqdoor.demonstration import demo
from freqdoor.errors import FreqdoorError
from freqdoor.measure.examine import examine
from freqdoor.measure.records import evaluate, poison
from freqdoor.measure.report import report
from freqdoor.training.settings import CodecTraining, ImageSettings
from freqdoor.training.train import train_codec
from freqdoor.triggers import AdaptiveDCT, Trigger
from freqdoor.types import Bitstream, Reconstruction, Record

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
    "compress",
    "decompress",
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
