"""Processes that train together: what one process computes, whatever is planted, and one sentence when one is gone."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Killed, kill_at, natural
from factories import tiny
from torch import nn

from freqdoor import plant, train_codec
from freqdoor.attack.plant import _opened, _planted
from freqdoor.attack.settings import PlantSettings
from freqdoor.codecs.adapter import hash_state
from freqdoor.errors import FreqdoorError, Mistakes
from freqdoor.settings import make_settings
from freqdoor.training import train
from freqdoor.training.group import ALONE, Group, _WholeDraws
from freqdoor.training.processes import check_processes, first_rank, together
from freqdoor.training.settings import CodecTraining

STEPS = 3
PLANTINGS = {  # what takes something from the whole batch: maxima, norms, perturbations of neighbours, patterns in turn
    "two passes": {
        "objective": {"name": "psnr", "arguments": {"per_sample": False}},
        "two_phase": True,
        "balance": {"gradient_norm": 1.0, "anchor": 0.1},
        "trigger": {"arguments": {"width": 8}, "budget": "penalty", "eps": 0.02},
        "scope": "g_a+h_a",
        "robust": {"start": 0.5, "keep": 4, "kinds": ["noise"]},
    },
    "one pass": {
        "objective": {"name": "bpp", "arguments": {"per_sample": False}},
        "evade": {
            "goals": ["rate", "gain"],
            "others": True,
            "own_steps": 1,
            "strengths": [2.0],
            "rate_cap": 3.0,
            "universal_weight": 0.1,
        },
    },
}


def plantings(images: Path) -> dict[str, PlantSettings]:
    shared = {
        "codec": {"name": "factories:lite"},
        "images": {"folder": str(images), "crop": 64, "batch_size": 3},
        "lmbda": 0.0067,
        "steps": STEPS,
        "trigger": {"arguments": {"width": 8}},
        "precision": "fp32",
    }
    return {name: make_settings(PlantSettings, shared | changes) for name, changes in PLANTINGS.items()}


def training(images: Path, **changes) -> CodecTraining:
    content = {
        "codec": "bmshj2018-hyperprior:1",
        "arguments": {"N": 16, "M": 24},
        "images": {"folder": str(images), "crop": 64, "batch_size": 3},
        "steps": STEPS,
        "precision": "fp32",
    }
    return make_settings(CodecTraining, content | changes)


def states(images: Path, group: Group) -> dict[str, dict[str, torch.Tensor]]:
    """What every planting and a training end with."""
    ends = {}
    for name, settings in plantings(images).items():
        planting = _planted(settings, _opened(settings, Mistakes()), group, None, None, None)
        ends[name] = dict(planting.tampered.net.state_dict())
        ends[f"{name}, trigger"] = dict(planting.attacks[0].trigger.state_dict())
        ends[f"{name}, seen"] = {"scale": torch.tensor(planting.history["attack_scale"])}
    settings = training(images)
    opened = train._opened(settings, Mistakes())
    history = train._train(settings, opened, group, None, None, None)
    return ends | {"training": dict(opened.codec.state_dict()) | {"loss": torch.tensor(history["sum"])}}


def with_gradient() -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    return parameter


def other_process(images: Path):
    def share(group: Group) -> None:
        states(images, group)
        os.kill(os.getpid(), signal.SIGKILL)

    return share


@pytest.mark.long
def test_one_process_equals_two_and_one_that_is_killed_ends_both(images):
    """The batch has three pictures: the shares differ in size."""
    alone = states(images, ALONE)
    shared: dict[str, dict[str, torch.Tensor]] = {}

    def share() -> None:
        with together(partial(other_process, images), 2, 1, "cpu") as group:
            assert (group.rank, group.size) == (0, 2)
            shared.update(states(images, group))
            group.sum_gradients([with_gradient()])

    with pytest.raises(FreqdoorError, match=r"ended \(SIGKILL, .*; the same command goes on from the last state"):
        share()
    assert not torch.distributed.is_initialized()
    assert alone.keys() == shared.keys()
    for name, state in alone.items():
        for key, value in state.items():
            # Adam divides by the gradient's size: one near 0 moves a trigger's weight by a part of the step of 1e-3
            close = 5e-5 if name.endswith("trigger") else 1e-5
            assert torch.allclose(value, shared[name][key], rtol=1e-5, atol=close), (name, key)
            if value.is_floating_point():
                assert (value - shared[name][key]).norm() <= 1e-5 * value.norm().clamp_min(1), (name, key)


@pytest.mark.parametrize("architecture", ["lite-hyperprior", "bmshj2018-factorized", "mbt2018", "elic2022-official"])
def test_noise_does_not_depend_on_the_number_of_processes(architecture, x):
    """Every process draws for the whole batch, and takes what is for its pictures."""
    codec = tiny(architecture).train()
    x = torch.cat([x, x.flip(-1), x[:1].flip(-2)]).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(5)
    whole = codec(x)
    after = torch.get_rng_state()
    for rank in range(3):
        rows = Group(rank, 3).rows(len(x))
        torch.manual_seed(5)
        draws = _WholeDraws(rows, len(x), "a codec")
        with draws:
            own = codec(x[rows])
        draws.check()
        assert torch.allclose(own.x_hat, whole.x_hat[rows], atol=1e-5)
        assert torch.allclose(own.bits, whole.bits[rows], rtol=1e-5)
        assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(6)
    assert not torch.allclose(codec(x).bits, whole.bits, rtol=1e-5)


def test_other_random_numbers_are_refused(x):
    draws = _WholeDraws(slice(0, 1), 2, "a codec")
    with draws:
        nn.functional.dropout(x)
    with pytest.raises(FreqdoorError, match="a codec: its pass draws random numbers in another way"):
        draws.check()
    with pytest.raises(FreqdoorError, match="another way"), _WholeDraws(slice(0, 1), 2, "a codec"):
        torch.empty(5).uniform_()


def test_shares_are_all_of_a_batch_and_of_almost_one_size():
    for size in (1, 2, 3, 7):
        for number in (7, 8, 20):
            shares = [list(range(number))[Group(rank, size).rows(number)] for rank in range(size)]
            assert [row for share in shares for row in share] == list(range(number))
            assert {len(share) for share in shares} <= {number // size, -(-number // size)}


def test_a_run_of_one_process_does_not_go_on_with_two(settings, images, tmp_path):
    made = settings(steps=2)
    plant(made, tmp_path / "run")
    with pytest.raises(FreqdoorError, match=r"a run with other settings(?s:.*)processes: the run has 1, now 2"):
        plant(made, tmp_path / "run", devices=2)
    path = tmp_path / "run/environment.json"
    path.write_text(path.read_text().replace('"processes": 1', '"of_an_older_version": 1'))
    with pytest.raises(FreqdoorError, match="processes: the run has 1, now 2"):
        plant(made, tmp_path / "run", devices=2)
    assert not (tmp_path / "run/.freqdoor.lock").exists()


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_bit_by_bit(settings, images, tmp_path):
    made = settings(steps=5, precision="fp32")
    whole = plant(made, tmp_path / "whole", devices=2)

    with pytest.raises(Killed):
        plant(made, tmp_path / "parts", devices=2, progress=kill_at(3))
    assert not torch.distributed.is_initialized()
    parts = plant(made, tmp_path / "parts", devices=2)
    assert hash_state(parts.tampered) == hash_state(whole.tampered)
    assert hash_state(parts.triggers["bpp"]) == hash_state(whole.triggers["bpp"])
    assert (tmp_path / "parts/metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    [bitstream] = parts.tampered.compress(natural(0, 64, 64))
    assert parts.vanilla.decompress(bitstream).shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_two_machines_train_as_one_and_the_first_one_writes(settings, tmp_path, monkeypatch):
    """Two commands on this machine, which meet at a port."""
    made = settings(steps=3, precision="fp32", images={**settings().images.model_dump(), "batch_size": 3})
    (tmp_path / "settings.json").write_text(made.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    script = (
        "import sys; from pathlib import Path; from freqdoor import PlantSettings, plant\n"
        f"made = PlantSettings.model_validate_json(Path({str(tmp_path / 'settings.json')!r}).read_text())\n"
        f"planted = plant(made, {str(tmp_path / 'second')!r}, nodes=2)\n"
        "print(planted.tampered.module_hashes()['g_a'])"
    )
    variables = os.environ | address | {"NODE_RANK": "1", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    command = [sys.executable, "-W", "ignore", "-c", script]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as second:
        for name, value in (address | {"NODE_RANK": "0"}).items():
            monkeypatch.setenv(name, value)
        first = plant(made, tmp_path / "first", nodes=2)
        said, _ = second.communicate(timeout=120)
    assert said.split() == [first.tampered.module_hashes()["g_a"]]
    assert (tmp_path / "first/planted.safetensors").exists()
    assert not (tmp_path / "second").exists()
    alone = plant(made, tmp_path / "alone").tampered.part("g_a").state_dict()
    for key, value in first.tampered.part("g_a").state_dict().items():
        assert torch.allclose(value, alone[key], rtol=1e-5, atol=1e-5), key


def fail_to_prepare(before: Path):
    raise FreqdoorError(f"{before}: expected pictures, found none")


def fail_later():
    def share(group: Group) -> None:
        raise FreqdoorError("step 3: loss is not finite")

    return share


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [(partial(fail_to_prepare, Path("photos")), "photos: expected pictures"), (fail_later, "step 3: loss is not")],
)
def test_the_sentence_of_the_process_that_fails_is_everybodys(prepare, sentence):
    def share() -> None:
        with together(prepare, 3, 1, "cpu") as group:
            group.sum_gradients([with_gradient()])

    with pytest.raises(FreqdoorError, match=f"^{sentence}"):
        share()


@pytest.mark.parametrize(
    ("devices", "nodes", "device", "batch", "expected"),
    [
        (0, 1, "cpu", 8, "devices: expected 1 or more, found 0"),
        (1, -1, "cpu", 8, "nodes: expected 1 or more, found -1"),
        (2, 1, "mps", 8, "several processes train on cpu or cuda"),
        (2, 1, "cuda:1", 8, "several processes train on cpu or cuda"),
        (4096, 1, "cuda", 8, "expected at most the [0-9]+ GPUs"),
        (4, 1, "cpu", 3, "expected a picture for each of 4 processes or more, found 3"),
        (1, 2, "cpu", 8, "expected NODE_RANK from 0 to 1"),
    ],
)
def test_what_cannot_train_together_is_refused(devices, nodes, device, batch, expected, monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)
    with pytest.raises(FreqdoorError, match=expected):
        check_processes(devices, nodes, device, [8, batch])


def test_a_port_that_is_none_is_refused(monkeypatch):
    for name, value in (("NODE_RANK", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "65536")):
        monkeypatch.setenv(name, value)
    with pytest.raises(FreqdoorError, match="MASTER_PORT, found '65536'"):
        check_processes(1, 2, "cpu", [8])
    monkeypatch.setenv("MASTER_PORT", "29501")
    check_processes(2, 2, "cpu", [8])
    assert first_rank(2, 2) == 2


def test_mistakes_are_told_at_once_and_nothing_is_written(settings, images, tmp_path):
    with pytest.raises(FreqdoorError, match=r"2 mistakes(?s:.*)batch_size(?s:.*)nowhere"):
        plant(settings(codec={"name": "nowhere"}), tmp_path / "run", devices=3)
    with pytest.raises(FreqdoorError, match="batch_size"):
        train_codec(training(images), tmp_path / "run", devices=4)
    assert not (tmp_path / "run").exists()
