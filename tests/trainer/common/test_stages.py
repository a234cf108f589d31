import pytest

from trainer.common import stages
from trainer.common.stages import START, Stages


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved: clock[0] is its time."""
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    return now


def test_each_second_belongs_to_one_stage_and_the_outer_one_of_two(clock):
    spent = Stages(before=2.0)
    clock[0] += 1
    with spent.of("training"):
        clock[0] += 4
        with spent.of("features"):
            clock[0] += 8
        clock[0] += 16
    with pytest.raises(ValueError, match="ends it"), spent.of("package"):
        clock[0] += 32
        raise ValueError("what ends it is no matter")
    clock[0] += 64
    assert spent.seconds() == {START: 67.0, "training": 28.0, "package": 32.0}
    with spent.of("training"):  # once more
        clock[0] += 128
        assert spent.seconds()["training"] == 156.0


def test_what_earlier_starts_took_counts_too(clock):
    spent = Stages()
    spent.go_on_from({"recipe": 5.0, START: 1.0}, 2)
    clock[0] += 2
    with spent.of("training"):
        clock[0] += 4
    assert spent.seconds() == {START: 2.0, "training": 4.0}
    assert spent.in_all() == {START: 3.0, "training": 4.0, "recipe": 5.0}
    assert spent.starts == 3


def test_a_process_knows_when_it_began():
    assert 0 <= stages.since_start() < stages.LONGEST_START


def test_a_process_that_does_one_work_after_another_counts_each_from_its_own_beginning(
    clock, monkeypatch
):
    monkeypatch.setattr(stages, "_begun", [])
    stages.begin()
    clock[0] += 3
    assert stages.since_start() == 3
    stages.begin()
    assert stages.since_start() == 0
