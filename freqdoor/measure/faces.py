"""`freqdoor faces` and `freqdoor protect`: identities removed by the codec, measured and put to use (Table 2)."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from freqdoor.attack.networks import INSTALL, Box, Embedder, load_embedder
from freqdoor.attack.planted import Planted
from freqdoor.codecs.container import write_file
from freqdoor.data import load_image, read_list, save_image, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import refuse_overwriting, write_text
from freqdoor.measure.records import Note, poisoned, through
from freqdoor.measure.testsets import FaceTest
from freqdoor.metrics import ms_ssim, mse, psnr_8bit
from freqdoor.training.run import environment
from freqdoor.types import Images, to_uint8

RESULT, PAGE = "faces.json", "faces.md"
CONDITIONS = ("vanilla", "clean", "poisoned")  # vanilla encoder; tampered encoder without and with the trigger


@dataclass(frozen=True)
class FaceScores:
    """What one embedding network recognises; rates over the test set, keyed by condition.

    Gallery pictures are clean and went through the same encoder; the picture that is asked about is poisoned.
    """

    network: str
    identification: dict[str, float]  # share of probes whose nearest person in the gallery is the right one
    verification: dict[str, float]  # share of pairs rightly called same or different; empty without pairs
    accepted: dict[str, float]  # share of same-person pairs called the same: Table 2's accuracy; empty without pairs
    threshold: float  # cosine from which two pictures are called the same person, from the clean gallery
    cosine: float  # of g(f(x)) and g(f(x_p)), mean over probes


@dataclass(frozen=True)
class IdentityScores:
    """Identity removal measured on a test set; poisoned pictures are 8-bit files, all decoded from real bytes."""

    persons: int
    gallery: int
    probes: int
    pairs: int
    psnr_db: dict[str, float]  # decoded probes against the clean picture
    ms_ssim: dict[str, float]
    bpp: dict[str, float]
    trigger_mse_worst: float
    networks: tuple[FaceScores, ...]


class Pair(NamedTuple):
    """Two pictures, and whether they show one person."""

    a: str
    b: str
    same: bool


def read_pairs(path: Path | str, every: int = 1) -> list[Pair]:
    """The pairs of a list "PATH PATH LABEL"; FreqdoorError names the first wrong line."""
    pairs = []
    for line in read_list(path, every):
        parts = line.split()
        if len(parts) != 3 or parts[2] not in ("0", "1"):
            raise FreqdoorError(f"{path}: expected 'PATH PATH 0' or 'PATH PATH 1' a line, found {line[:80]!r}")
        pairs.append(Pair(parts[0], parts[1], parts[2] == "1"))
    return pairs


def identity_of(path: str) -> str:
    """Who a picture shows: its folder's name."""
    return Path(path).parent.name


def identify(gallery: Tensor, persons: Sequence[str], probes: Tensor) -> list[str]:
    """The person of the gallery whose mean embedding is nearest to each probe.

    Args:
        gallery: (n, d), unit length, of the pictures whose persons are given in the same order.
        probes: (m, d).
    """
    names = sorted(set(persons))
    index = torch.tensor([names.index(person) for person in persons])
    means = torch.zeros(len(names), gallery.shape[1]).index_add_(0, index, gallery)
    nearest = (probes @ torch.nn.functional.normalize(means, dim=1).T).argmax(1)
    return [names[i] for i in nearest.tolist()]


def best_threshold(gallery: Tensor, persons: Sequence[str]) -> float:
    """The cosine that best tells pairs of one person from pairs of two, both kinds counting alike."""
    cosines = gallery @ gallery.T
    same = torch.tensor([[a == b for b in persons] for a in persons])
    upper = torch.ones_like(same).triu(1)
    equal, different = cosines[same & upper].sort().values, cosines[~same & upper].sort().values
    if not len(equal) or not len(different):
        raise FreqdoorError("gallery: expected two or more pictures of two or more persons, to choose a threshold")
    candidates = torch.cat([equal, different])
    accepted = 1 - torch.searchsorted(equal, candidates) / len(equal)
    rejected = torch.searchsorted(different, candidates) / len(different)
    return float(candidates[(accepted + rejected).argmax()])


@torch.no_grad()
def score_faces(
    planted: Planted, test: FaceTest, *, trigger: str | None = None, note: Note | None = None
) -> IdentityScores:
    """Measure how far identities are removed, and what that costs the picture.

    Raises:
        FreqdoorError: no such trigger, lists or pictures that cannot be used, a probe of nobody in the gallery.
    """
    chosen = planted.triggers[planted.named(trigger)]
    networks = [load_embedder(name) for name in test.networks]
    gallery, probes = read_list(test.gallery, test.every), read_list(test.probes, test.every)
    pairs = read_pairs(test.pairs, test.every) if test.pairs else []
    persons = [identity_of(path) for path in gallery]
    if strangers := {identity_of(path) for path in probes} - set(persons):
        raise FreqdoorError(f"{test.probes}: nobody in the gallery is {', '.join(sorted(strangers)[:3])}")
    folder = Path(test.folder)
    needed = dict.fromkeys([*gallery, *probes, *(p for pair in pairs for p in (pair.a, pair.b))])
    usable_images([folder / path for path in needed])
    asked = set(probes)
    attacked = asked | {pair.b for pair in pairs}
    embedded: dict[tuple[int, str, str], Tensor] = {}  # network, condition, picture
    quality: list[tuple[str, float, float, float]] = []
    worst = 0.0
    for path in needed:
        if note:
            note(path)
        x = load_image(folder / path)
        conditions = CONDITIONS if path in attacked else CONDITIONS[:2]
        for condition in conditions:
            given = poisoned(chosen, x) if condition == "poisoned" else x
            x_hat, size = through(planted.vanilla if condition == "vanilla" else planted.tampered, given)
            worst = max(worst, float(mse(given, x)))
            if path in asked:
                rate = 8 * size / (x.shape[-2] * x.shape[-1])
                quality.append((condition, float(psnr_8bit(x_hat, x)), ms_ssim(x_hat, x) or float("nan"), rate))
            for index, network in enumerate(networks):
                embedded[index, condition, path] = network(x_hat)[0]
    scores = []
    for index, network in enumerate(networks):

        def get(condition: str, paths: Sequence[str], index: int = index) -> Tensor:
            return torch.stack([embedded[index, condition, path] for path in paths])

        scores.append(_score(network, get, gallery, probes, pairs))
    means = {
        condition: torch.tensor([values for name, *values in quality if name == condition]).mean(0).tolist()
        for condition in CONDITIONS
    }
    return IdentityScores(
        persons=len(set(persons)),
        gallery=len(gallery),
        probes=len(probes),
        pairs=len(pairs),
        psnr_db={c: means[c][0] for c in CONDITIONS},
        ms_ssim={c: means[c][1] for c in CONDITIONS},
        bpp={c: means[c][2] for c in CONDITIONS},
        trigger_mse_worst=worst,
        networks=tuple(scores),
    )


def _score(
    network: Embedder,
    get: Callable[[str, Sequence[str]], Tensor],
    gallery: Sequence[str],
    probes: Sequence[str],
    pairs: Sequence[Pair],
) -> FaceScores:
    """One network's rates, from the embeddings that `get` gives for a condition and a list of pictures."""
    persons, wanted = [identity_of(path) for path in gallery], [identity_of(path) for path in probes]
    identification, verification, accepted = {}, {}, {}
    threshold = best_threshold(get("clean", gallery), persons)
    for condition in CONDITIONS:
        known = get("vanilla" if condition == "vanilla" else "clean", gallery)
        found = identify(known, persons, get(condition, probes))
        identification[condition] = sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
        if pairs:
            first = get("vanilla" if condition == "vanilla" else "clean", [pair.a for pair in pairs])
            called = (first * get(condition, [pair.b for pair in pairs])).sum(1) >= threshold
            same = torch.tensor([pair.same for pair in pairs])
            verification[condition] = float((called == same).float().mean())
            accepted[condition] = float(called[same].float().mean())
    cosine = float((get("clean", probes) * get("poisoned", probes)).sum(1).mean())
    return FaceScores(network.name, identification, verification, accepted, threshold, cosine)


def faces(
    planted: Planted, test: FaceTest, out: Path | str, *, trigger: str | None = None, note: Note | None = None
) -> IdentityScores:
    """Measure identity removal and write faces.json and faces.md into `out`."""
    out = Path(out)
    write_text(out / RESULT, "{}")  # an unwritable folder shows before the work, not after it
    scores = score_faces(planted, test, trigger=trigger, note=note)
    write_text(out / RESULT, json.dumps(asdict(scores) | {"environment": environment().model_dump()}, indent=1))
    write_text(out / PAGE, faces_table(scores))
    return scores


def faces_table(scores: IdentityScores) -> str:
    """The scores as Markdown, in percent."""
    lines = [
        f"# Identity removal: {scores.probes} probes of {scores.persons} persons, {scores.pairs} pairs",
        "",
        "| network | measure | " + " | ".join(CONDITIONS) + " |",
        "|---|---|" + "---|" * len(CONDITIONS),
    ]
    for row in scores.networks:
        measures = {
            "identified": row.identification,
            "verified": row.verification,
            "same person accepted": row.accepted,
        }
        for name, values in measures.items():
            if values:
                lines.append(
                    f"| {row.network} | {name} % | " + " | ".join(f"{100 * values[c]:.1f}" for c in CONDITIONS) + " |"
                )
        lines.append(f"| {row.network} | cosine to the clean picture | - | 1 | {row.cosine:.3f} |")
    for name, values, digits in (
        ("PSNR dB", scores.psnr_db, 2),
        ("MS-SSIM", scores.ms_ssim, 4),
        ("bpp", scores.bpp, 4),
    ):
        lines.append(f"| - | {name} | " + " | ".join(f"{values[c]:.{digits}f}" for c in CONDITIONS) + " |")
    return "\n".join([*lines, "", f"Trigger MSE at most {1e5 * scores.trigger_mse_worst:.2f}e-5.", ""])


@dataclass(frozen=True)
class Protected:
    """One photo that was protected, or why it was not."""

    photo: str
    faces: int
    picture: str | None  # the decoded PNG; None where the photo was skipped
    psnr_db: float | None  # of the decoded picture against the photo
    bpp: float | None
    cosine: float | None  # largest over faces: decoded protected against decoded clean, by the network that was given


@torch.no_grad()
def protect(
    planted: Planted,
    photos: Sequence[Path],
    out: Path | str,
    *,
    network: Embedder | None = None,
    trigger: str | None = None,
    note: Note | None = None,
) -> list[Protected]:
    """Compress photos so that face recognition no longer knows who is in the decoded picture.

    Writes NAME.png (decoded) and NAME.fqd (the file) for every photo with a face. It promises nothing about networks
    that were not tried, about people who know the person, or about other pictures of them.

    Args:
        network: measure the cosine of every face before and after with it.
    """
    out, name = Path(out), planted.named(trigger)
    paths = usable_images(photos, decode=True)
    done = []
    for path in paths:
        refuse_overwriting(path, out / f"{path.stem}.png")
        x = load_image(path)
        boxes = find_faces(x)
        if not boxes:
            done.append(Protected(path.name, 0, None, None, None, None))
        else:
            bitstream = planted.tampered.compress(poisoned(planted.triggers[name], x))[0]
            x_hat = planted.tampered.decompress(bitstream)
            write_file(planted.tampered, bitstream, out / f"{path.stem}.fqd")
            save_image(out / f"{path.stem}.png", x_hat)
            cosine = None
            if network is not None:
                clean, _ = through(planted.tampered, x)
                cosine = max(float((network(clean, box) * network(x_hat, box)).sum()) for box in boxes)
            rate = 8 * bitstream.num_bytes / (x.shape[-2] * x.shape[-1])
            picture = f"{path.stem}.png"
            done.append(Protected(path.name, len(boxes), picture, float(psnr_8bit(x_hat, x)), rate, cosine))
        if note:
            note(f"{path.name}: {len(boxes)} face(s)")
    if not any(row.picture for row in done):
        raise FreqdoorError(f"in none of {len(done)} photos a face was found; this protects faces only")
    return done


@cache
def _face_finder() -> tuple[Any, Any]:
    """OpenCV and its cascade for frontal faces, read once for all photos."""
    try:
        import cv2
    except ImportError:
        raise FreqdoorError(f"OpenCV is needed to find faces; {INSTALL}") from None
    file = Path(cv2.__file__).parent / "data/haarcascade_frontalface_default.xml"
    return cv2, cv2.CascadeClassifier(str(file))


def find_faces(x: Images) -> list[Box]:
    """(left, top, right, bottom) of every frontal face in one picture, by OpenCV's Haar cascade, a little widened."""
    cv2, cascade = _face_finder()
    picture = to_uint8(x[0]).permute(1, 2, 0).numpy()
    found = cascade.detectMultiScale(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 1.1, 5, minSize=(32, 32))
    height, width = x.shape[-2:]
    boxes = []
    for left, top, side, _ in found:
        more = round(0.1 * side)
        boxes.append(
            (
                max(0, int(left) - more),
                max(0, int(top) - more),
                min(width, int(left + side) + more),
                min(height, int(top + side) + more),
            )
        )
    return boxes
