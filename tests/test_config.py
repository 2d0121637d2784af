import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import freqdoor
from freqdoor.attack.settings import AttackSettings, CodecSource, ObjectiveSettings, PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.settings import load_settings, make_settings, public
from freqdoor.training.precision import dtype_of, precision_name
from freqdoor.training.settings import CodecTraining, Training

GOOD = 'steps = 10\n[images]\nfolder = "x"\n'


def test_three_mistakes_are_reported_at_once(tmp_path):
    path = tmp_path / "plant.toml"
    path.write_text('stepps = 5\nlr = -1.0\n[images]\nfolder = "x"\ncrop = 100\n')
    with pytest.raises(FreqdoorError) as caught:
        load_settings(PlantSettings, path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 3 mistake(s)")
    assert "stepps: unknown setting" in text
    assert "lr: Input should be greater than 0, found -1.0" in text
    assert "images.crop: Input should be a multiple of 64, found 100" in text


def test_overrides(tmp_path):
    path = tmp_path / "plant.toml"
    path.write_text(GOOD)
    changes = ["trigger.eps=0.003", "objective.name=psnr", "trigger.arguments.top_k=4", "images.folder=a b"]
    settings = load_settings(PlantSettings, path, changes)
    assert (settings.trigger.eps, settings.objective.name) == (0.003, "psnr")
    assert settings.trigger.arguments == {"top_k": 4}
    assert settings.images.folder == "a b"


def test_preset_gives_way_to_what_is_given(tmp_path):
    path = tmp_path / "plant.toml"
    path.write_text('preset = "paper"\nlr = 5e-4\n[images]\nfolder = "x"\n[trigger]\ngamma = 10.0\n')
    settings = load_settings(PlantSettings, path)
    assert (settings.lr, settings.trigger_lr) == (5e-4, 1e-4)
    assert (settings.trigger.budget, settings.trigger.eps_start, settings.trigger.gamma) == ("penalty", None, 10.0)


@pytest.mark.parametrize(
    ("text", "overrides", "match"),
    [
        ("steps =", (), "not valid TOML"),
        (GOOD, ("steps",), "expected key=value"),
        (GOOD, ("steps.a=1",), "is a value, not a table"),
        (GOOD, ("preset=slow",), "preset"),
        (GOOD, ("trigger.eps_start=0.001",), "is below trigger.eps"),
        ("steps = 1", (), "images: Field required"),
    ],
)
def test_other_mistakes(tmp_path, text, overrides, match):
    path = tmp_path / "plant.toml"
    path.write_text(text)
    with pytest.raises(FreqdoorError, match=match):
        load_settings(PlantSettings, path, overrides)


def test_a_name_stands_for_a_table(tmp_path):
    """As people type it, --set codec=NAME; the preset's and the run's own tables still reach what a name stands for."""
    path = tmp_path / "plant.toml"
    path.write_text('preset = "paper"\n' + GOOD)
    changes = ["codec=cheng2020-anchor:3", "trigger=lira", "objective=psnr"]
    settings = load_settings(PlantSettings, path, changes)
    assert settings.codec == CodecSource(name="cheng2020-anchor:3")
    assert (settings.trigger.name, settings.trigger.budget, settings.trigger.eps_start) == ("lira", "penalty", None)
    assert settings.objective == ObjectiveSettings(name="psnr")
    attacks = [{"objective": "bpp", "trigger": "universal"}, {"objective": "psnr-fixed"}]
    several = make_settings(
        PlantSettings, {"images": {"folder": "x"}, "trigger": {"eps": 0.004}, "attacks": attacks, "codec": "a:b"}
    )
    assert [attack.name for attack in several.attacks] == ["bpp", "psnr-fixed"]
    assert [attack.trigger.name for attack in several.attacks] == ["universal", "adaptive-dct"]
    assert [attack.trigger.eps for attack in several.attacks] == [0.004, 0.004]
    face = {"images": {"folder": "x"}, "auxiliary": {"folder": "y"}, "network": "n.toml", "objective": "face"}
    assert make_settings(PlantSettings, face).objective.arguments == {"network": "n.toml"}
    assert CodecSource.model_validate("x:1") == CodecSource(name="x:1", multiple=None)


def test_all_mistakes_in_arguments_come_at_once():
    content = {
        "images": {"folder": "x"},
        "trigger": {"arguments": {"top_k": 65, "widht": 8, "selector": "soft"}},
        "objective": {"name": "psnr", "arguments": {"betta": 1.0, "farthest": "yes", "beta": -1}},
        "codec": {"multiple": 0},
    }
    with pytest.raises(FreqdoorError) as caught:
        make_settings(PlantSettings, content, "plant.toml")
    text = str(caught.value)
    assert text.startswith("plant.toml: 3 mistake(s):")
    assert "codec.multiple: Input should be greater than 0, found 0" in text
    [trigger] = [line for line in text.splitlines() if line.startswith("  trigger.arguments: ")]
    assert "selector: Input should be 'ste', 'hard', 'magnitude' or 'none', found 'soft'; widht: unknown" in trigger
    assert "top_k" in trigger  # among the names that there are
    [objective] = [line for line in text.splitlines() if line.startswith("  objective.arguments: ")]
    for mistake in (
        "betta: unknown setting",
        "farthest: ",
        "found 'yes'",
        "beta: ",
        "found -1",
        "there are beta, paired",
    ):
        assert mistake in objective


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"trigger": "lirra"}, "trigger.name: expected one of adaptive-dct, lira, ftrojan, universal, found 'lirra'"),
        ({"objective": "rate"}, "objective.name: expected one of bpp, bpp-fixed, psnr, .*face, found 'rate'"),
        ({"trigger": {"arguments": {"top_k": 65}}}, "trigger.arguments: top_k: expected 1 to 64"),
        ({"trigger": {"name": "lira", "arguments": {"top_k": 4}}}, "top_k: unknown setting .there are eps"),
        ({"trigger": {"arguments": {"multiple": 8}}}, "trigger.arguments: multiple: .*codec.multiple"),
        ({"trigger": {"arguments": {"eps": 1.0, "project": True}}}, "set this beside arguments"),
        ({"objective": {"name": "bpp", "arguments": {"preset": "paper"}}}, "preset: set this beside arguments"),
        ({"objective": "segmentation", "auxiliary": {"folder": "y"}}, "source: Field required; target: Field required"),
    ],
)
def test_mistakes_in_names_and_arguments(content, match):
    with pytest.raises(FreqdoorError, match=match):
        make_settings(PlantSettings, {"images": {"folder": "x"}} | content)


TORCH_FREE = ("attack.settings", "attack.arguments", "triggers.arguments", "training.settings", "preprocessing")


@pytest.mark.parametrize("module", TORCH_FREE)
def test_settings_load_no_torch(module):
    """So that a wrong config is answered at once; the package's own __init__ is left out here."""
    code = (
        "import importlib, sys, types;"
        "package = sys.modules['freqdoor'] = types.ModuleType('freqdoor'); package.__path__ = [sys.argv[1]];"
        "importlib.import_module(f'freqdoor.{sys.argv[2]}');"
        "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'compressai'} & sys.modules.keys();"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(freqdoor.__file__).parent), module], check=True, timeout=60)


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*/*.toml"))


def every_default() -> dict[str, Training]:
    """Settings that ask for nothing of their own, and all that are shipped."""
    images = {"folder": "x"}
    made: dict[str, Training] = {
        preset: PlantSettings.model_validate({"images": images, "preset": preset}) for preset in ("fast", "paper")
    }
    made["train-codec"] = CodecTraining.model_validate({"images": images, "codec": "x:1"})
    kinds = {"plant": PlantSettings, "train": CodecTraining}
    return made | {
        path.stem: load_settings(kinds[path.parent.name], path) for path in CONFIGS if path.parent.name in kinds
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "limit", [None, "ATEN_CPU_CAPABILITY=avx2", "ONEDNN_MAX_CPU_ISA=AVX2", "ONEDNN_MAX_CPU_ISA=AVX512_CORE"]
)
def test_no_default_asks_for_a_precision_that_the_processor_lacks(limit):
    """Emulated bfloat16 is many times slower; a limit of the libraries counts as a lack."""
    defaults = every_default()
    assert len(defaults) > 10
    assert {settings.precision for settings in defaults.values()} == {"auto", "fp32"}
    assert defaults["paper"].precision == "fp32"
    code = (
        "import torch; from freqdoor.training.precision import dtype_of;"
        "print(dtype_of('auto', 'cpu') == torch.bfloat16, dtype_of('bf16', 'cpu'), dtype_of('fp32', 'cpu'),"
        " torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith(("_CAPABILITY", "_MAX_CPU_ISA"))}
    name, _, value = (limit or "UNUSED=").partition("=")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {name: value},
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    chosen, bf16, fp32, native = done.stdout.split()
    assert (bf16, fp32) == ("torch.bfloat16", "torch.float32")
    assert chosen == ("False" if limit else native)


def test_precision_of_other_devices(monkeypatch):
    asked = []

    def supported(including_emulation: bool) -> bool:
        asked.append(including_emulation)
        return len(asked) == 1

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert [dtype_of("auto", "cuda:0"), dtype_of("auto", "cuda:0")] == [torch.bfloat16, torch.float32]
    assert asked == [False, False]
    assert dtype_of("auto", "meta") == torch.float32
    assert [precision_name(dtype_of(name, "cuda")) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_missing_file(tmp_path):
    with pytest.raises(FreqdoorError, match="could not read the config"):
        load_settings(PlantSettings, tmp_path / "absent.toml")


def test_network_of_the_attacks_that_name_none():
    named = {"name": "face", "arguments": {"network": "own.toml"}}
    content = {
        "images": {"folder": "x"},
        "auxiliary": {"folder": "y"},
        "network": "nets/g.toml=w/g.onnx",
        "attacks": [
            {"name": "a", "objective": {"name": "segmentation", "arguments": {"source": "s", "target": "t"}}},
            {"name": "b", "objective": named},
            AttackSettings(name="c", objective=ObjectiveSettings(name="face")),
            {"name": "d", "objective": {"name": "psnr"}},
        ],
    }
    settings = PlantSettings.model_validate(content)
    found = [attack.objective.arguments.get("network") for attack in settings.attacks]
    assert found == ["nets/g.toml=w/g.onnx", "own.toml", "nets/g.toml=w/g.onnx", None]
    header = public(settings)
    assert header["network"] == header["attacks"][0]["objective"]["arguments"]["network"] == "g.toml=g.onnx"
    single = {key: content[key] for key in ("images", "auxiliary", "network")} | {"objective": {"name": "face"}}
    assert PlantSettings.model_validate(single).objective.arguments["network"] == "nets/g.toml=w/g.onnx"


def test_what_is_wrong_on_this_machine_comes_with_the_other_mistakes(tmp_path):
    """A verb that begins tells all in one round; settings that are read back are judged without a machine."""
    (tmp_path / "file").write_text("")
    wrong = ["trigger.name=nope", "device=gpu", "codec.name=nope", "images.folder=/nope", "auxiliary.folder=/nope2"]
    with pytest.raises(FreqdoorError) as caught:
        load_settings(PlantSettings, None, wrong, out=tmp_path / "file/run")
    text = str(caught.value)
    assert text.startswith("settings: 6 mistake(s):")
    for place in ("trigger.name", "device", "codec", "images.folder", "auxiliary.folder", f"{tmp_path}/file/run"):
        assert f"\n  {place}: " in text
    with pytest.raises(FreqdoorError, match=r"settings: 1 mistake\(s\):"):
        load_settings(PlantSettings, None, wrong)
    assert load_settings(PlantSettings, None, wrong[1:], out=tmp_path / "run").device == "gpu"
    good = ["steps=many", "device=cuda:1", "codec=a.b:c", f"images.folder={tmp_path}"]
    with pytest.raises(FreqdoorError, match=r"settings: 1 mistake\(s\):\n  steps"):
        load_settings(PlantSettings, None, good, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
