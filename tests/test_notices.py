"""Being told to stop."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from cosup_jax.runtime.notices import Interrupted, Notices, Stopped, safepoint

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A call into C that no handler of Python's interrupts, as a step is one.
BUSY = """
import hashlib, signal
from cosup_jax.runtime.notices import Notices
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with Notices() as told:
    told.enter_loop(lambda: "nothing is kept")
    print("in the loop", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
"""


# The same in a mode without a loop, where a notice may also come just before.
STUCK = """
import contextlib, hashlib, signal
from cosup_jax.runtime import notices
notices._PATIENCE_S = 1
with notices.Notices("all is kept"):
    for _ in range(3):
        with contextlib.suppress(KeyboardInterrupt):
            print("told", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000_000)
"""


@pytest.fixture(autouse=True)
def own_signals():
    before = [signal.getsignal(number) for number in NUMBERS]
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else ignored where the tests run under nohup
    yield
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def test_a_notice_whose_exception_is_lost_still_stops_the_run():
    """Bugs: SIGTERM while JAX collects garbage, in a callback that swallows exceptions: the run
    goes on till it is killed; a second SIGTERM that kills the run while it saves."""
    before = signal.getsignal(signal.SIGINT)
    with Notices() as told:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        told.enter_loop(str)
        assert told.to_stop()
    signal.raise_signal(signal.SIGTERM)
    with Notices() as told:
        told.enter_loop(str)
        assert not told.to_stop()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert told.to_stop()
        told.leave_loop()
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) == before


def test_what_can_be_done_anew_is_left_at_a_safepoint():
    """Bugs: an evaluation that outlasts the seconds which a preempted machine has; one that is left
    where nobody waits for that."""
    with Notices() as told:
        told.enter_loop(str)
        with told.interruptible():
            safepoint()
            signal.raise_signal(signal.SIGTERM)
            with pytest.raises(Interrupted):
                safepoint()
        safepoint()


def test_a_mode_without_a_loop_stops_though_its_exception_is_lost(capfd):
    """Bugs: SIGTERM that JAX swallows, or that comes while somebody is asked for a question, so
    that the mode ends as if it were done; two lines for two notices."""
    with pytest.raises(Stopped) as stopped, Notices("all is kept"):
        for _ in range(2):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    assert stopped.value.number == signal.SIGTERM
    assert capfd.readouterr().err == "all is kept\n"


def test_work_that_trains_twice_is_told_to_stop_between(capfd):
    """Bugs: behind the first training the notices of that training answer, which nobody reads, or
    none does; a notice before its loop that ends as if it were Ctrl-C."""
    with pytest.raises(Stopped) as stopped, Notices("all is kept"):
        with Notices() as told:
            told.enter_loop(str)
        with contextlib.suppress(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert (stopped.value.number, stopped.value.said) == (signal.SIGTERM, True)
    assert capfd.readouterr().err == "all is kept\n"
    with pytest.raises(Stopped) as stopped, Notices("all is kept"), Notices():
        signal.raise_signal(signal.SIGTERM)
    assert (stopped.value.number, stopped.value.said) == (signal.SIGTERM, False)


@pytest.mark.parametrize("environ", [{}, {"COSUP_STOPPED_CODE": "75"}])
def test_a_mode_without_a_loop_does_not_wait_for_c(environ):
    """Bugs: an encode that ends without a line, or minutes later, as a program is compiled; a
    scheduler that is not told to start it again."""
    with subprocess.Popen(
        [sys.executable, "-c", STUCK],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environ,
    ) as process:
        assert process.stdout.readline() == "told\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20)[1] == "all is kept\n"
        assert process.returncode == int(environ.get("COSUP_STOPPED_CODE", 143))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_notice_is_answered_and_saves(number, capfd):
    """Bugs: a first Ctrl-C that ends the run; a lost connection that does."""
    with Notices() as told:
        told.enter_loop(str)
        signal.raise_signal(number)
        assert told.to_stop()
        said, until = "", time.monotonic() + 20
        while not said and time.monotonic() < until:
            said = capfd.readouterr().err
            time.sleep(0.01)
        assert said.startswith("stopping: finishing steps under way, then saving (Ctrl-C again")


def test_nohup_is_obeyed():
    """Bug: a run under nohup that ends with the connection."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Notices() as told:
        told.enter_loop(str)
        signal.raise_signal(signal.SIGHUP)
        assert not told.to_stop()


def test_a_second_ctrl_c_ends_a_long_step_at_once():
    """Bugs: nothing is printed till the step is over, and people press again; the second Ctrl-C
    ends in a traceback, or waits for the step."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "in the loop\n"
        process.send_signal(signal.SIGHUP)
        assert process.stderr.readline().startswith("stopping: finishing steps")
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "nothing is kept\n"
        assert process.returncode == 130
    finally:
        process.kill()
