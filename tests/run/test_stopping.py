"""Signals: every command ends cleanly, and a training run saves its last step first."""

import contextlib
import os
import signal
import time

import jax.numpy as jnp
import pytest

from disco_jax import main
from disco_jax.errors import Interrupted, Preempted
from disco_jax.run import hosts
from disco_jax.train import loop

SIGNALS = [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]


@pytest.fixture(autouse=True)
def terminal_signals():
    """The default handlers of a terminal; `nohup` and background jobs ignore some signals."""
    before = {
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Recorder:
    """A logger and store that records the steps."""

    def __init__(self):
        self.logged, self.saved = [], []

    def write(self, step, scalars):
        self.logged.append(step)

    def save(self, step, state, position, metrics):
        self.saved.append(step)

    def wait(self):
        pass


def looped(number, at, logger, checkpoints):
    """Runs ten steps and sends signal `number` during step `at`."""

    def batches():
        for step in range(1, 11):
            if step == at:
                os.kill(os.getpid(), number)
                time.sleep(0.01)
            yield {}, (0, step)

    def step(state, frozen, batch):
        return state, {"loss": jnp.zeros(1)}

    schedule = loop.Schedule(0, 10, 10, 1, log_steps=1, checkpoint_steps=100, verbose=False)
    return loop.run(step, {"x": jnp.zeros(1)}, {}, batches(), schedule, logger, checkpoints)


@pytest.mark.parametrize("number, code", SIGNALS)
@pytest.mark.parametrize("saves", [True, False])
def test_a_loop_stops_after_the_step_and_saves_it(number, code, saves, capsys):
    before = signal.getsignal(number)
    recorder = Recorder()
    with pytest.raises(Preempted) as stopped:
        looped(number, 3, recorder, recorder if saves else None)
    assert stopped.value.exit_code == code
    assert recorder.logged == [1, 2, 3] and recorder.saved == ([3] if saves else [])
    assert ("step 3 is saved" in str(stopped.value)) == saves
    assert signal.getsignal(number) == before
    assert ("Ctrl-C again" in capsys.readouterr().err) == (number == signal.SIGINT)


def test_a_second_ctrl_c_is_left_to_the_system(capsys):
    with hosts.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop(1) and stop.interrupted
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with hosts.stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not stop(1)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number, code", SIGNALS)
def test_a_command_ends_in_order_where_there_is_nothing_to_save(number, code, monkeypatch, capsys):
    cleared = []

    def work(*_):
        with contextlib.ExitStack() as stack:
            stack.callback(cleared.append, True)
            os.kill(os.getpid(), number)
            time.sleep(5)

    before = signal.getsignal(number)
    monkeypatch.setattr(main, "_start", work)
    assert main.main(["pretrain"]) == code
    message = capsys.readouterr().err
    assert message.startswith("disco-jax pretrain: Asked to stop.") and message.count("\n") == 1
    assert cleared and signal.getsignal(number) == before


def test_the_codes_are_those_of_the_help(capsys):
    assert (Preempted.exit_code, Interrupted.exit_code) == (75, 130)
    main.main(["--help"])
    assert "75 stopped by SIGTERM or SIGHUP, 130 stopped by Ctrl-C" in capsys.readouterr().out
