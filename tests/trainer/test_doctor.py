"""The doctor as a process: what it says of the machine, of a run, and of mistakes."""

import os
import re
import shutil

import pytest

from tests.conftest import run_module
from trainer.common import programs
from trainer.doctor import Measured, limited_by

TINY = (
    "data=folder",
    "model=small_cnn",
    "data.size=16",
    "data.resize=16",
    "train.batch_size=8",
    "platform=local",
    "platform.cache=cache",
)


def doctor(cwd, *arguments, **environment):
    """Its exit code and what it printed."""
    return run_module(cwd, "trainer.doctor", *arguments, "--seconds=0.4", **environment)


def facts(said):
    """The lines `name   value` of what it printed."""
    return dict(re.findall(r"^  (\S.*?\S)  +(\S.*)$", said, re.MULTILINE))


def test_it_predicts_a_run_and_begins_none(tmp_path, pictures):
    code, said = doctor(tmp_path, *TINY, f"data.root={pictures}", "train.epochs=5")
    assert code == 0, said
    told = facts(said)
    assert re.fullmatch(r"[\d.]+ s: [\d.]+ s training, [\d.]+ s evaluation", told["an epoch"])
    assert told["all epochs"].endswith(" for 5")
    assert "not on EC2" in told["instance"] and "none found" in told["AWS credentials"]
    assert "frozen backbone" not in told
    assert all(name in told for name in programs.missing())
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # no run
    assert list((tmp_path / "cache").iterdir()) == []  # no pixels left


def test_a_frozen_backbone_costs_once(tmp_path, pictures):
    code, said = doctor(
        tmp_path, *TINY, f"data.root={pictures}", "model.freeze=backbone", "model.cached_views=3"
    )
    assert code == 0, said
    told = facts(said)
    assert "limited by the frozen backbone" in told["once, before"]
    assert told["limited by"] in (
        "the head's steps",
        "reading pictures",
    )  # as busy as this machine is


@pytest.mark.parametrize(
    ("wait", "extract", "verdict"),
    [
        (0.0, None, "the network's steps"),
        (0.1, None, "the network's steps"),
        (0.11, None, "reading pictures"),
        (0.0, 50.0, "the head's steps"),
        (0.9, 50.0, "reading pictures"),
    ],
)
def test_what_limits_a_run_is_judged_by_what_was_measured(wait, extract, verdict):
    rates = dict.fromkeys(
        ("decode", "picture_bytes", "load", "train", "evaluate", "write", "copy"), 1.0
    )
    assert limited_by(Measured(**rates, link=None, wait=wait, extract=extract)) == verdict


def test_it_asks_an_ec2_machine_for_its_type(tmp_path, pictures, metadata):
    metadata.answers = {
        "instance-type": "g4dn.xlarge",
        "iam/security-credentials/": "packhorse-ec2",
    }
    code, said = doctor(
        tmp_path,
        *TINY,
        f"data.root={pictures}",
        AWS_EC2_METADATA_SERVICE_ENDPOINT=os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"],
    )
    assert code == 0, said
    assert (
        facts(said)["instance"] == "g4dn.xlarge"
        and "of the instance's role" in facts(said)["AWS credentials"]
    )


def test_settings_that_cost_time_are_pointed_out(tmp_path, pictures):
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text("")
    overrides = (
        "model.freeze=backbone",
        "model.cached_views=null",
        "train.channels_last=false",
        "data.cache=none",
    )
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures/train/loose.png").write_bytes(b"")
    (tmp_path / "pictures/train/circle/cut.png").write_bytes(b"no picture")
    code, said = doctor(tmp_path, *TINY, "data.root=pictures", *overrides)
    assert code == 0, said
    assert "left out: 1 that can't be used, 1 loose (in no class folder)\n" in said
    assert not list(tmp_path.rglob("quarantine.txt"))
    assert "model.cached_views=2" in said and "train.channels_last=true" in said
    assert (
        facts(said)["packed pixels"] == "none"
        and ".aws/credentials" in facts(said)["AWS credentials"]
    )


MISTAKES = {
    "optim.lr=-1": "optim.lr=-1",
    "data.root=missing": "missing",
    "optim.lrr=1": "did you mean",
    "experiment=dog_bread": "did you mean",
    "+optim.eps=1": "optim.eps",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, pictures, override):
    code, printed = doctor(tmp_path, *TINY, f"data.root={pictures}", override)
    assert (
        code == 2 and MISTAKES[override] in printed.splitlines()[-1] and "Traceback" not in printed
    )
