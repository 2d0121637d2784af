"""What attacks on downstream networks are measured on: images, labels, networks, as `settings.py` reads them."""

from typing import Annotated

from pydantic import Field

from freqdoor.settings import PrivatePath, Settings
from freqdoor.training.settings import Count


class SegmentationTest(Settings):
    """`freqdoor segment`: what a segmentation attack (Eq. (11)) is measured on."""

    images: PrivatePath
    """Folder of 8-bit RGB images."""
    labels: PrivatePath | None = None
    """Folder of label images of the same names, for mean IoU; by default none is measured."""
    resize: tuple[Count, Count] | None = None
    """Resize images to (height, width), as the attack was trained."""
    every: Count = 1
    """Take every n-th image only."""
    networks: Annotated[tuple[PrivatePath, ...], Field(min_length=1)]
    """What is to be misled, each as for `load_network`; give one that the attack has not seen."""
    mask_network: PrivatePath | None = None
    """What says where the source class is when the trigger is added; by default the first network."""


class FaceTest(Settings):
    """`freqdoor faces`: what the removal of identities (Eq. (13)) is measured on."""

    folder: PrivatePath
    """Folder that the lists' paths are relative to."""
    gallery: PrivatePath
    """List of images of known persons, one path a line; a picture's folder is the person."""
    probes: PrivatePath
    """List of other images of the same persons, to be identified."""
    pairs: PrivatePath | None = None
    """List of pairs for verification, "PATH PATH LABEL" a line, 1 for the same person; by default none."""
    every: Count = 1
    """Take every n-th line of each list only."""
    networks: Annotated[tuple[PrivatePath, ...], Field(min_length=1)]
    """Face embeddings, each as for `load_network`; give one that the attack has not seen."""


Test = SegmentationTest | FaceTest


class DownstreamTest(Settings):
    """What `freqdoor reproduce` measures downstream attacks on; a recipe takes the table that it needs."""

    segmentation: SegmentationTest | None = None
    faces: FaceTest | None = None
