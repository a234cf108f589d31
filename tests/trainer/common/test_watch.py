"""A slow death is seen, and a machine that sleeps is none."""

import threading

import pytest

from tests.conftest import wait_for
from trainer.common import watch as watch_module
from trainer.common.console import ProgressBar
from trainer.common.interrupt import Stop
from trainer.common.watch import SLOW, Idle, Watch, on_stall, stacks, watch


def idle_for(idle: Idle, seconds: float) -> bool:
    """Whether it is too long, when somebody looks at each tick."""
    return any(idle.looked(idle.tick) for _ in range(round(seconds / idle.tick)))


def test_only_what_is_watched_must_give_signs():
    watched = Watch()
    idle = Idle(watched, 600)
    assert not idle_for(idle, 10_000)
    with watched.over():
        assert not idle_for(idle, 599)
        watched.sign()
        assert not idle_for(idle, 599)
        with watched.over(SLOW):
            assert not idle_for(idle, 600 * SLOW - 2)
        assert not idle_for(idle, 599) and idle_for(idle, 2)
    assert not idle_for(idle, 10_000)


@pytest.mark.parametrize("slept", [60, 3600, 1e6])
def test_a_machine_that_sleeps_is_no_stall(slept):
    """A laptop's lid, SIGSTOP, a clock that jumps: whoever looks was asleep too."""
    watched = Watch()
    idle = Idle(watched, 600)
    with watched.over():
        assert not idle_for(idle, 500)
        for _ in range(20):
            assert not idle.looked(slept)
        assert idle_for(idle, 100)  # the time before and after it counts


def signs_of(work) -> int:
    before = watch.signs
    work()
    return watch.signs - before


def test_to_look_at_the_flag_and_to_show_progress_are_signs_of_life():
    assert watch.allowed is None
    with ProgressBar("work", 2) as bar:
        assert watch.allowed == 1
        assert signs_of(bar.advance) == 1
        with ProgressBar("one piece", 1):
            assert watch.allowed == SLOW
        assert watch.allowed == 1
    bar.close()  # again
    assert watch.allowed is None
    assert signs_of(Stop().check) == signs_of(Stop().asked) == 1


@pytest.mark.parametrize("seconds", [0.0, 0.01])
def test_a_stall_is_acted_upon_once(seconds):
    acted = []
    with on_stall(seconds, lambda: acted.append(stacks())), watch.over():
        assert wait_for(lambda: acted, 0.5 if seconds == 0 else 600) == (seconds > 0)
    if seconds:
        (said,) = acted
        assert "test_a_stall_is_acted_upon_once" in said and watch_module.__file__ in said
    assert wait_for(lambda: "watch" not in [each.name for each in threading.enumerate()])
