import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import natural, write_png

import freqdoor.cli as cli
from freqdoor.attack.plant import plant
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.loading import save_codec
from freqdoor.settings import make_settings

pytestmark = pytest.mark.whole

LITE = ("--codec", "factories:lite")


@pytest.fixture(scope="module")
def run_folder(images, tmp_path_factory) -> Path:
    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 2,
    }
    folder = tmp_path_factory.mktemp("planted")
    plant(make_settings(PlantSettings, content), folder)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command line in this process; (exit code, everything it printed)."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["freqdoor", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out + err

    return call


def is_one_sentence(code: int, text: str) -> bool:
    return code != 0 and "Traceback" not in text and text.count("freqdoor: ") == 1


def test_plant_evaluate_poison_report_compress(command, images, tmp_path):
    config = tmp_path / "plant.toml"
    config.write_text(
        f'lmbda = 0.0067\nsteps = 9\n[codec]\nname = "factories:lite"\n[images]\nfolder = "{images}"\ncrop = 64\n'
    )
    run, out = tmp_path / "run", tmp_path / "out"
    assert command("plant", config, "--out", run, "--set", "steps=2", "--set", "images.batch_size=2")[0] == 0
    assert json.loads((run / "config.json").read_text())["steps"] == 2
    code, text = command("evaluate", run, *LITE, "--images", images, "--out", out, "--strength", "3")
    assert code == 0
    assert "On 4 images" in text
    assert command("report", out)[0] == 0
    code, text = command("poison", run, *LITE, images, "--out", tmp_path / "poisoned")
    assert (code, len(list((tmp_path / "poisoned").iterdir()))) == (0, 4)
    source = tmp_path / "poisoned/0.png"
    for extra in ((), ("--planted", run)):
        assert command("compress", source, tmp_path / "a.fqd", "--codec", "factories:lite", *extra)[0] == 0
        assert command("decompress", tmp_path / "a.fqd", tmp_path / "a.png", "--codec", "factories:lite")[0] == 0


def test_train_codec(command, images, tmp_path):
    changes = ["codec=lite-hyperprior:3", f"images.folder={images}", "images.crop=64", "images.batch_size=1", "steps=1"]
    code, _ = command("train-codec", "--out", tmp_path, *[a for c in changes for a in ("--set", c)])
    assert code == 0
    assert (tmp_path / "codec.safetensors").exists()


@pytest.mark.parametrize("kind", ["grey", "palette", "16-bit", "CMYK", "alpha", "truncated", "no image", "huge"])
def test_bad_images_end_in_one_sentence(command, odd_images, tmp_path, run_folder, kind):
    out = tmp_path / "x.fqd"
    code, text = command("compress", odd_images[kind], out, "--codec", "factories:lite")
    assert is_one_sentence(code, text)
    assert odd_images[kind].name in text.replace("\n", "")
    assert not out.exists()
    code, text = command("poison", run_folder, *LITE, odd_images[kind], "--out", tmp_path / "poisoned")
    assert is_one_sentence(code, text)
    assert not (tmp_path / "poisoned").exists()


def test_one_pixel_image_works(command, tmp_path, run_folder):
    source = write_png(tmp_path / "x.png", natural(0, 1, 1))
    assert command("poison", run_folder, *LITE, source, "--out", tmp_path / "p")[0] == 0
    assert command("evaluate", run_folder, *LITE, "--images", source, "--out", tmp_path / "e")[0] == 0


def test_very_wide_image_works(command, tmp_path, run_folder):
    source = write_png(tmp_path / "x.png", natural(0, 8, 20_000))
    assert command("poison", run_folder, *LITE, source, "--out", tmp_path / "p")[0] == 0
    assert command("compress", source, tmp_path / "x.fqd", *LITE)[0] == 0


def test_originals_are_not_overwritten(command, tmp_path, run_folder):
    source = write_png(tmp_path / "x.png", natural(0, 64, 64))
    before = source.read_bytes()
    assert is_one_sentence(*command("poison", run_folder, *LITE, source, "--out", tmp_path))
    assert is_one_sentence(*command("compress", source, source, *LITE))
    assert source.read_bytes() == before


@pytest.mark.parametrize("strength", ["nan", "0", "-1", "inf"])
def test_strength_must_be_a_factor(command, tmp_path, run_folder, images, strength):
    assert is_one_sentence(
        *command("poison", run_folder, *LITE, images, "--out", tmp_path / "p", "--strength", strength)
    )


@pytest.mark.parametrize(
    "change",
    ["preset=[1]", "trigger.arguments.eps=1", "objective.arguments.name=1", "trigger.arguments.width=0", "device=gpu"],
)
def test_odd_settings(command, tmp_path, images, change):
    changes = [f"images.folder={images}", "images.crop=64", change]
    code, text = command("plant", "--out", tmp_path / "run", *[a for c in changes for a in ("--set", c)])
    assert is_one_sentence(code, text)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_broken_file_among_good_ones(command, odd_images, images, tmp_path, run_folder):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_png(folder / "good.png", natural(0, 64, 64))
    (folder / "bad.png").write_bytes(odd_images["truncated"].read_bytes())
    code, text = command("poison", run_folder, *LITE, folder, "--out", tmp_path / "p")
    assert is_one_sentence(code, text)
    assert "1 of 2 images cannot be used" in text
    code, text = command("poison", run_folder, *LITE, folder, "--out", tmp_path / "p", "--skip-broken")
    assert (code, [p.name for p in (tmp_path / "p").iterdir()]) == (0, ["good.png"])
    assert "skipped" in text


def test_empty_folder_and_wrong_files(command, tmp_path, run_folder, codec):
    (tmp_path / "empty").mkdir()
    assert is_one_sentence(*command("poison", run_folder, *LITE, tmp_path / "empty", "--out", tmp_path / "p"))
    assert is_one_sentence(*command("poison", tmp_path / "absent", tmp_path, "--out", tmp_path / "p"))
    save_codec(codec, tmp_path / "codec.safetensors")
    code, text = command("poison", tmp_path / "codec.safetensors", tmp_path, "--out", tmp_path / "p")
    assert is_one_sentence(code, text)
    assert "expected a planted encoder" in text


def test_three_config_mistakes_at_once(command, tmp_path):
    (tmp_path / "c.toml").write_text('lr = "fast"\nbatch = 3\n[images]\ncrop = 64\n')
    code, text = command("plant", tmp_path / "c.toml", "--out", tmp_path / "run")
    assert is_one_sentence(code, text)
    assert all(part in text for part in ("3 mistake(s)", "lr: ", "batch: unknown setting", "images.folder: "))


@pytest.mark.parametrize("verb", ["plant", "poison", "evaluate", "compress"])
def test_unwritable_output(command, images, tmp_path, run_folder, verb):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    source = sorted(images.iterdir())[0]
    arguments = {
        "plant": ("--out", out, "--set", f"images.folder={images}", "--set", "images.crop=64"),
        "poison": (run_folder, *LITE, source, "--out", out),
        "evaluate": (run_folder, *LITE, "--images", source, "--out", out),
        "compress": (source, out / "x.fqd", "--codec", "factories:lite"),
    }[verb]
    assert is_one_sentence(*command(verb, *arguments))


@pytest.mark.slow  # tools/faults.py does it with more verbs
@pytest.mark.parametrize("verb", ["poison", "plant"])
def test_full_disk(images, tmp_path, run_folder, verb):
    """A file-size limit of 2000 bytes stands for a full disk: the same error reaches the same places."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "from freqdoor.cli import main; sys.argv = ['freqdoor', *sys.argv[1:]]; main()"
    )
    out = tmp_path / "out"
    changes = [
        f"images.folder={images}",
        "images.crop=64",
        "images.batch_size=1",
        "steps=1",
        "lmbda=0.01",
        "codec.name=factories:lite",
    ]
    arguments = {
        "poison": [str(run_folder), *LITE, str(images), "--out", str(out)],
        "plant": ["--out", str(out), *[a for c in changes for a in ("--set", c)]],
    }[verb]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, verb, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )
    assert is_one_sentence(done.returncode, done.stdout + done.stderr), done.stderr
    assert "could not write" in done.stderr
    assert not [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix in (".png", ".safetensors", ".pt")]


def test_help_lists_every_verb():
    done = subprocess.run([sys.executable, "-m", "freqdoor", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for verb in ("demo", "train-codec", "plant", "evaluate", "poison", "report", "compress", "decompress"):
        assert verb in done.stdout
