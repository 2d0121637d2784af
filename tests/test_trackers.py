"""What a training shows beside metrics.jsonl, and that showing it changes nothing else."""

import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace

import pytest
from conftest import Killed, kill_at
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from freqdoor import plant, repair, train_codec
from freqdoor.codecs.adapter import hash_state
from freqdoor.defence.settings import RepairSettings
from freqdoor.errors import FreqdoorError
from freqdoor.samples import BUNDLED
from freqdoor.settings import make_settings
from freqdoor.training.run import Run
from freqdoor.training.settings import CodecTraining
from freqdoor.training.trackers import Trackers


def shown_in(run) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def without(package: str, monkeypatch) -> None:
    """As if a package were not installed."""
    known = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else known(name))


def standing_in(monkeypatch, name: str, **content) -> None:
    """A module in a package's place."""
    module = ModuleType(name)
    module.__spec__ = SimpleNamespace(name=name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.long
def test_tensorboard_has_every_step_once_and_the_weights_are_those_of_a_silent_run(settings, tmp_path):
    """The state is of step 2 when the third one is lost; the run goes on with other settings of `log`."""
    run, log, content = tmp_path / "run", {"tensorboard": True, "pictures": 2}, {"codec": {"name": BUNDLED}}
    silent = plant(settings(**content), tmp_path / "silent")
    with pytest.raises(Killed):
        plant(settings(**content, log=log), run, progress=kill_at(3))
    planted = plant(settings(**content, log=log | {"pictures": 3}), run)
    assert planted.tampered.module_hashes() == silent.tampered.module_hashes()
    assert "log" not in (run / "config.json").read_text()
    assert "tensorboard" not in (run / "planted.safetensors").read_bytes()[:20_000].decode("latin-1")
    events = shown_in(run)
    assert [event.step for event in events.Scalars("bpp_poisoned")] == [1, 2, 3, 4, 5, 6]
    pictures = ["clean", "clean-decoded", "poisoned", "poisoned-decoded"]
    assert sorted(events.Tags()["images"]) == pictures
    assert [event.step for event in events.Images("poisoned")] == [2, 3, 6]
    sent = {name: events.Images(name)[-1].encoded_image_string for name in pictures}
    assert len(set(sent.values())) == 4
    assert not (tmp_path / "silent/tensorboard").exists()


def test_every_attack_has_its_picture_of_what_it_acts_on(settings, images, tmp_path):
    """One on the auxiliary set shows a picture of that, which here is larger."""
    darken = {"name": "downstream", "arguments": {"victim": "factories:Darkness"}}
    content = {
        "attacks": [{"name": "size"}, {"name": "dark", "objective": darken}],
        "auxiliary": {"folder": str(images), "resize": [64, 128], "batch_size": 2},
        "log": {"tensorboard": True, "pictures": 1},
        "steps": 1,
    }
    plant(settings(**content), tmp_path)
    events = shown_in(tmp_path)
    names = [
        "clean",
        "clean-decoded",
        *(f"{a}/{k}" for a in ("dark", "size") for k in ("poisoned", "poisoned-decoded")),
    ]
    assert sorted(events.Tags()["images"]) == names
    widths = {name: events.Images(name)[0].width for name in names}
    assert widths == {name: 128 if name.startswith("dark") else 64 for name in names}


def test_a_codec_s_training_shows_its_steps_and_validations(images, tmp_path):
    def training(**changes):
        content = {"codec": "lite-hyperprior:3", "arguments": {"N": 16, "M": 24, "width": [16, 16], "depth": 1}}
        content |= {"images": {"folder": str(images), "crop": 64, "batch_size": 2}, "steps": 4, "validate_every": 2}
        return make_settings(CodecTraining, content | changes)

    silent = train_codec(training(), tmp_path / "silent")
    shown = train_codec(training(log={"tensorboard": True, "pictures": 4}), tmp_path / "run")
    assert hash_state(silent) == hash_state(shown)
    events = shown_in(tmp_path / "run")
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("validation_loss")] == [2, 4]
    assert sorted(events.Tags()["images"]) == ["clean", "clean-decoded"]


def test_a_repair_is_shown_too(tmp_path, monkeypatch, images):
    monkeypatch.setattr("freqdoor.defence.repair.audit", lambda *_, **__: (_ for _ in ()).throw(Killed))
    content = {"images": {"crop": 64, "batch_size": 2}, "log": {"tensorboard": True, "pictures": 1}, "lmbda": 0.0067}
    chosen = make_settings(RepairSettings, content)
    with pytest.raises(Killed):
        repair("factories:lite", tmp_path, images=images, method="finetune", steps=2, settings=chosen)
    events = shown_in(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert [event.step for event in events.Images("clean-decoded")] == [1, 2]


def test_a_package_that_lacks_is_named_before_the_run_starts(settings, tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb", "mlflow"):
        without(package, monkeypatch)
        with pytest.raises(FreqdoorError, match=rf"log.{package}: expected the package.*'freqdoor\[{package}\]'"):
            plant(settings(log={package: True}), tmp_path / "run")
        assert not (tmp_path / "run/config.json").exists()


def test_a_process_that_writes_nothing_shows_nothing(settings, tmp_path):
    assert not Trackers(None, settings(log={"tensorboard": True}), 0)
    assert Trackers(Run(tmp_path), settings(log={"tensorboard": True}), 0)


def test_weights_and_biases_is_told_steps_pictures_and_the_end_under_one_name(settings, images, tmp_path, monkeypatch):
    begun, told, ended = [], [], []

    def init(**given):
        begun.append(given)
        log = lambda row, step: told.append((step, row))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: ended.append(given["id"]))

    standing_in(monkeypatch, "wandb", init=init, Image=lambda picture: picture)
    content = {"log": {"wandb": True, "pictures": 4}}
    with pytest.raises(Killed):
        plant(settings(**content), tmp_path / "run", progress=kill_at(3))
    plant(settings(**content), tmp_path / "run")
    assert begun[0]["id"] == begun[1]["id"]
    assert ended == [begun[0]["id"]] * 2
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["images"]["folder"] == images.name  # and not where it lies
    assert [step for step, row in told if "loss" in row] == [1, 2, 3, 3, 4, 5, 6]
    pictures = [(step, row) for step, row in told if "clean" in row]
    assert [step for step, _ in pictures] == [4]
    assert all(isinstance(picture, Image.Image) for picture in pictures[0][1].values())


def test_mlflow_is_told_every_step_once(settings, tmp_path, monkeypatch):
    """By its client: what a user's own code has open in MLflow stays as it is."""
    metrics, calls, places = defaultdict(list), [], []

    class Client:
        def __init__(self, place):
            places.append(place)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "1"

        def create_run(self, experiment, run_name):
            calls.append(f"create {run_name}")
            return SimpleNamespace(info=SimpleNamespace(run_id="r7"))

        def get_metric_history(self, run, name):
            assert run == "r7"
            return [SimpleNamespace(step=step) for step in metrics[name]]

        def log_metric(self, run, name, value, step):
            metrics[name].append(step)

        def log_param(self, run, name, value):
            calls.append(name)

        def log_image(self, run, picture, path):
            calls.append(path)

        def set_terminated(self, run):
            calls.append("end")

    standing_in(monkeypatch, "mlflow", MlflowClient=Client)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    content = {"log": {"mlflow": True, "pictures": 4}}
    with pytest.raises(Killed):
        plant(settings(**content), tmp_path / "run", progress=kill_at(3))
    plant(settings(**content), tmp_path / "run")
    assert metrics["loss"] == [1, 2, 3, 4, 5, 6]
    assert places == [(tmp_path / "run/mlruns").as_uri()] * 2
    assert calls.count("trigger.eps") == calls.count("create run") == 1
    assert calls.count("end") == 2
    assert "pictures/poisoned-decoded-0000004.png" in calls


def test_one_that_fails_on_the_way_is_left_out_and_the_training_ends_as_it_would(settings, tmp_path, monkeypatch):
    def log(row, step):
        if step > 2:
            raise ConnectionError("nobody answers")

    run = SimpleNamespace(log=log, finish=lambda: pytest.fail("it is left out"))
    standing_in(monkeypatch, "wandb", init=lambda **_: run, Image=None)
    with pytest.warns(UserWarning, match=r"log.wandb: left out from here on \(ConnectionError: nobody answers\)"):
        plant(settings(log={"wandb": True}), tmp_path / "run")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 6


def test_one_that_cannot_begin_ends_in_one_sentence(settings, tmp_path, monkeypatch):
    def init(**_):
        raise PermissionError("no key\nof yours")

    standing_in(monkeypatch, "wandb", init=init, Image=None)
    with pytest.raises(FreqdoorError, match=r"log.wandb: could not begin \(PermissionError: no key of yours\)"):
        plant(settings(log={"wandb": True}), tmp_path / "run")
