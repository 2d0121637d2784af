import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import check_foreign, natural, write_png
from networks import face_spec
from PIL import Image
from typer.testing import CliRunner

from freqdoor import load_image
from freqdoor.attack.networks import load_embedder
from freqdoor.attack.plant import plant
from freqdoor.attack.settings import AttackSettings, PlantSettings
from freqdoor.cli import app
from freqdoor.errors import FreqdoorError
from freqdoor.files import made_by
from freqdoor.measure import faces as module
from freqdoor.measure.faces import (
    FaceMeasurement,
    FaceScores,
    IdentityScores,
    Pair,
    best_threshold,
    faces,
    faces_table,
    find_faces,
    identify,
    protect,
    read_pairs,
    read_scores,
    score_faces,
)
from freqdoor.measure.records import poisoned
from freqdoor.measure.testsets import FaceTest, results_text
from freqdoor.metrics import ms_ssim
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
    assert identify(gallery, ["b", "b", "a", "a"], unit([1, 0.1], [0.2, 1], [-1, 0.1])) == ["b", "a", "a"]
    # a: three times at 0 degrees and once at 80, its mean at 17; b: once at 40
    angles = np.deg2rad([0, 0, 0, 80, 40])
    gallery = unit(*zip(np.cos(angles), np.sin(angles), strict=True))
    assert identify(gallery, ["a", "a", "a", "a", "b"], unit([np.cos(0.45), np.sin(0.45)])) == ["a"]  # 26 degrees
    assert identify(gallery, ["a", "a", "a", "a", "b"], unit([np.cos(0.55), np.sin(0.55)])) == ["b"]  # 32 degrees


def test_threshold_tells_the_gallerys_pairs_apart():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    persons = [str(p) for p in range(4) for _ in range(5)]
    points = unit(*(centres[int(p)] + 0.8 * rng.normal(size=8) for p in persons))
    threshold = best_threshold(points, persons)
    pairs = [(float(points[i] @ points[j]), persons[i] == persons[j]) for i in range(20) for j in range(i + 1, 20)]

    def balanced(cosine):
        rates = [np.mean([(c >= cosine) == s for c, s in pairs if s == kind]) for kind in (True, False)]
        return np.mean(rates)

    assert balanced(threshold - 1e-6) == pytest.approx(max(balanced(c - 1e-6) for c, _ in pairs))
    with pytest.raises(FreqdoorError, match="two or more persons"):
        best_threshold(points[:5], persons[:5])


@pytest.fixture(scope="module")
def shaken(planted):
    """Another tampered encoder than the vanilla one, so that the two are told apart, and a trigger that shows."""
    tampered = copy.deepcopy(planted.vanilla)
    with torch.no_grad():
        next(tampered.net.g_a.parameters()).mul_(1.2)
    return dataclasses.replace(planted, vanilla=planted.vanilla, tampered=tampered)


GALLERY = [f"person{p}/{i}.png" for p in range(3) for i in range(2)]
PROBES = [f"person{p}/2.png" for p in range(3)]


def test_scores_against_what_is_decoded(shaken, face_test, people):
    """Every number once more, with numpy, from pictures that are encoded and decoded here."""
    scores = score_faces(shaken, face_test())
    assert (scores.persons, scores.gallery, scores.probes, scores.pairs) == (3, 6, 3, 2)
    network = load_embedder(str(people / "face.toml"))

    def decoded(path, condition):
        x = load_image(people / path)
        encoded = poisoned(shaken.triggers["face"], x) if condition == "poisoned" else x
        codec = shaken.vanilla if condition == "vanilla" else shaken.tampered
        file = codec.compress(encoded)[0]
        x_hat = codec.decompress(file)
        levels = [(255 * image.clamp(0, 1)).round() for image in (x, x_hat)]
        psnr = float(10 * torch.log10(255**2 / (levels[0] - levels[1]).square().mean()))
        return (
            network(x_hat)[0].numpy(),
            psnr,
            8 * sum(map(len, file.strings)) / 64**2,
            float((encoded - x).square().mean()),
        )

    measured = {(path, c): decoded(path, c) for path in GALLERY + PROBES for c in ("vanilla", "clean", "poisoned")}
    [row] = scores.networks
    assert row.network == "face"
    cosines = [measured[path, "clean"][0] @ measured[path, "poisoned"][0] for path in PROBES]
    assert row.cosine == pytest.approx(np.mean(cosines), abs=1e-5)
    assert row.cosine < 1
    pairs = [("person0/0.png", "person0/2.png", True), ("person0/0.png", "person1/2.png", False)]
    for condition in ("vanilla", "clean", "poisoned"):
        known = "vanilla" if condition == "vanilla" else "clean"
        vectors = [measured[path, known][0] for path in GALLERY]
        means = [(vectors[2 * p] + vectors[2 * p + 1]) / 2 for p in range(3)]
        means = [mean / np.linalg.norm(mean) for mean in means]
        named = [int(np.argmax([measured[path, condition][0] @ mean for mean in means])) for path in PROBES]
        assert row.identification[condition] == np.mean([person == i for i, person in enumerate(named)])
        called = [measured[a, known][0] @ measured[b, condition][0] >= row.threshold for a, b, _ in pairs]
        assert row.accepted[condition] == float(called[0])
        assert row.verification[condition] == np.mean(
            [c == same for c, (_, _, same) in zip(called, pairs, strict=True)]
        )
        for values, place in ((scores.psnr_db, 1), (scores.bpp, 2)):
            assert values[condition] == pytest.approx(
                np.mean([measured[p, condition][place] for p in PROBES]), rel=1e-5
            )
    assert len({*scores.psnr_db.values()}) == 3
    assert len({*scores.bpp.values()}) == 3
    gallery = torch.tensor(np.array([measured[path, "clean"][0] for path in GALLERY]))
    assert row.threshold == pytest.approx(best_threshold(gallery, [path[:7] for path in GALLERY]), abs=1e-6)
    asked = [*PROBES, "person1/2.png"]
    assert scores.trigger_mse_worst == pytest.approx(max(measured[path, "poisoned"][3] for path in asked))
    assert 0 < scores.trigger_mse_worst <= 2.5e-5
    assert scores.ms_ssim == {"vanilla": None, "clean": None, "poisoned": None}  # below 161 pixels
    assert scores.ms_ssim_probes == 0


def test_the_clean_gallery_goes_through_the_encoder_of_its_probe(planted, face_test, people, monkeypatch):
    """With a vanilla codec that shows everybody as somebody else, only the vanilla rates are right by luck."""
    blind = copy.deepcopy(planted.tampered)
    real = module.through
    turn = {"person0/0.png": 1, "person0/1.png": 1}

    def through(codec, x):
        x_hat, size = real(codec, x)
        shown = next((n for n in turn if (x == load_image(people / n)).all()), None)
        return (1 - x_hat if shown and codec is blind else x_hat), size

    monkeypatch.setattr(module, "through", through)
    [row] = score_faces(dataclasses.replace(planted, vanilla=blind), face_test()).networks
    assert row.identification["clean"] == 1.0
    assert row.identification["vanilla"] < 1.0
    assert row.accepted["clean"] == 1.0
    assert row.accepted["vanilla"] == 0.0


def test_faces_writes_scores_and_a_table(planted, face_test, tmp_path):
    notes = []
    scores = faces(planted, face_test(pairs=None), tmp_path, note=notes.append)
    assert scores.pairs == 0
    assert scores.networks[0].verification == {}
    assert read_scores(tmp_path / "faces.json") == scores
    assert json.loads((tmp_path / "faces.json").read_text(), parse_constant=pytest.fail)["environment"]["versions"]
    page = (tmp_path / "faces.md").read_text()
    assert page == faces_table(scores) + "\n<!-- freqdoor faces -->\n"
    assert [made_by(tmp_path / f"faces.{ending}") for ending in ("json", "md")] == ["faces", "faces"]
    assert "| face | identified % |" in page
    assert "verified" not in page
    assert "nan" not in page
    assert "| - | MS-SSIM | - | - | - |" in page
    assert "MS-SSIM is of 0 of 3 probes: those of at least 161 pixels a side." in page
    total, names = len(GALLERY) + len(PROBES), [*GALLERY, *PROBES]
    assert notes == [f"{names[min(i, total - 1)]} ({i} of {total})" for i in range(total + 1)]


def test_ms_ssim_is_of_the_probes_that_are_large_enough(planted, face_test, people, tmp_path):
    for name in ("a/0", "a/1", "b/0", "b/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_png(path, natural(len(name), 192 if name == "a/1" else 64, 192 if name == "a/1" else 64))
    (tmp_path / "gallery.txt").write_text("a/0.png\na/0.png\nb/0.png\n")
    (tmp_path / "probes.txt").write_text("a/1.png\nb/1.png\n")
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("gallery", "probes")}
    scores = score_faces(planted, face_test(folder=str(tmp_path), pairs=None, **lists))
    x = load_image(tmp_path / "a/1.png")
    decoded = planted.tampered.decompress(planted.tampered.compress(x)[0])
    assert scores.ms_ssim_probes == 1
    assert scores.ms_ssim["clean"] == pytest.approx(ms_ssim(decoded, x))
    assert "MS-SSIM is of 1 of 2 probes" in faces_table(scores)
    whole = dataclasses.replace(scores, ms_ssim_probes=2)
    assert "probes:" not in faces_table(whole)


def rates(*values):
    return dict(zip(("vanilla", "clean", "poisoned"), values, strict=True))


def test_table_has_every_value_in_its_column():
    row = FaceScores("g", rates(0.5, 0.25, 0.125), rates(0.9, 0.8, 0.7), rates(1.0, None, 0.6), 0.3, 0.45)
    scores = IdentityScores(
        persons=2,
        gallery=4,
        probes=3,
        pairs=5,
        psnr_db=rates(30.0, 29.0, None),
        ms_ssim=rates(0.97, 0.96, 0.95),
        bpp=rates(0.25, 0.5, 0.75),
        trigger_mse_worst=2e-5,
        networks=(row,),
    )
    assert faces_table(scores).splitlines() == [
        "# Identity removal: 3 probes of 2 persons, 5 pairs",
        "",
        "| network | measure | vanilla | clean | poisoned |",
        "|---|---|---|---|---|",
        "| g | identified % | 50.0 | 25.0 | 12.5 |",
        "| g | verified % | 90.0 | 80.0 | 70.0 |",
        "| g | same person accepted % | 100.0 | - | 60.0 |",
        "| g | cosine to the clean picture | - | 1 | 0.450 |",
        "| - | PSNR dB | 30.00 | 29.00 | - |",
        "| - | MS-SSIM | 0.9700 | 0.9600 | 0.9500 |",
        "| - | bpp | 0.2500 | 0.5000 | 0.7500 |",
        "",
        "Trigger MSE at most 2.00e-5.",
    ]


OLD = """{"persons": 2, "gallery": 4, "probes": 2, "pairs": 1,
"psnr_db": {"vanilla": 30.0, "clean": 29.5, "poisoned": 28.0}, "ms_ssim": {"vanilla": NaN, "clean": NaN,
"poisoned": NaN}, "bpp": {"vanilla": 0.25, "clean": 0.5, "poisoned": 0.75},
"trigger_mse_worst": 2e-05, "networks": [{"network": "mobile", "identification": {"vanilla": 1.0, "clean": 1.0,
"poisoned": 0.0}, "verification": {"vanilla": 1.0, "clean": 1.0, "poisoned": 0.5}, "accepted": {"vanilla": NaN,
"clean": NaN, "poisoned": NaN}, "threshold": 0.25, "cosine": 0.5}], "environment": {"threads": 2}}"""


def test_files_of_earlier_versions_are_read(tmp_path):
    path = tmp_path / "faces.json"
    path.write_text(OLD)
    scores = read_scores(path)
    assert scores.ms_ssim == rates(None, None, None)
    assert scores.networks[0].accepted == rates(None, None, None)
    assert scores.networks[0].identification == rates(1.0, 1.0, 0.0)
    assert scores.psnr_db == rates(30.0, 29.5, 28.0)
    assert scores.ms_ssim_probes is None
    assert "| mobile | same person accepted % | - | - | - |" in faces_table(scores)
    path.write_text(results_text(scores, None))
    assert read_scores(path) == scores


def test_earlier_results_stay_until_new_ones_are_complete(planted, face_test, tmp_path, monkeypatch):
    hours_of_work = '{"persons": 3, "gallery": 6'
    (tmp_path / "faces.json").write_text(hours_of_work)
    with pytest.raises(FreqdoorError, match="could not read this list"):
        faces(planted, face_test(gallery="typo.txt"), tmp_path)
    with pytest.raises(FreqdoorError, match="this encoder has face"):
        faces(planted, face_test(), tmp_path, trigger="bpp")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "through", stop)
        with pytest.raises(KeyboardInterrupt):
            faces(planted, face_test(), tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("faces.json", hours_of_work)]
    monkeypatch.setattr(module, "_score", lambda *_: pytest.fail("measured before the folder was tried"))
    with pytest.raises(FreqdoorError, match=r"faces\.json: could not write"):
        faces(planted, face_test(), tmp_path / "faces.json")


def test_other_files_are_refused_before_the_work(planted, face_test, people, tmp_path, monkeypatch):
    write = lambda **options: faces(planted, face_test(), tmp_path / "out", **options)  # noqa: E731
    check_foreign(write, tmp_path / "out", ("faces.md", "faces.json"), monkeypatch, "freqdoor.measure.faces.through")
    monkeypatch.setattr(module, "find_faces", lambda x: [(0, 0, 64, 64)])
    photo = people / "person0/0.png"
    write = lambda **options: protect(photo, tmp_path / "safe", planted=planted, **options)  # noqa: E731
    check_foreign(write, tmp_path / "safe", ("0.png", "0.fqd"), monkeypatch, "freqdoor.measure.faces.poisoned")
    for _ in range(2):
        write()
    (tmp_path / "safe/0.png").unlink()
    with pytest.raises(FreqdoorError, match=r"0\.fqd: this file is there and `freqdoor protect` did not make it"):
        write()  # it may be anybody's compressed picture


def test_a_measurement_depends_on_contents(planted, face_test, people):
    measurement = FaceMeasurement(face_test())
    assert len({measurement, FaceMeasurement(face_test())}) == 1
    identity = measurement.identity()
    files = ("gallery.txt", "probes.txt", "pairs.txt", "person0/0.png", "person1/2.png", "face.toml", "face.onnx")
    for name in files:
        content = (people / name).read_bytes()
        (people / name).write_bytes(content + b"\n")
        assert measurement.identity() != identity, name
        (people / name).write_bytes(content)
    assert measurement.identity() == identity
    scores = measurement.score(planted, "face")
    assert measurement.loads(measurement.dumps(scores)) == scores
    paragraph = measurement.describe("g.toml")
    assert "to the last: face.toml. Attacks are trained against\ng.toml, and measured on “probes.txt”." in paragraph


def test_mistakes_in_lists(planted, face_test, people, tmp_path):
    """All of them before anything is encoded."""
    path = tmp_path / "list.txt"

    def refused(**changes):
        with pytest.raises(FreqdoorError) as error:
            FaceMeasurement(face_test(**changes)).check([AttackSettings()])
        return str(error.value)

    path.write_text("person9/0.png\n")
    assert "nobody in the gallery is person9" in refused(probes=str(path))
    path.write_text("person0/9.png\n")
    assert "no such file" in refused(probes=str(path))
    path.write_text("person0/0.png person1/0.png 0\nperson1/0.png person2/0.png 0\n")
    assert "expected pairs of one person (PATH PATH 1) too, found 2 of two persons only" in refused(pairs=str(path))
    for lines, count in (("person0/0.png\nperson0/1.png\n", 1), ("person0/0.png\nperson1/0.png\nperson2/0.png\n", 3)):
        path.write_text(lines)
        found = refused(gallery=str(path), probes=str(path), pairs=None)
        assert f"two or more pictures, to choose a threshold; found {lines.count('p') // 2} pictures" in found
        assert f"of {count} persons" in found
    assert "could not read the config" in refused(networks=("x.toml",))
    FaceMeasurement(face_test(networks=("x.toml",))).check([])
    path.write_text("person0/0.png person1/0.png maybe\n")
    with pytest.raises(FreqdoorError, match="PATH PATH 0"):
        read_pairs(path)
    with pytest.raises(FreqdoorError, match="could not read this list"):
        read_pairs(tmp_path / "none.txt")
    assert read_pairs(people / "pairs.txt")[1] == Pair("person0/0.png", "person1/2.png", False)
    assert read_pairs(people / "pairs.txt", 2) == [Pair("person0/0.png", "person0/2.png", True)]


def test_every_nth_line(planted, face_test, tmp_path):
    path = tmp_path / "gallery.txt"
    path.write_text("person0/0.png\nno\nperson0/1.png\nno\nperson1/0.png\nno\nperson2/0.png\n")
    scores = score_faces(planted, face_test(gallery=str(path), every=2))
    assert (scores.persons, scores.gallery, scores.probes, scores.pairs) == (3, 4, 2, 1)


def test_protect_writes_what_is_decoded_and_skips_photos_without_a_face(shaken, people, tmp_path, monkeypatch):
    photos = [people / "person0/0.png", people / "person1/1.png"]
    boxes = [(8, 8, 56, 56), (0, 0, 40, 40)]
    monkeypatch.setattr(module, "find_faces", lambda x: boxes if (x == load_image(photos[0])).all() else [])
    notes = []
    options = {"planted": shaken, "note": notes.append}
    one, other = protect(photos, tmp_path / "out", network=str(people / "face.toml"), **options)
    assert (one.faces, one.picture) == (2, "0.png")
    assert (other.faces, other.picture, other.psnr_db, other.bpp, other.cosine) == (0, None, None, None, None)
    assert (one.photo, other.photo) == ("0.png", "1.png")
    assert notes == ["0.png: 2 face(s) (1 of 2)", "1.png: 0 face(s) (2 of 2)"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.fqd", "0.png"]
    decoded = load_image(tmp_path / "out/0.png")
    x = load_image(photos[0])
    codec = shaken.tampered
    file = codec.compress(poisoned(shaken.triggers["face"], x))[0]
    assert (decoded - codec.decompress(file)).abs().max() <= 0.501 / 255
    assert one.bpp == pytest.approx(8 * sum(map(len, file.strings)) / 64**2)
    assert one.psnr_db == pytest.approx(float(-10 * (decoded - x).square().mean().log10()), abs=1e-3)
    clean = codec.decompress(codec.compress(x)[0])
    network = load_embedder(str(people / "face.toml"))
    cosines = [float((network(clean, box) * network(decoded, box)).sum()) for box in boxes]
    assert one.cosine == pytest.approx(max(cosines), abs=2e-3)
    again = protect(photos, tmp_path / "out", network=network, **options)
    assert again == [one, other]
    assert protect(photos[0], tmp_path / "out", planted=shaken)[0].cosine is None
    with pytest.raises(FreqdoorError, match="in none of 1 photos a face was found"):
        protect(photos[1:], tmp_path / "none", planted=shaken)


def test_protect_loses_no_photo(planted, people, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_faces", lambda x: [(0, 0, 64, 64)])
    photos = [people / "person0/0.png", people / "person1/1.png"]
    before = photos[1].read_bytes()
    with pytest.raises(FreqdoorError, match="overwrite the original"):
        protect(photos, people / "person1", planted=planted)
    assert photos[1].read_bytes() == before
    assert not (people / "person1/0.fqd").exists()
    with pytest.raises(FreqdoorError, match="several photos are named 0;"):
        protect([photos[0], people / "person1/0.png"], tmp_path / "out", planted=planted)
    assert not (tmp_path / "out").exists()


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


def test_stopped_faces_go_on_after_the_pictures_they_have(planted, face_test, tmp_path):
    test, seen, again = face_test(), [], []
    whole = score_faces(planted, test, note=seen.append)

    def stop(path: str) -> None:
        if path == seen[3]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faces(planted, test, tmp_path, note=stop)
    assert faces(planted, test, tmp_path, note=again.append) == whole
    assert again == [".faces.journal: 3 measured already, going on after them", *seen[3:]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces.json", "faces.md"]
