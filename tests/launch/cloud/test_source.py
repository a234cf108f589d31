"""The source tarball: the same bytes for the same files, enough to train with, and no more."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile

import pytest

from launch.cloud import source
from tests.conftest import PROJECT
from trainer.common.errors import UserError


@pytest.fixture
def project(tmp_path):
    """A copy of what the tarball is made of."""
    copy = tmp_path / "project"
    for name, path in source.files().items():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return copy


def members(data):
    return {
        member.name: member
        for member in tarfile.open(fileobj=io.BytesIO(data), mode="r:gz").getmembers()
    }


def test_the_bytes_depend_on_the_files_alone(project):
    first = source.build(project=project)
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
    (project / "trainer/__pycache__").mkdir(exist_ok=True)
    (project / "trainer/__pycache__/x.pyc").write_bytes(b"x")
    (project / "notes.txt").write_text("not for a job")
    assert source.build(project=project) == first
    (project / "trainer/common/errors.py").write_text(
        (project / "trainer/common/errors.py").read_text() + "\n"
    )
    assert source.build(project=project) != first


def test_it_holds_what_a_job_needs_and_no_more():
    found = members(source.build())
    assert {
        "trainer/__main__.py",
        "trainer/data/fashion_mnist_mini.npz",
        "conf/config.yaml",
        "serving/adapters/toolkit.py",
        "launch/cloud/hyperparameters.py",
    } <= found.keys()
    assert (
        found[".ci/setup"].mode == 0o755 and found["launch/local/container_entry.py"].mode == 0o644
    )
    assert not [
        name
        for name in found
        if name.startswith(("tests/", "docs/", ".git/", "runs/"))
        or name == "setup.py"
        or "__pycache__" in name
    ]
    assert {(member.mtime, member.uid, member.gname) for member in found.values()} == {(0, 0, "")}


def test_it_trains_where_nothing_else_of_the_project_is(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(source.build()), mode="r:gz") as tar:
        tar.extractall(tmp_path, filter="data")
    code = (
        "import trainer, sys; from trainer.__main__ import main; "
        "print('from', trainer.__file__); sys.argv[1:] = ['--help']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert f"from {tmp_path}" in done.stdout and "optim.lr" in done.stdout.replace(
        "\n  lr", "optim.lr"
    ), done.stdout + done.stderr


def test_requirements_leave_the_images_pytorch_alone():
    lines = source.requirements([]).splitlines()
    names = {re.split(r"\W", line)[0] for line in lines}
    assert {"hydra", "onnx", "torchmetrics"} <= names and names.isdisjoint({"torch", "torchvision"})
    assert "hydra-core==1.3.8" in lines
    assert any(
        line.startswith("numpy>=") for line in lines
    )  # the image's own, where it is new enough
    assert "timm==" in source.requirements(["timm"])


def test_extras_follow_from_the_settings(configure):
    assert source.extras(configure()) == []
    assert source.extras(
        configure("model.name=timm/resnet18", "train.tensorboard=true", "data=flowers102")
    ) == ["timm", "tensorboard", "flowers102"]


def test_a_job_reads_heic_where_such_pictures_are_uploaded(configure):
    assert source.extras(configure(), ["a/1.jpg", "a/2.HEIC"]) == ["heic"]
    assert source.extras(configure(), ["a/1.jpg", "a/2.avif", "heic"]) == []
    assert "pillow-heif==" in source.requirements(["heic"])


def repacked(change):
    """A tarball with something changed: name -> bytes, None to leave it out, or a TarInfo."""
    new = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(source.build())) as old,
        tarfile.open(fileobj=new, mode="w:gz") as tar,
    ):
        for member in old.getmembers():
            if member.name not in change:
                tar.addfile(member, old.extractfile(member))
        for name, data in change.items():
            if isinstance(data, tarfile.TarInfo):
                tar.addfile(data)
            elif data is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return new.getvalue()


def link(name, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conf/config.yaml": None}, "conf/config.yaml is missing; bring it back"),
        (
            {"setup.py": b""},
            "with a setup.py SageMaker's toolkit starts a package instead of the trainer",
        ),
        ({"trainer/x": link("trainer/x", "/etc/passwd")}, "trainer/x is a link"),
        ({"../x.py": b""}, "../x.py is a link, no file, or lies outside"),
        (
            {"trainer/large.bin": bytes(51 * 2**20)},
            "of which trainer/large.bin has 51; allowed: 50; move data out",
        ),
        (
            {"requirements.txt": b"hydra core 1.3\n"},
            "requirements.txt: hydra core 1.3: pip can't read this requirement",
        ),
        ({"requirements.txt": b"torch==2.14\n"}, "torch==2.14 would replace what the image brings"),
    ],
)
def test_what_the_container_would_refuse_is_refused_here(change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        source.check(repacked(change))


def test_no_tarball_at_all():
    with pytest.raises(UserError, match=r"not a \.tar\.gz"):
        source.check(b"PK\x03\x04")


def test_a_link_in_the_project_is_named(project):
    (project / "trainer/linked.py").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"linked.py: a link, which a job's container leaves out"):
        source.build(project=project)


def test_the_entry_needs_the_standard_library_only():
    code = (
        "import sys, json; before = set(sys.modules); import launch.local.container_entry; "
        "print(json.dumps(list(sys.modules.keys() - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in json.loads(done.stdout)} - set(
        sys.stdlib_module_names
    ) == {"launch", "trainer"}
