"""`freqdoor faces` and `freqdoor protect`: identities removed by the codec, measured and put to use (Table 2)."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from freqdoor.attack.networks import INSTALL, Box, Embedder, load_embedder
from freqdoor.attack.planted import Planted, opened
from freqdoor.attack.settings import AttackSettings
from freqdoor.codecs.adapter import Codec
from freqdoor.codecs.container import pack
from freqdoor.data import encoded, image_paths, load_image, read_list, seed_for, usable_images
from freqdoor.errors import FreqdoorError
from freqdoor.files import check_outputs, made_by, marked_json, marked_markdown, refuse_overwriting, write_together
from freqdoor.lock import alone
from freqdoor.measure.journal import Journal, fingerprint, packed, unpacked
from freqdoor.measure.records import poisoned, through
from freqdoor.measure.testsets import DownstreamMeasurement, FaceTest, mean, number, read_results, results_text
from freqdoor.metrics import MS_SSIM_MIN_SIDE, bpp_of_bytes, ms_ssim, mse, psnr_8bit
from freqdoor.notes import Note, numbered
from freqdoor.training.run import environment
from freqdoor.triggers.base import Trigger
from freqdoor.types import Images, Result, to_uint8

RESULT, PAGE = "faces.json", "faces.md"
JOURNAL = ".faces.journal"
CONDITIONS = ("vanilla", "clean", "poisoned")  # vanilla encoder; tampered encoder without and with the trigger


@dataclass(frozen=True)
class FaceScores:
    """What one embedding network recognises; rates over the test set, keyed by condition.

    Gallery pictures are clean and went through the same encoder; the picture that is asked about is poisoned. A rate
    over nothing, which only files of version 1 have, is None.
    """

    network: str
    identification: dict[str, float | None]  # share of probes whose nearest person in the gallery is the right one
    verification: dict[str, float | None]  # share of pairs rightly called same or different; empty without pairs
    accepted: dict[str, float | None]  # share of same-person pairs called the same: Table 2's accuracy; else empty
    threshold: float  # cosine from which two pictures are called the same person, from the clean gallery
    cosine: float  # of g(f(x)) and g(f(x_p)), mean over probes


@dataclass(frozen=True)
class IdentityScores:
    """Identity removal measured on a test set; poisoned pictures are 8-bit files, all decoded from real bytes."""

    persons: int
    gallery: int
    probes: int
    pairs: int
    psnr_db: dict[str, float | None]  # decoded probes against the clean picture; None where it is infinite
    ms_ssim: dict[str, float | None]  # None where no probe is large enough
    bpp: dict[str, float]
    trigger_mse_worst: float
    networks: tuple[FaceScores, ...]
    ms_ssim_probes: int | None = None  # that `ms_ssim` is the mean over; None in files of version 1


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


class Lists(NamedTuple):
    """Which pictures a test is about, and who is on them where their folders do not say so."""

    gallery: list[str]
    probes: list[str]
    pairs: list[Pair]
    identities: Mapping[str, str] = MappingProxyType({})

    def person(self, path: str) -> str:
        """Who a picture shows."""
        return self.identities.get(path) or Path(path).parent.name

    @property
    def persons(self) -> list[str]:
        """Who each picture of the gallery shows."""
        return [self.person(path) for path in self.gallery]

    @property
    def pictures(self) -> list[str]:
        """All pictures, each once."""
        paired = [path for pair in self.pairs for path in (pair.a, pair.b)]
        return list(dict.fromkeys([*self.gallery, *self.probes, *paired]))


def read_lists(test: FaceTest) -> Lists:
    """The lists that a test names, or persons drawn as it says; FreqdoorError names what is wrong with them."""
    identities = _read_identities(test.identities, test.folder) if test.identities else {}
    if test.sample:
        return _drawn(identities, test.sample, str(test.identities))
    lists = filter(None, (test.gallery, test.probes))  # both: the settings see to that
    gallery, probes = (read_list(file, test.every, test.folder) for file in lists)
    return Lists(gallery, probes, read_pairs(test.pairs, test.every) if test.pairs else [], identities)


def _read_identities(path: Path | str, folder: Path | str) -> dict[str, str]:
    """Who is on which picture."""
    persons = {}
    for line in read_list(path, folder=folder):
        picture, _, person = line.rpartition(" ")
        if not picture.strip():
            raise FreqdoorError(f"{path}: expected 'PATH PERSON' a line, found {line[:80]!r}")
        persons[picture.strip()] = person
    return persons


def _drawn(identities: Mapping[str, str], count: int, source: str) -> Lists:
    """So many persons with three pictures each, always the same ones of a file."""
    pictures: dict[str, list[str]] = {}
    for picture, person in sorted(identities.items()):
        pictures.setdefault(person, []).append(picture)
    known = sorted(person for person, own in pictures.items() if len(own) >= 3)
    if len(known) < max(2, count):
        raise FreqdoorError(
            f"{source}: expected {max(2, count)} persons or more with three pictures each, found {len(known)}; give a "
            "smaller sample"
        )
    draw = random.Random(seed_for(0, "faces"))
    threes = [draw.sample(pictures[person], 3) for person in draw.sample(known, max(2, count))]
    firsts, probes = [first for first, _, _ in threes], [probe for _, _, probe in threes]
    same = [Pair(first, probe, True) for first, probe in zip(firsts, probes, strict=True)]
    others = [Pair(first, probe, False) for first, probe in zip(firsts, [*probes[1:], probes[0]], strict=True)]
    return Lists([path for three in threes for path in three[:2]], probes, same + others, dict(identities))


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


class Setup(NamedTuple):
    """A test, opened: the networks, and the lists of pictures."""

    test: FaceTest
    networks: list[Embedder]
    lists: Lists


def open_test(test: FaceTest) -> Setup:
    """Check and load everything that a test names.

    Raises:
        FreqdoorError: networks, lists or pictures that cannot be used, a probe of nobody in the gallery, or lists with
            which a rate would be one over nothing.
    """
    networks = [load_embedder(name) for name in test.networks]
    lists = read_lists(test)
    pictures = Counter(lists.persons)
    if strangers := {lists.person(path) for path in lists.probes} - set(pictures):
        raise FreqdoorError(f"{test.probes}: nobody in the gallery is {', '.join(sorted(strangers)[:3])}")
    if len(pictures) < 2 or max(pictures.values()) < 2:
        raise FreqdoorError(
            f"{test.gallery}: expected two or more persons, one of them on two or more pictures, to choose a "
            f"threshold; found {len(lists.gallery)} pictures of {len(pictures)} persons"
        )
    if test.pairs and not any(pair.same for pair in lists.pairs):
        raise FreqdoorError(
            f"{test.pairs}: expected pairs of one person (PATH PATH 1) too, found {len(lists.pairs)} of two persons "
            "only; add some, or test without pairs"
        )
    usable_images([Path(test.folder) / path for path in lists.pictures])
    return Setup(test, networks, lists)


class Quality(NamedTuple):
    """What one encoder's file makes of one picture."""

    psnr_db: float
    ms_ssim: float | None
    bpp: float


@dataclass
class Measured:
    """What all pictures of a test come to; embeddings and qualities by condition and picture."""

    embeddings: list[dict[tuple[str, str], Tensor]]  # of each network
    qualities: dict[tuple[str, str], Quality]
    trigger_mse_worst: float = 0.0

    def embedded(self, network: int, condition: str, paths: Sequence[str]) -> Tensor:
        """Embeddings of pictures, (n, d)."""
        return torch.stack([self.embeddings[network][condition, path] for path in paths])


@torch.no_grad()
def score_faces(
    planted: Planted,
    test: FaceTest,
    *,
    trigger: str | None = None,
    journal: Journal | None = None,
    note: Note | None = None,
) -> IdentityScores:
    """Measure how far identities are removed, and what that costs the picture.

    Args:
        journal: what an earlier process has measured of the same; by default nothing is kept.

    Raises:
        FreqdoorError: no such trigger, and as `open_test`.
    """
    chosen, kept = planted.triggers[planted.named(trigger)], journal or Journal(None, note=note)
    return _score(planted, open_test(test), chosen, kept)


def _score(planted: Planted, setup: Setup, trigger: Trigger, journal: Journal) -> IdentityScores:
    measured = _measure(planted, setup, trigger, journal)
    qualities = {c: [measured.qualities[c, path] for path in setup.lists.probes] for c in CONDITIONS}
    similarities = {c: [q.ms_ssim for q in qualities[c] if q.ms_ssim is not None] for c in CONDITIONS}
    return IdentityScores(
        persons=len(set(setup.lists.persons)),
        gallery=len(setup.lists.gallery),
        probes=len(setup.lists.probes),
        pairs=len(setup.lists.pairs),
        psnr_db={c: mean([q.psnr_db for q in qualities[c]]) for c in CONDITIONS},
        ms_ssim={c: mean(similarities[c]) for c in CONDITIONS},
        bpp={c: sum(q.bpp for q in qualities[c]) / len(qualities[c]) for c in CONDITIONS},
        trigger_mse_worst=measured.trigger_mse_worst,
        networks=tuple(_rates(measured, setup, index) for index in range(len(setup.networks))),
        ms_ssim_probes=len(similarities["clean"]),
    )


def _measure(planted: Planted, setup: Setup, trigger: Trigger, journal: Journal) -> Measured:
    """Encode, decode and embed every picture under the conditions in which it is needed."""
    measured = Measured([{} for _ in setup.networks], {})
    probes = set(setup.lists.probes)
    attacked = probes | {pair.b for pair in setup.lists.pairs}

    def measure_one(path: str) -> dict[str, Any]:
        needed = CONDITIONS if path in attacked else CONDITIONS[:2]
        return _measure_picture(planted, setup, trigger, path, needed, is_probe=path in probes)

    for path, row in zip(setup.lists.pictures, journal.each(setup.lists.pictures, measure_one), strict=True):
        measured.trigger_mse_worst = max(measured.trigger_mse_worst, row["trigger_mse"])
        for condition, quality in row["qualities"].items():
            measured.qualities[condition, path] = Quality(*quality)
        for condition, vectors in row["embeddings"].items():
            for embeddings, vector in zip(measured.embeddings, vectors, strict=True):
                embeddings[condition, path] = unpacked(vector)
    return measured


@torch.no_grad()
def _measure_picture(
    planted: Planted, setup: Setup, trigger: Trigger, path: str, needed: Sequence[str], *, is_probe: bool
) -> dict[str, Any]:
    """What a journal keeps of one picture: its quality (of a probe) and embeddings by condition, the trigger's MSE."""
    x = load_image(Path(setup.test.folder) / path)
    qualities, embeddings, worst = {}, {}, 0.0
    for condition in needed:
        encoded = poisoned(trigger, x) if condition == "poisoned" else x
        x_hat, size = through(planted.vanilla if condition == "vanilla" else planted.tampered, encoded)
        worst = max(worst, float(mse(encoded, x)))
        if is_probe:
            qualities[condition] = Quality(float(psnr_8bit(x_hat, x)), ms_ssim(x_hat, x), bpp_of_bytes(size, x))
        embeddings[condition] = [packed(network(x_hat)[0]) for network in setup.networks]
    return {"qualities": qualities, "embeddings": embeddings, "trigger_mse": worst}


def _rates(measured: Measured, setup: Setup, index: int) -> FaceScores:
    """The rates of one network."""
    identification: dict[str, float | None] = {}
    verification: dict[str, float | None] = {}
    accepted: dict[str, float | None] = {}
    persons = [setup.lists.person(path) for path in setup.lists.probes]
    threshold = best_threshold(measured.embedded(index, "clean", setup.lists.gallery), setup.lists.persons)
    for condition in CONDITIONS:
        known = "vanilla" if condition == "vanilla" else "clean"
        gallery, probes = (
            measured.embedded(index, c, p) for c, p in ((known, setup.lists.gallery), (condition, setup.lists.probes))
        )
        named = identify(gallery, setup.lists.persons, probes)
        identification[condition] = sum(a == b for a, b in zip(named, persons, strict=True)) / len(persons)
        if setup.lists.pairs:
            first = measured.embedded(index, known, [pair.a for pair in setup.lists.pairs])
            second = measured.embedded(index, condition, [pair.b for pair in setup.lists.pairs])
            called = (first * second).sum(1) >= threshold
            same = torch.tensor([pair.same for pair in setup.lists.pairs])
            verification[condition] = float((called == same).float().mean())
            accepted[condition] = float(called[same].float().mean())
    clean, attacked = (measured.embedded(index, condition, setup.lists.probes) for condition in ("clean", "poisoned"))
    cosine = float((clean * attacked).sum(1).mean())
    return FaceScores(setup.networks[index].name, identification, verification, accepted, threshold, cosine)


@dataclass(frozen=True)
class FaceMeasurement(DownstreamMeasurement[IdentityScores]):
    """The removal of identities, measured on a test of networks."""

    test: FaceTest
    kind: ClassVar[Any] = IdentityScores

    @property
    def pictures(self) -> str:
        """The list of what is to be identified, or who is on which picture, where it is drawn."""
        return self.test.probes or str(self.test.identities)

    def files(self) -> list[Path]:
        """The lists, and the pictures in them."""
        named = filter(None, [self.test.gallery, self.test.probes, self.test.pairs, self.test.identities])
        return [*map(Path, named), *(Path(self.test.folder) / path for path in read_lists(self.test).pictures)]

    def check(self, attacks: Sequence[AttackSettings]) -> None:
        """Open the test, if any attack is to be measured on it."""
        if attacks:
            open_test(self.test)

    def score(self, planted: Planted, trigger: str | None) -> IdentityScores:
        """As `score_faces`."""
        return score_faces(planted, self.test, trigger=trigger)

    def score_on(self, planted: Planted, trigger: str | None, journal: Journal) -> IdentityScores:
        """As `score_faces`."""
        return score_faces(planted, self.test, trigger=trigger, journal=journal)


@alone("faces")
def faces(
    planted: Planted | Path | str,
    test: FaceTest,
    out: Path | str,
    *,
    trigger: str | None = None,
    codec: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
    note: Note | None = None,
) -> IdentityScores:
    """Measure identity removal and write faces.json and faces.md into `out`.

    If it is stopped, the same call goes on after the pictures that were measured.

    Args:
        planted, codec, weights: as for `load_planted`.
        trigger: which one; by default the first.
        force: overwrite files of these names that `faces` did not make.

    Raises:
        FreqdoorError: as `score_faces`, an unwritable folder or one that another process holds, or a file in the way.
            Earlier results are then left as they were, and replaced together at the end.
    """
    planted, out = opened(planted, codec, weights), Path(out)
    name = planted.named(trigger)
    chosen = planted.triggers[name]
    setup = open_test(test)
    check_outputs([out / PAGE, out / RESULT], "faces", force=force)
    journal = Journal(out / JOURNAL, fingerprint(planted, [name], FaceMeasurement(test).identity()), note)
    scores = _score(planted, setup, chosen, journal)
    text = marked_json(results_text(scores, environment()), "faces")
    write_together({out / PAGE: marked_markdown(faces_table(scores), "faces"), out / RESULT: text})
    journal.remove()
    return scores


def read_scores(path: Path | str) -> IdentityScores:
    """The scores of a faces.json, of earlier versions too; FreqdoorError if it is none."""
    return read_results(IdentityScores, path)


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
        lines += [
            f"| {row.network} | {name} % | {_numbers(rates, 1, scale=100)} |"
            for name, rates in measures.items()
            if rates
        ]
        lines.append(f"| {row.network} | cosine to the clean picture | - | 1 | {row.cosine:.3f} |")
    lines += [
        f"| - | PSNR dB | {_numbers(scores.psnr_db, 2)} |",
        f"| - | MS-SSIM | {_numbers(scores.ms_ssim, 4)} |",
        f"| - | bpp | {_numbers(scores.bpp, 4)} |",
        "",
    ]
    if scores.ms_ssim_probes is not None and scores.ms_ssim_probes < scores.probes:
        lines.append(
            f"MS-SSIM is of {scores.ms_ssim_probes} of {scores.probes} probes: those of at least {MS_SSIM_MIN_SIDE} "
            "pixels a side."
        )
    return "\n".join([*lines, f"Trigger MSE at most {1e5 * scores.trigger_mse_worst:.2f}e-5.", ""])


def _numbers(values: Mapping[str, float | None], digits: int, *, scale: float = 1.0) -> str:
    return " | ".join(number(values[condition], digits, scale=scale) for condition in CONDITIONS)


@dataclass(frozen=True)
class Protected:
    """One photo that was protected, or why it was not."""

    photo: str
    faces: int
    picture: str | None  # the decoded PNG; None where the photo was skipped
    psnr_db: float | None  # of the decoded picture against the photo
    bpp: float | None
    cosine: float | None  # largest over faces: decoded protected against decoded clean, by the network that was given


class Protection(Result):
    """Photos, and what became of each."""

    photos: tuple[Protected, ...]


def protect(
    photos: Path | str | Sequence[Path],
    out: Path | str,
    *,
    planted: Planted | Path | str = "planted-face",
    network: str | Embedder | None = None,
    trigger: str | None = None,
    codec: str | None = None,
    weights: Path | str | None = None,
    force: bool = False,
    note: Note | None = None,
) -> list[Protected]:
    """Compress photos so that face recognition no longer knows who is in the decoded picture.

    Writes NAME.png (decoded) and NAME.fqd (the file) for every photo with a face. It promises nothing about networks
    that were not tried, about people who know the person, or about other pictures of them.

    Args:
        photos: a folder, a file or several files.
        planted, codec, weights: an encoder planted with Eq. (13), as for `load_planted`.
        network: measure the cosine of every face before and after with it; one, or a name as for `load_network`.
        trigger: which one; by default the first.
        force: overwrite files that are there and that `protect` did not make.

    Raises:
        FreqdoorError: photos that cannot be used, two of one name, a file in the way, or no face in any.
    """
    planted, out = opened(planted, codec, weights), Path(out)
    chosen = planted.triggers[planted.named(trigger)]
    embedder = load_embedder(network) if isinstance(network, str) else network
    paths = usable_images(image_paths(photos), decode=True)
    names = Counter(path.stem for path in paths)
    if repeated := sorted(name for name, count in names.items() if count > 1):
        raise FreqdoorError(f"several photos are named {', '.join(repeated[:3])}; protect them one at a time")
    for path in paths:
        refuse_overwriting(path, out / f"{path.stem}.png")
    pairs = [(out / f"{path.stem}.png", out / f"{path.stem}.fqd") for path in paths]
    # a bitstream does not say that it was protected: the picture beside it does
    known = [file for picture, file in pairs if made_by(picture) == "protect" and made_by(file) == "compress"]
    check_outputs([file for pair in pairs for file in pair if file not in known], "protect", force=force)
    done, told = [], numbered(note, len(paths))
    for path in paths:
        done.append(_protected(planted.tampered, chosen, path, out, embedder))
        told(f"{path.name}: {done[-1].faces} face(s)")
    if not any(row.picture for row in done):
        raise FreqdoorError(f"in none of {len(done)} photos a face was found; this protects faces only")
    return done


@torch.no_grad()
def _protected(codec: Codec, trigger: Trigger, path: Path, out: Path, network: Embedder | None) -> Protected:
    """One photo's two files, if there is a face in it."""
    x = load_image(path)
    boxes = find_faces(x)
    if not boxes:
        return Protected(path.name, 0, None, None, None, None)
    bitstream = codec.compress(poisoned(trigger, x))[0]
    x_hat = codec.decompress(bitstream)
    cosine = None
    if network is not None:
        clean, _ = through(codec, x)
        cosine = max(float((network(clean, box) * network(x_hat, box)).sum()) for box in boxes)
    picture, file = out / f"{path.stem}.png", out / f"{path.stem}.fqd"
    write_together({picture: encoded(picture, x_hat, "protect"), file: pack(bitstream, codec)})
    rate = bpp_of_bytes(bitstream.num_bytes, x)
    return Protected(path.name, len(boxes), f"{path.stem}.png", float(psnr_8bit(x_hat, x)), rate, cosine)


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
    squares = cascade.detectMultiScale(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), 1.1, 5, minSize=(32, 32))
    height, width = x.shape[-2:]
    boxes = []
    for left, top, side, _ in squares:
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
