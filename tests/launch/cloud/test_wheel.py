"""An installed package plans and sends what a checkout does."""

import hashlib
import subprocess
import sys
import zipfile

import pytest

from launch.cloud import source
from tests.conftest import PROJECT

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/dogs/serving:1"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, unpacked as an installer does. It is built from a copy: setuptools leaves files."""
    directory = tmp_path_factory.mktemp("wheel")
    copy = directory / "project"
    with zipfile.ZipFile(directory / "project.zip", "w") as archive:
        for name in packed():
            archive.write(PROJECT / name, name)
    zipfile.ZipFile(directory / "project.zip").extractall(copy)
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", f"--wheel-dir={directory}", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    [wheel] = directory.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(directory / "installed")
    return directory / "installed"


def packed():
    """The names of what a wheel is built from."""
    others = [*PROJECT.glob("serving/deploy/*.py"), *PROJECT.glob("launch/python/packhorse/*.py")]
    return sorted({*source.files(), *(str(path.relative_to(PROJECT)) for path in others)})


def run(installed, directory, *command):
    """Standard output of a module of the installed package, started in an empty directory."""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(directory),
        "PYTHONPATH": str(installed),
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_plans_a_job_and_shows_the_trainers_settings(installed, tmp_path):
    assert "g4dn.xlarge" in run(installed, tmp_path, "launch", "plan", "target=ec2")
    assert "small_cnn" in run(installed, tmp_path, "trainer", "--cfg", "job")
    assert "together" in run(
        installed, tmp_path, "serving", "plan", "s3://a/model.tar.gz", "--image", IMAGE
    )


def test_it_sends_the_same_bytes_as_a_checkout(installed, tmp_path):
    (tmp_path / "digest.py").write_text(
        "import hashlib; from launch.cloud import source; "
        "print(source.__file__, hashlib.sha256(source.build(['timm'])).hexdigest())"
    )
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-P", str(tmp_path / "digest.py")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    file, digest = done.stdout.split()
    assert file.startswith(str(installed)), done.stderr
    assert digest == hashlib.sha256(source.build(["timm"])).hexdigest()
