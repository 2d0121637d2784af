import pytest

from freqdoor.attack.settings import AttackSettings, ObjectiveSettings, PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.settings import load_settings, public

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
            {"name": "a", "objective": {"name": "segmentation", "arguments": {"source": "s"}}},
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
