"""Planted encoders as files: what they say of themselves, what a stranger may write, and what never travels."""

import json
import re
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel

from freqdoor import load_codec, load_planted, plant
from freqdoor.attack.planted import Header, Planted, opened, unplanted
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.architectures import parse_name
from freqdoor.codecs.loading import read_tensors, write_tensors
from freqdoor.errors import FreqdoorError
from freqdoor.measure.testsets import DownstreamTest
from freqdoor.samples import ASSETS
from freqdoor.settings import Settings, file_name, make_settings, public
from freqdoor.training.loop import check_device
from freqdoor.training.settings import CodecTraining
from freqdoor.triggers.build import build_trigger

OLD = Path(__file__).parent / "old"  # written by the version before headers had a schema


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    content = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 2},
        "lmbda": 0.0067,
        "steps": 1,
        "attacks": [{"name": "a"}, {"name": "b", "objective": {"name": "psnr", "arguments": {"beta": 0.25}}}],
        "trigger": {"arguments": {"width": 8}},
    }
    folder = tmp_path_factory.mktemp("run")
    return plant(make_settings(PlantSettings, content), folder), folder


def test_the_header_says_what_was_planted(run):
    planted, folder = run
    header = planted.header
    assert [(a.name, a.objective.name, a.trigger, a.preset) for a in header.attacks] == [
        ("a", "bpp", "adaptive-dct", "fast"),
        ("b", "psnr", "adaptive-dct", "fast"),
    ]
    assert planted.attack("b").objective.arguments == planted.objective("b").arguments == {"beta": 0.25}
    assert planted.attack("b").arguments == planted.triggers["b"].arguments
    assert (header.schema_version, header.tampered, header.scope) == (1, True, "g_a")
    assert header.modules_before == planted.vanilla.module_hashes()
    assert header.modules_after == planted.tampered.module_hashes()
    assert (header.planting.steps, header.planting.codec.name) == (1, "factories:lite")
    assert header.planting.model_dump()["seed"] == 0  # all settings are kept
    assert load_planted(folder, "factories:lite").header == header
    _, content = read_tensors(folder / "planted.safetensors")
    assert content.pop("kind") == "planted encoder"
    assert Header.model_validate(content) == header


def test_codec_and_trigger_by_their_names(run):
    planted, _ = run
    assert planted.codec("vanilla") is planted.vanilla
    assert planted.codec("tampered") is planted.tampered
    assert (planted.named(), planted.named("b")) == ("a", "b")
    for ask in (planted.named, planted.attack, planted.objective):
        with pytest.raises(FreqdoorError, match="trigger 'c': this encoder has a, b"):
            ask("c")
    with pytest.raises(FreqdoorError, match="role: expected 'vanilla' or 'tampered', found 'tamperd'"):
        planted.codec("tamperd")


def test_opened_takes_what_is_loaded_or_loads(run):
    planted, folder = run
    assert opened(planted) is planted
    vanilla = load_codec("factories:lite")
    for again in (opened(folder, "factories:lite"), opened(str(folder), vanilla)):
        assert isinstance(again, Planted)
        assert again.tampered.module_hashes() == planted.tampered.module_hashes()
    assert opened(folder, vanilla).vanilla is vanilla
    assert list(opened("planted-psnr").triggers) == ["psnr"]


def test_a_codec_that_nothing_was_planted_in():
    vanilla = load_codec("factories:lite")
    nothing = unplanted(vanilla)
    assert (nothing.vanilla, nothing.tampered, nothing.triggers) == (vanilla, vanilla, {})
    assert (nothing.header.tampered, nothing.header.attacks, nothing.header.planting.seconds) == (False, (), 0)
    with pytest.raises(FreqdoorError, match="trigger None: this encoder has none"):
        nothing.named()


@pytest.mark.parametrize("objective", ["psnr", "face"])  # bpp was planted since
def test_headers_of_the_version_before_schemas(objective):
    path = ASSETS / f"planted-{objective}.safetensors"
    _, content = read_tensors(path)
    assert "schema_version" not in content
    header = load_planted(path).header
    settings = json.loads(path.with_suffix(".json").read_text())
    assert header.planting.seconds == settings["seconds"]
    assert header.planting.model_dump()["lr"] == settings["settings"]["lr"]
    assert header.attacks[0].objective.arguments == settings["settings"]["objective"]["arguments"]
    assert header.schema_version == 1


def test_a_header_with_all_keys_of_the_version_before_schemas():
    content = json.loads((OLD / "header.json").read_text())
    header = Header.model_validate(content)
    assert header.planting.model_dump()["balance"] == content["planting"]["balance"]
    assert header.attacks[0].arguments == content["attacks"][0]["arguments"]
    assert header.modules_after == content["modules_after"]


DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "codec"}, "expected a planted encoder"),
        ({"schema_version": 2}, "schema_version"),
        ({"scope": None}, "unknown scope"),
        ({"scope": ["g_a"]}, "unknown scope"),
        ({"attacks": []}, "distinct names"),
        ({"attacks": {}}, "attacks"),
        ({"attacks": None}, "attacks"),
        ({"modules_before": ["a"]}, "modules_before"),
        ({"modules_after": {"g_a": 1}}, "modules_after.g_a"),
        ({"base": None}, "base"),
        ({"base": {"name": "a"}}, "base.architecture"),
        ({"planting": []}, "planting"),
        ({"planting": {"codec": {"name": "factories:lite"}, "steps": 1}}, "planting.seconds"),
        ({"planting": {"codec": [1], "steps": 1, "seconds": 1}}, "planting.codec"),
        ({"planting": {"codec": {"name": "factories:lite"}, "steps": 1, "seconds": float("nan")}}, "NaN is no number"),
        ({"planting": {"codec": {"name": "factories:lite"}, "steps": 10**400, "seconds": 1}}, "planting.steps"),
        ({"planting": {"codec": {"name": "factories:lite"}, "steps": -1, "seconds": 1}}, "planting.steps"),
    ],
)
def test_a_strangers_header(run, tmp_path, changes, match):
    tensors, content = read_tensors(run[1] / "planted.safetensors")
    write_tensors(tmp_path / "forged.safetensors", tensors, content | changes)
    with pytest.raises(FreqdoorError, match=match) as caught:
        load_planted(tmp_path / "forged.safetensors", "factories:lite")
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "forged.safetensors"))
    assert "\n" not in text
    assert len(text) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": {"name": "rate", "arguments": {}}},
        {"objective": None},
        {"trigger": "unknown"},
        {"trigger": ["adaptive-dct"]},
        {"arguments": {"eps": float("nan")}},
        {"arguments": {"width": 10**9}},
        {"arguments": {"band": DEEP}},
        {"arguments": {"unknown": 1}},
        {"arguments": [1]},
        {"arguments": {"width": 16}},  # not what the weights are of
        {"name": 3},
        {"name": "b"},  # twice
        {"name": "c"},  # a trigger without weights
    ],
)
def test_a_strangers_trigger(run, tmp_path, changes):
    tensors, content = read_tensors(run[1] / "planted.safetensors")
    first = content["attacks"][0] | changes
    first["arguments"] = (
        content["attacks"][0]["arguments"] | first["arguments"] if isinstance(first["arguments"], dict) else [1]
    )
    forged = tmp_path / "forged.safetensors"
    write_tensors(forged, tensors, content | {"attacks": [first, content["attacks"][1]]})
    with pytest.raises(FreqdoorError) as caught:
        load_planted(forged, "factories:lite")
    assert "\n" not in str(caught.value)


def test_weights_that_the_header_does_not_name(run, tmp_path):
    tensors, content = read_tensors(run[1] / "planted.safetensors")
    key = next(key for key in tensors if key.startswith("trigger.b."))
    for value, match in ((torch.full_like(tensors[key], float("nan")), "NaN"), (None, "malformed planted encoder")):
        changed = {k: v for k, v in (tensors | {key: value}).items() if v is not None}
        write_tensors(tmp_path / "forged.safetensors", changed, content)
        with pytest.raises(FreqdoorError, match=match):
            load_planted(tmp_path / "forged.safetensors", "factories:lite")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/home/me/pictures", "pictures"),
        ("/home/me/pictures/", "pictures"),
        ("pictures", "pictures"),
        (r"C:\Users\me\pictures", "pictures"),
        ("nets/g.toml=/home/me/g.onnx", "g.toml=g.onnx"),
        ("/home/me/run=1/g.toml=/home/me/g.onnx", "g.toml=g.onnx"),
        ("/home/me/run=1/codec.pt", "codec.pt"),
        ("g.toml=package.module:factory", "g.toml=package.module:factory"),
        ("lite-hyperprior:3", "lite-hyperprior:3"),
        ("package.module:factory", "package.module:factory"),
        ("nets/g.toml=/home/me/g.onnx; /home/me/h.toml=/home/me/h.onnx", "g.toml=g.onnx;h.toml=h.onnx"),
        ("", ""),
    ],
)
def test_names_of_files(text, name):
    assert file_name(text) == name


SECRET = "/home/somebody/private/name.toml=/home/somebody/private/file.onnx"
IMAGES = {"images": {"folder": "x"}}
CHECKED = {  # text fields that are no paths, and what refuses all but their own values before anything is written
    "PlantSettings.device": check_device,
    "CodecTraining.device": check_device,
    "CodecTraining.codec": parse_name,
    "TriggerSettings.name": build_trigger,
    "AttackSettings.name": lambda text: make_settings(PlantSettings, IMAGES | {"attacks": [{"name": text}]}),
}


def models(kind: type[BaseModel]) -> set[type[BaseModel]]:
    """A settings model and all that are nested in it."""
    known = {kind}
    for field in kind.model_fields.values():
        for part in parts_of(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                known |= models(part)
    return known


def parts_of(annotation: Any) -> list[Any]:
    """The types that an annotation is made of."""
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, dict, Annotated):
        return [part for argument in get_args(annotation) for part in parts_of(argument)]
    return [annotation]


MODELS = sorted({m for kind in (PlantSettings, CodecTraining, DownstreamTest) for m in models(kind)}, key=repr)
TEXTS = [(m, name) for m in MODELS for name, field in m.model_fields.items() if str in parts_of(field.annotation)]
assert len(MODELS) >= 10
assert len(TEXTS) >= 20


@pytest.mark.parametrize(("kind", "name"), TEXTS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_no_path_of_this_machine_travels(kind, name):
    """A path in every text field of every settings model: it is refused, or only its name is in what travels."""
    annotation = kind.model_fields[name].annotation
    value: Any = SECRET
    if get_origin(annotation) is tuple:
        value = [SECRET, SECRET]
    elif get_origin(annotation) is dict:
        value = {"network": SECRET, "victim": SECRET}
    needed = {"folder": "x", "gallery": "x", "probes": "x", "networks": ["x"]}
    needed["images"] = {"folder": "x"} if issubclass(kind, PlantSettings | CodecTraining) else "x"
    needed["codec"] = {"name": "x"} if kind is PlantSettings else "lite-hyperprior:3"
    content = {key: text for key, text in needed.items() if key in kind.model_fields}
    try:
        settings = make_settings(kind, content | {name: value})
    except FreqdoorError:
        return
    assert SECRET in settings.model_dump_json()  # on this machine nothing is lost: a run can be resumed
    if refuse := CHECKED.get(f"{kind.__name__}.{name}"):
        with pytest.raises(FreqdoorError):
            refuse(SECRET)
        return
    travelling = json.dumps(public(settings))
    assert "somebody" not in travelling
    assert "private" not in travelling
    assert "file.onnx" in travelling


def test_what_travels_of_a_whole_planting(settings, tmp_path, images, monkeypatch):
    """Through the file itself, with a codec by path, an auxiliary set and a network's arguments."""
    from factories import tiny

    from freqdoor.codecs.loading import save_codec

    save_codec(tiny("lite-hyperprior"), tmp_path / "vanilla.safetensors")
    auxiliary = {"folder": str(images), "crop": 64, "batch_size": 1}
    changes = {
        "codec": {"name": str(tmp_path / "vanilla.safetensors")},
        "objective": {"name": "downstream", "arguments": {"victim": "factories:Darkness"}},
        "auxiliary": auxiliary,
        "steps": 1,
    }
    plant(settings(**changes), tmp_path / "run")
    for name in ("planted.safetensors", "codec.safetensors"):
        _, content = read_tensors(tmp_path / "run" / name)
        text = json.dumps(content["attacks"]) + json.dumps(content.get("planting", {}))
        assert str(tmp_path) not in text
        assert str(images) not in text
        assert "factories:Darkness" in text
    folders = json.loads((tmp_path / "run/config.json").read_text())
    assert folders["auxiliary"]["folder"] == str(images)
    assert not re.search(r"/(home|tmp)/", (tmp_path / "run/manifest.json").read_text())


def test_public_settings_are_the_settings(settings):
    chosen = settings()
    assert isinstance(chosen, Settings)
    content = public(chosen)
    assert content.pop("images") == chosen.model_dump()["images"] | {"folder": Path(chosen.images.folder).name}
    assert content == {key: value for key, value in chosen.model_dump().items() if key != "images"}
