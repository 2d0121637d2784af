"""What stops a training: the step under way ends, its state is kept, and the same command goes on from it."""

import copy
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from freqdoor.data import Crops, list_images
from freqdoor.training.loop import HeldSignals, loop
from freqdoor.training.settings import LogSettings

STEPS = 5


class Memory:
    """A run that keeps every state that is saved."""

    def __init__(self):
        self.states = []

    def save(self, state):
        self.states.append(copy.deepcopy(state))


@pytest.fixture
def train(images):
    """Train a layer whose steps have two halves; `between` is called with the step number in the middle of each."""
    crops = Crops(list_images(images), crop=64, batch_size=1, seed=0)
    settings = SimpleNamespace(seed=0, steps=STEPS, checkpoint_minutes=1e9, device="cpu", log=LogSettings())

    def run(between=lambda step: None, saved=None, progress=None):
        memory, net = Memory(), torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(net.weight)

        def take_step(x, step):
            net.weight.data += x.mean() + torch.rand(())
            between(step)
            net.weight.data *= 1 + step
            return {"loss": 0.0}

        try:
            loop(memory, settings, {"net": net}, {}, crops, take_step, saved=saved, progress=progress)
        finally:
            run.states, run.weight = memory.states, net.weight.item()
        return run.weight

    return run


def at(number, *steps):
    return lambda step: [signal.raise_signal(number) for s in steps if s == step]


def test_a_signal_waits_for_the_end_of_the_step_and_the_state_goes_on(train):
    whole = train()
    assert [state["history"]["step"] for state in train.states] == [STEPS]
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(at(signal.SIGINT, 2))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [state["history"]["step"] for state in train.states] == [3]
    assert train(saved=train.states[0]) == whole


def test_a_signal_does_what_it_did_before(train, monkeypatch):
    """The command line ends with code 143 on SIGTERM; what only takes note of a signal lets the training go on."""
    whole = train()

    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit, match="143"):
            train(at(signal.SIGTERM, 0))
        assert [state["history"]["step"] for state in train.states] == [1]
        noted = []
        signal.signal(signal.SIGTERM, lambda number, frame: noted.append(number))
        assert train(at(signal.SIGTERM, 0, 2)) == whole
        assert noted == [signal.SIGTERM] * 2
        assert [state["history"]["step"] for state in train.states] == [1, 3, STEPS]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert train(at(signal.SIGTERM, 0)) == whole
        assert [state["history"]["step"] for state in train.states] == [STEPS]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_second_signal_acts_at_once_and_saves_no_half_step(train):
    with pytest.raises(KeyboardInterrupt):
        train(at(signal.SIGINT, 2, 2))
    assert not train.states
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_interrupts_between_two_steps_keeps_the_state(train):
    whole = train()

    def stop(step, row):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(progress=stop)
    assert [state["history"]["step"] for state in train.states] == [2]
    assert train(saved=train.states[0]) == whole


def test_an_error_of_a_step_saves_nothing_and_does_not_hide_a_signal(train):
    def fail(step):
        raise ValueError("no number")

    with pytest.raises(ValueError, match="no number"):
        train(fail)
    assert not train.states

    def fail_later(step):
        signal.raise_signal(signal.SIGINT)
        raise ValueError("no number")

    with pytest.raises(KeyboardInterrupt):
        train(fail_later)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_training_in_another_thread_leaves_signals_alone(train):
    """Only the main thread may set handlers: trainings of a notebook or a server run elsewhere."""
    handlers, errors = [], []

    def work():
        try:
            with HeldSignals() as held:
                handlers.append((signal.getsignal(signal.SIGINT), held.pending))
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors
    assert handlers == [(signal.default_int_handler, [])]


def test_a_signal_that_acts_while_handlers_are_put_back_leaves_none_behind():
    """The first handler that is put back may be called at once: the others are put back all the same."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    held = HeldSignals()
    held.__enter__()
    held._undo.callback(signal.default_int_handler, signal.SIGINT, None)  # as a signal between two handlers would
    with pytest.raises(KeyboardInterrupt):
        held.__exit__()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
