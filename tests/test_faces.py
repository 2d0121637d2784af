import json

import numpy as np
import pytest
import torch
from conftest import natural, write_png
from networks import face_spec
from PIL import Image
from typer.testing import CliRunner

from freqdoor import load_image
from freqdoor.attack.networks import load_embedder
from freqdoor.attack.plant import plant
from freqdoor.attack.settings import PlantSettings
from freqdoor.cli import app
from freqdoor.errors import FreqdoorError
from freqdoor.measure import faces as module
from freqdoor.measure.faces import Pair, best_threshold, faces, find_faces, identify, protect, read_pairs, score_faces
from freqdoor.measure.records import poisoned
from freqdoor.measure.testsets import FaceTest
from freqdoor.settings import make_settings


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Three persons with three pictures each, alike but for noise, and the lists of a test."""
    folder = tmp_path_factory.mktemp("people")
    for person in range(3):
        (folder / f"person{person}").mkdir()
        for i in range(3):
            noise = 0.02 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(10 * person + i))
            write_png(folder / f"person{person}/{i}.png", (natural(person, 64, 64) + noise).clamp(0, 1))
    (folder / "gallery.txt").write_text("".join(f"person{p}/{i}.png\n" for p in range(3) for i in range(2)))
    (folder / "probes.txt").write_text("".join(f"person{p}/2.png\n" for p in range(3)))
    (folder / "pairs.txt").write_text("person0/0.png person0/2.png 1\nperson0/0.png person1/2.png 0\n")
    face_spec(folder)
    return folder


@pytest.fixture(scope="module")
def planted(people, tmp_path_factory):
    content = {
        "images": {"folder": str(people), "crop": 64, "batch_size": 2},
        "auxiliary": {"folder": str(people), "files": str(people / "gallery.txt"), "resize": [64, 64], "batch_size": 2},
        "objective": {"name": "face", "arguments": {"network": str(people / "face.toml")}},
        "steps": 2,
        "trigger": {"arguments": {"width": 8}},
    }
    return plant(make_settings(PlantSettings, content), tmp_path_factory.mktemp("run"))


@pytest.fixture
def face_test(people):
    def make(**changes):
        content = {"folder": str(people), "networks": (str(people / "face.toml"),)}
        content |= {key: str(people / f"{key}.txt") for key in ("gallery", "probes", "pairs")}
        return FaceTest(**content | changes)

    return make


def unit(*rows):
    vectors = torch.tensor(np.array(rows), dtype=torch.float32)
    return vectors / vectors.norm(dim=1, keepdim=True)


def test_identification_is_by_the_nearest_mean():
    gallery = unit([1, 0.2], [1, -0.2], [0, 1], [0.1, 1])
    found = identify(gallery, ["b", "b", "a", "a"], unit([1, 0.1], [0.2, 1], [-1, 0.1]))
    assert found == ["b", "a", "a"]


def test_threshold_tells_the_gallerys_pairs_apart():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    persons = [str(p) for p in range(4) for _ in range(5)]
    points = unit(*(centres[int(p)] + 0.8 * rng.normal(size=8) for p in persons))
    found = best_threshold(points, persons)
    pairs = [(float(points[i] @ points[j]), persons[i] == persons[j]) for i in range(20) for j in range(i + 1, 20)]

    def balanced(threshold):
        rates = [np.mean([(c >= threshold) == s for c, s in pairs if s == kind]) for kind in (True, False)]
        return np.mean(rates)

    assert balanced(found - 1e-6) == pytest.approx(max(balanced(c - 1e-6) for c, _ in pairs))
    with pytest.raises(FreqdoorError, match="two or more persons"):
        best_threshold(points[:5], persons[:5])


def test_scores_against_what_is_decoded(planted, face_test, people):
    scores = score_faces(planted, face_test())
    assert (scores.persons, scores.gallery, scores.probes, scores.pairs) == (3, 6, 3, 2)
    network = load_embedder(str(people / "face.toml"))

    def embed(codec, path, attacked=False):
        x = load_image(people / path)
        given = poisoned(planted.triggers["face"], x) if attacked else x
        return network(codec.decompress(codec.compress(given)[0]))[0]

    [found] = scores.networks
    probes = [f"person{p}/2.png" for p in range(3)]
    cosines = [float(embed(planted.tampered, p) @ embed(planted.tampered, p, attacked=True)) for p in probes]
    assert found.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    first, second = embed(planted.tampered, "person0/0.png"), embed(planted.tampered, probes[0], attacked=True)
    assert found.accepted["poisoned"] == float(float(first @ second) >= found.threshold)
    assert found.identification["vanilla"] == 1.0
    assert set(found.verification) == {"vanilla", "clean", "poisoned"}
    assert scores.trigger_mse_worst <= 2.5e-5
    assert scores.psnr_db["poisoned"] > 0


def test_faces_writes_scores_and_a_table(planted, face_test, tmp_path):
    scores = faces(planted, face_test(pairs=None), tmp_path)
    assert scores.pairs == 0
    assert scores.networks[0].verification == {}
    assert json.loads((tmp_path / "faces.json").read_text())["probes"] == 3
    page = (tmp_path / "faces.md").read_text()
    assert "| face | identified % |" in page
    assert "verified" not in page


def test_mistakes_in_lists(planted, face_test, people, tmp_path):
    stranger = tmp_path / "probes.txt"
    stranger.write_text("person9/0.png\n")
    with pytest.raises(FreqdoorError, match="nobody in the gallery is person9"):
        score_faces(planted, face_test(probes=str(stranger)))
    stranger.write_text("person0/9.png\n")
    with pytest.raises(FreqdoorError, match="no such file"):
        score_faces(planted, face_test(probes=str(stranger)))
    stranger.write_text("person0/0.png person1/0.png maybe\n")
    with pytest.raises(FreqdoorError, match="PATH PATH 0"):
        read_pairs(stranger)
    with pytest.raises(FreqdoorError, match="could not read this list"):
        read_pairs(tmp_path / "none.txt")
    assert read_pairs(people / "pairs.txt")[1] == Pair("person0/0.png", "person1/2.png", False)


def test_protect_writes_what_is_decoded_and_skips_photos_without_a_face(planted, people, tmp_path, monkeypatch):
    photos = [people / "person0/0.png", people / "person1/1.png"]
    monkeypatch.setattr(module, "find_faces", lambda x: [(8, 8, 56, 56)] if (x == load_image(photos[0])).all() else [])
    network = load_embedder(str(people / "face.toml"))
    one, other = protect(planted, photos, tmp_path / "out", network=network)
    assert (one.faces, one.picture) == (1, "0.png")
    assert (other.faces, other.picture) == (0, None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.fqd", "0.png"]
    decoded = load_image(tmp_path / "out/0.png")
    x = load_image(photos[0])
    assert one.psnr_db == pytest.approx(float(-10 * (decoded - x).square().mean().log10()), abs=1e-3)
    clean = planted.tampered.decompress(planted.tampered.compress(x)[0])
    box = (8, 8, 56, 56)
    assert one.cosine == pytest.approx(float((network(clean, box) * network(decoded, box)).sum()), abs=2e-3)
    with pytest.raises(FreqdoorError, match="in none of 1 photos a face was found"):
        protect(planted, photos[1:], tmp_path / "none")
    with pytest.raises(FreqdoorError, match="overwrite the original"):
        protect(planted, photos, people / "person0")


def test_no_face_in_noise():
    assert find_faces(torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))) == []


def test_commands(planted, people, tmp_path, monkeypatch):
    run = tmp_path / "run"
    content = {
        "images": {"folder": str(people), "crop": 64, "batch_size": 1},
        "auxiliary": {"folder": str(people), "resize": [64, 64], "batch_size": 1},
        "objective": {"name": "face", "arguments": {"network": str(people / "face.toml")}},
        "steps": 1,
    }
    plant(make_settings(PlantSettings, content), run)
    config = tmp_path / "faces.toml"
    config.write_text(
        f'folder = "{people}"\ngallery = "{people}/gallery.txt"\nprobes = "{people}/probes.txt"\n'
        f'networks = ["{people}/face.toml"]\n'
    )
    done = CliRunner().invoke(app, ["faces", str(run), str(config), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "identified" in done.output
    monkeypatch.setattr(module, "find_faces", lambda x: [(0, 0, 64, 64)])
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.open(people / "person0/0.png").save(photos / "me.png")
    network = ["--network", str(people / "face.toml")]
    words = ["protect", str(photos), "--out", str(tmp_path / "safe"), "--planted", str(run), *network]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "1 of 1 photos protected" in done.output
