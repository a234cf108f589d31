"""The machines for a job: estimates that follow the settings, and the page that explains them."""

import re

import pytest

from launch import __main__ as launch
from launch.estimate import estimate
from launch.targets.instance_types import OFFERED
from launch.targets.spec import load_config, load_target
from tests.conftest import PROJECT
from tests.launch.documents import instances_output
from trainer.common.errors import OK

FULL = ("experiment=dog_breeds", "data.root=x", "model.freeze=none")


@pytest.fixture
def shown(capsys):
    """The rows by machine."""

    def shown(*arguments: str) -> dict[str, list[str]]:
        assert launch.main(["instances", *arguments]) == OK
        lines = capsys.readouterr().out.split("\n\n")[1].splitlines()
        starts = [match.start() for match in re.finditer(r"\S+(?: \S+)*", lines[0])]
        rows = [
            [
                line[first:last].strip()
                for first, last in zip(starts, [*starts[1:], None], strict=True)
            ]
            for line in lines
        ]
        return {row[0].removeprefix("* "): row for row in rows}

    return shown


def test_the_estimate_is_the_arithmetic_that_the_page_explains():
    target = load_target([])
    config, _ = load_config(target, FULL)
    by_name = {
        (machine.name, machine.count): estimate(machine, config, 1000) for machine in OFFERED
    }
    assert by_name["ml.m5.2xlarge", 1].epoch == pytest.approx(1000 * 0.359 / 8)
    assert by_name["ml.m5.2xlarge", 4].epoch == pytest.approx(1000 * 0.359 / 8 / (4 * 0.93))
    assert by_name["g4dn.xlarge", 1].epoch == pytest.approx(1000 * 3 * 2 * 4.09e9 / (0.15 * 65e12))


def test_frozen_backbones_pay_once(shown):
    frozen, full = shown(), shown(*FULL)
    assert frozen["ml.m5.2xlarge"][5] != "-" and full["ml.m5.2xlarge"][5] == "-"
    assert frozen["ml.m5.2xlarge"][6] == "< 1 s" and "min" in full["ml.m5.2xlarge"][6]


def test_dollars_are_time_by_price(shown):
    row = shown(*FULL, "--pictures", "100000")["ml.m5.2xlarge"]
    assert row[4] == "0.461" and row[7] == f"${100000 * 0.359 / 8 / 3600 * 0.461:.2f}"


def test_an_unknown_network_has_no_estimate(capsys):
    assert launch.main(["instances", "model=small_cnn"]) == OK
    output = capsys.readouterr().out
    assert "No estimate for small_cnn: python -m trainer.doctor" in output and "0.526" in output


def test_the_page_shows_what_the_command_prints():
    page = (PROJECT / "docs" / "instances.md").read_text()
    assert f"```text\n{instances_output()}```\n" in page, "python -m tests.launch.documents"
