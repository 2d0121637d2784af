"""The run directory: what is refused, what is mended, and what is known of the machine."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from freqdoor.attack.settings import PlantSettings
from freqdoor.errors import FreqdoorError
from freqdoor.files import unfinished
from freqdoor.settings import make_settings
from freqdoor.training import run as running
from freqdoor.training.run import Environment, Run, RunFacts, environment

OLD = Path(__file__).parent / "old"  # written by the version before results had a schema
FACTS = {"images": 4, "images_sha256": "ab", "modules_before": {"g_a": "1"}}


def settings(**changes) -> PlantSettings:
    content = {"images": {"folder": "pics", "crop": 64}, "steps": 6, "precision": "fp32"}
    return make_settings(PlantSettings, content | changes)


def begun(folder: Path, step: int = 2, chosen: PlantSettings | None = None) -> Run:
    run = Run(folder)
    assert run.start(chosen or settings(), FACTS) is None
    for i in range(step):
        run.log({"step": i + 1, "loss": 0.5})
    run.save({"history": {"step": step, "seconds": 1.5}})
    return run


def test_a_run_is_found_again_with_its_state(tmp_path):
    begun(tmp_path).log({"step": 3, "loss": 0.25})
    saved = Run(tmp_path).start(settings(), FACTS)
    assert saved["history"] == {"step": 2, "seconds": 1.5}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content.items() >= FACTS.items()
    assert content["schema_version"] == 1
    assert RunFacts.read(tmp_path / "environment.json", "").images == 4


def test_a_run_without_a_state_begins_anew(tmp_path):
    begun(tmp_path)
    (tmp_path / "state.pt").unlink()
    assert Run(tmp_path).start(settings(checkpoint_minutes=9.0), FACTS) is None
    assert json.loads((tmp_path / "config.json").read_text())["checkpoint_minutes"] == 9
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_without_a_state_is_no_place_for_another(tmp_path):
    """Two seeds in one folder: what the first one exported would carry the settings of the second."""
    begun(tmp_path)
    (tmp_path / "state.pt").unlink()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FreqdoorError, match="seed: the run has 0, now 1"):
        Run(tmp_path).start(settings(seed=1), FACTS)
    for text, sentence in (
        ('{"model_type": "bert"}', "expected the settings of such a run, found others"),
        ("not JSON", "expected the settings of such a run"),
        (b"\xff\xfe", r"could not read the settings of a run \(not a text\)"),
    ):
        (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(FreqdoorError, match=rf"config\.json: {sentence}"):
            Run(tmp_path).start(settings(), FACTS)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()}.keys() == before.keys()
    mixed = settings(attacks=[{"objective": "bpp"}, {"objective": "psnr"}])  # whose dump is no settings again
    (tmp_path / "config.json").write_text(mixed.model_dump_json())
    assert Run(tmp_path).start(mixed, FACTS) is None
    (tmp_path / "config.json").write_bytes(bytes(100))  # after a power cut
    assert Run(tmp_path).start(settings(), FACTS) is None


@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl", "planted.safetensors"])
def test_files_of_another_program_are_not_lost(tmp_path, name):
    (tmp_path / name).write_text("theirs")
    with pytest.raises(FreqdoorError, match=rf"{name} without the config\.json of a run would be lost here"):
        Run(tmp_path, ["planted.safetensors"]).start(settings(), FACTS)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "theirs")]


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "state.pt"])
@pytest.mark.parametrize("state", [True, False])
def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path, name, state):
    begun(tmp_path)
    if not state:
        (tmp_path / "state.pt").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name / "deeper").mkdir(parents=True)

    def act() -> None:
        Run(tmp_path).start(settings(), FACTS)
        Run(tmp_path).log({"step": 1})

    with pytest.raises(FreqdoorError, match=re.escape(str(tmp_path / name))):
        act()
    assert (tmp_path / name / "deeper").is_dir()


@pytest.mark.parametrize(
    ("changes", "facts", "sentence"),
    [
        ({"steps": 7}, {}, "steps: the run has 6, now 7"),
        ({"images": {"folder": "pics", "crop": 128}}, {}, "images.crop: the run has 64, now 128"),
        ({"trigger": {"arguments": {"top_k": 4}}}, {}, "trigger.arguments.top_k: the run has None, now 4"),
        ({"precision": "bf16"}, {}, "precision: the run has 'fp32', now 'bf16'"),
        ({}, {"images": 3}, "images: the run has 4, now 3"),
        ({}, {"images_sha256": "cd"}, "images_sha256: the run has 'ab', now 'cd'"),
        ({}, {"modules_before": {"g_a": "2"}}, "modules_before.g_a: the run has '1', now '2'"),
        ({}, {"modules_before": {"g_a": "1", "h_a": "3"}}, "modules_before.h_a: the run has None, now '3'"),
    ],
)
def test_other_settings_and_facts_are_refused(tmp_path, changes, facts, sentence):
    begun(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FreqdoorError, match=r"choose another folder") as caught:
        Run(tmp_path).start(settings(**changes), FACTS | facts)
    assert sentence in str(caught.value).splitlines()[1]
    assert "--set" in str(caught.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_does_not_change_the_result_may_change(tmp_path):
    begun(tmp_path)
    assert Run(tmp_path).start(settings(checkpoint_minutes=7.0), FACTS)
    assert Run(tmp_path).start(settings(), FACTS | {"precision": "fp32"})  # a fact that an older version did not write


def test_settings_of_an_older_version(tmp_path):
    """Keys that came later have their defaults; keys that are gone, and other values, are refused with a sentence."""
    begun(tmp_path, chosen=settings(lr=0.5))
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("two_phase", "robust", "network"):
        del content[key]
    del content["images"]["window"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert Run(tmp_path).start(settings(lr=0.5), FACTS)
    with pytest.raises(FreqdoorError, match="two_phase: the run has False, now True"):
        Run(tmp_path).start(settings(lr=0.5, two_phase=True), FACTS)
    (tmp_path / "config.json").write_text(json.dumps(content | {"of_yesterday": 3}))
    with pytest.raises(FreqdoorError, match="of_yesterday: the run has 3, now None"):
        Run(tmp_path).start(settings(lr=0.5), FACTS)


def test_a_run_that_the_version_before_schemas_wrote(tmp_path):
    for name in ("config.json", "environment.json"):
        (tmp_path / name).write_text((OLD / name).read_text())
    torch.save({"history": {"step": 3, "seconds": 1.0}}, tmp_path / "state.pt")
    earlier = json.loads((OLD / "config.json").read_text())
    known = json.loads((OLD / "environment.json").read_text())
    facts = {key: known[key] for key in ("images", "images_sha256", "modules_before")}
    assert Run(tmp_path).start(make_settings(PlantSettings, earlier), facts)["history"]["step"] == 3
    read = RunFacts.read(OLD / "environment.json", "")
    assert (read.images, read.threads, read.processor) == (4, 1, None)


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b"[]", None])
def test_a_damaged_file_is_written_again_from_the_state(tmp_path, name, damage):
    begun(tmp_path)
    whole = (tmp_path / name).read_text()
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    with pytest.raises(FreqdoorError, match="steps: the run has 6, now 7"):
        Run(tmp_path).start(settings(steps=7), FACTS)
    assert Run(tmp_path).start(settings(), FACTS)["history"]["step"] == 2
    assert (tmp_path / name).read_text() == whole


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
def test_a_damaged_file_of_a_state_that_does_not_know_it(tmp_path, name):
    begun(tmp_path)
    torch.save({"history": {"step": 2, "seconds": 1.5}}, tmp_path / "state.pt")  # as older versions wrote it
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(
        FreqdoorError, match=rf"{name}: missing, empty or damaged.* its state of step 2 is whole: put a good"
    ):
        Run(tmp_path).start(settings(), FACTS)


def test_garbage_in_the_metrics_is_dropped(tmp_path):
    begun(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\x00\n[]\n{"step": null}\n{"step": 2, "lo')
    assert Run(tmp_path).start(settings(), FACTS)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


@pytest.mark.parametrize(
    "content", [{"epoch": 1}, [1, 2], {"history": 3}, {"history": {"step": "many", "seconds": 1.0}}, torch.zeros(2)]
)
def test_a_state_of_another_tool(tmp_path, content):
    begun(tmp_path)
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(FreqdoorError, match=r"state\.pt: expected the state of a training that freqdoor wrote"):
        Run(tmp_path).start(settings(), FACTS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no state"])
def test_a_damaged_state(tmp_path, content):
    begun(tmp_path)
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(FreqdoorError, match=r"state\.pt: damaged checkpoint .*delete it to start anew"):
        Run(tmp_path).start(settings(), FACTS)


def flipped(path: Path, bit: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


@pytest.mark.parametrize("sealed", [True, False])
def test_every_flipped_bit_of_a_state_is_noticed_or_harmless(tmp_path, sealed):
    """Also in states of older versions, which have no digest of ours but the archive's own checksums."""
    run = Run(tmp_path)
    run.start(settings(), FACTS)
    state = {"net": {"weight": torch.arange(64.0)}, "history": {"step": 2, "seconds": 1.5}}
    run.save(state)
    if not sealed:
        torch.save(state, tmp_path / "state.pt")
    path = tmp_path / "state.pt"
    whole, bits, noticed = path.read_bytes(), 8 * path.stat().st_size, 0
    weights = [8 * (whole.index(torch.arange(64.0).numpy().tobytes()) + i) for i in range(0, 256, 16)]
    seal = range(bits - 8 * 82, bits, 8) if sealed else ()
    for bit in {*random.Random(0).sample(range(bits), 250), *weights, *seal}:
        path.write_bytes(flipped(path, bit))
        try:
            saved = Run(tmp_path).start(settings(), FACTS)
        except FreqdoorError as error:
            assert "state.pt: damaged checkpoint" in str(error)  # noqa: PT017
            noticed += 1
        else:
            assert torch.equal(saved["net"]["weight"], torch.arange(64.0))
            assert saved["history"] == state["history"]
        path.write_bytes(whole)
    assert noticed > (250 if sealed else 100)
    assert Run(tmp_path).start(settings(), FACTS)["history"] == state["history"]


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_state_before_a_damaged_one_goes_on(tmp_path):
    run = begun(tmp_path)
    assert not (tmp_path / "state.previous.pt").exists()
    for step in (3, 4):
        run.log({"step": step})
        run.save({"history": {"step": step, "seconds": 2.0}})
    (tmp_path / "state.pt").write_bytes(flipped(tmp_path / "state.pt", 4000))
    with pytest.raises(FreqdoorError, match=r"delete it to go on from the state before it, state\.previous\.pt"):
        Run(tmp_path).start(settings(), FACTS)
    (tmp_path / "state.pt").unlink()
    with pytest.warns(UserWarning, match=r"state\.pt is not there: going on from state\.previous\.pt, step 3"):
        assert Run(tmp_path).start(settings(), FACTS)["history"]["step"] == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    (tmp_path / "state.previous.pt").write_bytes(b"")
    with pytest.raises(FreqdoorError, match=r"state\.previous\.pt: damaged checkpoint .*delete it to start anew"):
        Run(tmp_path).start(settings(), FACTS)


def test_a_state_of_another_run_is_refused(tmp_path):
    """A state that was copied into the folder of another seed: it says itself what it began with."""
    begun(tmp_path / "a")
    begun(tmp_path / "b", chosen=settings(seed=1))
    (tmp_path / "b/state.pt").write_bytes((tmp_path / "a/state.pt").read_bytes())
    with pytest.raises(FreqdoorError, match="seed: the run has 0, now 1"):
        Run(tmp_path / "b").start(settings(seed=1), FACTS)


def test_what_a_killed_process_left_of_a_state_is_removed(tmp_path):
    begun(tmp_path)
    mine = unfinished(tmp_path / "state.pt")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).write_bytes(b"half")
    Run(tmp_path).start(settings(), FACTS)
    assert not list(tmp_path.glob(".partial*"))


def repository(folder: Path, name: str, *, tracked: bool) -> Path:
    """A package in a git repository of a project."""
    package = folder / "freqdoor"
    package.mkdir(parents=True)
    (package / "errors.py").write_text("")
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    files = ["pyproject.toml", *(["freqdoor"] if tracked else [])]
    for command in (["init", "-q"], ["add", *files], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=folder, check=True, capture_output=True)
    return package


def test_commit_of_freqdoors_own_repository_only(tmp_path):
    own = repository(tmp_path / "own", "freqdoor", tracked=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=own, check=True, capture_output=True, text=True).stdout
    assert running._commit(own) == head[:12]
    (own / "errors.py").write_text("changed")
    assert running._commit(own) == f"{head[:12]}-dirty"
    assert running._commit(repository(tmp_path / "theirs", "theirs", tracked=True)) is None
    assert running._commit(repository(tmp_path / "installed", "freqdoor", tracked=False)) is None
    (own.parent / "pyproject.toml").write_text("[project")
    assert running._commit(own) is None
    (own.parent / "pyproject.toml").unlink()
    assert running._commit(own) is None
    assert running._commit(tmp_path) is None
    assert running._commit(tmp_path / "absent") is None


def test_environment_names_what_a_number_depends_on(tmp_path, monkeypatch):
    known = environment()
    assert known.versions.keys() == set(running.PACKAGES)
    assert known.versions["torch"] == torch.__version__.partition("+")[0]
    assert known.threads == torch.get_num_threads()
    table = tmp_path / "cpuinfo"
    table.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nprocessor\t: 1\nmodel name\t: Other\n")
    assert running._processor(table) == "Some CPU @ 2 GHz"
    table.write_text("processor : 0\n")
    assert running._processor(table) is None
    monkeypatch.setattr(running.platform, "processor", lambda: "arm")
    assert running._processor(tmp_path / "absent") == "arm"
    monkeypatch.setattr(running, "PACKAGES", ("torch", "no-such-package"))
    assert environment().versions["no-such-package"] == "not installed"
    assert Environment.model_validate_json(known.model_dump_json()) == known


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl", "state.pt", "state.previous.pt"])
def test_a_pipe_in_the_place_of_a_runs_file_is_named_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(FreqdoorError, match=f"{name}: expected a file of a run, found a device or a pipe"):
        Run(tmp_path).start(settings(), FACTS)
