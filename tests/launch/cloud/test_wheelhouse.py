"""What a job in a closed network installs: made from an index, and installed from without one."""

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest

from launch.cloud import s3, source, wheelhouse
from tests.launch.conftest import BUCKET, Cloud, founded
from trainer.common.errors import OK, UserError

MINOR = sys.version_info.minor
PYTHONS = (f"3.{MINOR}", f"3.{MINOR + 1}")
# What is published as source alone builds itself here: no setuptools is fetched for it.
BACKEND = """
import zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "sourced-3.0-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{name}", "w") as wheel:
        for path, text in FILES.items():
            wheel.writestr(zipfile.ZipInfo("sourced-3.0.dist-info/" + path), text)
    return name
"""


def files_of(name, version, needs=(), tag="py3-none-any"):
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    about += "".join(f"Requires-Dist: {each}\n" for each in needs)
    kind = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
    return {"METADATA": about, "WHEEL": kind, "RECORD": ""}


def put_wheel(folder, name, version, needs=(), tag="py3-none-any", more=""):
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file, text in files_of(name, version, needs, tag).items():
            wheel.writestr(f"{name}-{version}.dist-info/{file}", text)
        wheel.writestr(f"{name}.py", more)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project, and an index that has what it asks for."""
    index = tmp_path / "index"
    index.mkdir()
    compiled = "cp3{0}-cp3{0}-manylinux_2_28_x86_64"
    digests = {
        "plain==1.0": [put_wheel(index, "plain", "1.0", ["torch", "fast"])],
        "fast==2.0": [
            put_wheel(index, "fast", "2.0", tag=compiled.format(minor))
            for minor in (MINOR, MINOR + 1)
        ],
    }
    put_wheel(index, "fast", "2.1", tag=compiled.format(MINOR))
    put_wheel(index, "builder", "1")
    with tarfile.open(index / "sourced-3.0.tar.gz", "w:gz") as archive:
        contents = {
            "backend.py": f"FILES = {files_of('sourced', '3.0')!r}\n{BACKEND}",
            "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\n"
            "backend-path = ['.']\n",
            "PKG-INFO": files_of("sourced", "3.0")["METADATA"],
        }
        for name, text in contents.items():
            member = tarfile.TarInfo(f"sourced-3.0/{name}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    sdist = hashlib.sha256((index / "sourced-3.0.tar.gz").read_bytes()).hexdigest()
    digests["sourced==3.0"] = [sdist]
    made = tmp_path / "project"
    made.mkdir()
    (made / "pyproject.toml").write_text(
        "[build-system]\nrequires = ['builder']\n"
        "[project]\ndependencies = ['torch', 'plain', 'sourced']\n"
    )
    (made / "constraints.txt").write_text(
        "torch==9.9\ntorchvision==9.8\nplain==1.0\nfast==2.0\nsourced==3.0\n"
    )
    (made / "requirements.lock").write_text(
        "".join(
            f"{name} \\\n" + " \\\n".join(f"    --hash=sha256:{each}" for each in hashes) + "\n"
            for name, hashes in digests.items()
        )
    )
    monkeypatch.setattr(wheelhouse, "PYTHONS", PYTHONS)
    monkeypatch.setattr(wheelhouse, "SOURCE_ONLY", ("sourced",))
    monkeypatch.setattr(wheelhouse, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(s3, "DIGESTS", tmp_path / "digests")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    return made


def install(text, folder, tmp_path):
    """Let pip say what it would install by a container's requirements, from a folder of wheels."""
    asked = tmp_path / "requirements.txt"
    asked.write_text(text.replace("/opt/ml/input/data/wheels", str(folder)))
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "-r", str(asked)],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "HOME": str(tmp_path)},
    )


def test_it_has_all_but_pytorch_each_by_its_hash_and_pip_needs_nothing_else(
    project, tmp_path, monkeypatch
):
    name, lock = wheelhouse.made([], project)
    folder = wheelhouse.kept(name)
    names = [line.split("==")[0] for line in lock.splitlines()]
    assert names == ["builder", "fast", "plain", "sourced"], lock
    assert lock.count("--hash") == 5, "fast has a wheel for each Python"
    assert re.fullmatch(r"wheels-[0-9a-f]{16}", name)
    assert not [path for path in folder.iterdir() if path.suffix != ".whl"]

    text = source.from_wheels(lock, project)
    source.check_requirements(text)
    assert "builder" not in text, "a container doesn't install the project"
    done = install(text, folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Would install fast-2.0 plain-1.0 sourced-3.0" in done.stdout

    # Made once, and found by what it is made from; also what a killed one has left is no obstacle.
    (tmp_path / "kept/making-1").mkdir()
    with monkeypatch.context() as without:
        without.setattr(wheelhouse, "_pip", None)
        assert wheelhouse.made([], project) == (name, lock)
    # What was changed here since is made again, to the same bytes.
    for path in folder.glob("plain*"):
        path.write_bytes(b"damaged")
    assert wheelhouse.made([], project) == (name, lock)
    assert install(text, wheelhouse.kept(name), tmp_path).returncode == 0
    put_wheel(folder, "plain", "1.0", more="# another's")
    done = install(text, folder, tmp_path)
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr


def test_what_the_index_has_otherwise_is_refused_and_nothing_is_left(project, tmp_path):
    put_wheel(tmp_path / "index", "plain", "1.0", ["torch", "fast"], more="# another's")
    with pytest.raises(UserError, match=r"plain-1.0-py3-none-any.whl: the index gives other bytes"):
        wheelhouse.made([], project)
    (tmp_path / "index/sourced-3.0.tar.gz").unlink()
    with pytest.raises(UserError, match=r"pip wheel: .*sourced==3.0.*target.wheels=false"):
        wheelhouse.made([], project)
    assert list((tmp_path / "kept").iterdir()) == []
    (project / "requirements.lock").unlink()
    with pytest.raises(UserError, match="start this from a checkout"):
        wheelhouse.made([], project)


def test_pytorch_and_other_options_are_no_part_of_a_job(project):
    for line in ("torch==2.14.1 --hash=sha256:00", "--index-url http://example.org"):
        with pytest.raises(UserError):
            source.check_requirements(f"--no-index\n{line}\n")


# --- when it is used ---


@pytest.fixture
def account(tmp_path, monkeypatch):
    """An account, and a wheelhouse that is made in no time."""
    name = "wheels-0123456789abcdef"
    monkeypatch.setattr(wheelhouse, "KEPT", tmp_path / "kept")
    (tmp_path / "kept" / name).mkdir(parents=True)
    put_wheel(tmp_path / "kept" / name, "plain", "1.0")
    lock = wheelhouse.lock_of(tmp_path / "kept" / name)
    monkeypatch.setattr(wheelhouse, "made", lambda extras: (name, lock))
    with founded(tmp_path / "calls.jsonl") as cloud:
        yield cloud


def networks(cloud: Cloud) -> dict[str, str]:
    """Subnets by what is reached from them."""
    ec2 = cloud.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    made, tables = {}, {}
    for number, kind in enumerate(("closed", "open")):
        subnet = ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.9.{number}.0/24")["Subnet"]
        tables[kind] = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
        ec2.associate_route_table(RouteTableId=tables[kind], SubnetId=subnet["SubnetId"])
        made[kind] = subnet["SubnetId"]
    everywhere = {"DestinationCidrBlock": "0.0.0.0/0", "GatewayId": gateway}
    ec2.create_route(RouteTableId=tables["open"], **everywhere)
    ec2.create_vpc_endpoint(
        VpcId=vpc, ServiceName="com.amazonaws.us-east-1.s3", RouteTableIds=list(tables.values())
    )
    return made


def test_a_subnet_that_leads_nowhere_but_to_s3_is_taken_for_closed(account):
    places = networks(account)
    closed, public = (f"target.subnet={places[kind]}" for kind in ("closed", "open"))
    group = "target.security_groups=sg-0123456789abcdef0"
    what = "installs from the bucket, and asks no index of packages"
    for words, is_closed in {
        (closed,): True,
        (public, "target.public_ip=true"): False,
        (public, "target.public_ip=false"): True,
        (closed, "target.wheels=false"): False,
        (): False,
        ("target.wheels=true",): True,
        ("target=sagemaker", public, group): True,
    }.items():
        target = () if "target=sagemaker" in words else ("target=ec2",)
        code, printed = account.launch("plan", *target, *words)
        assert code == OK and (what in printed) is is_closed, (words, printed)
    code, printed = account.launch("plan", "target=ec2", "target.public_ip=false")
    assert "missing: a route to S3" in printed, "the default VPC leads to the internet by addresses"


def test_submit_uploads_it_once_and_every_attempt_installs_from_it(account):
    for target in ("ec2", "sagemaker"):
        words = (f"target={target}", "target.wheels=true", f"name=closed-{target}")
        code, printed = account.launch("submit", *words)
        assert code == OK, printed
    puts = [
        call["parameters"]["Key"] for call in account.calls() if call["operation"] == "PutObject"
    ]
    key = "data/wheels-0123456789abcdef/plain-1.0-py3-none-any.whl"
    assert puts.count(key) == 1
    job = account.client("sagemaker").describe_training_job(
        TrainingJobName="packhorse-closed-sagemaker-1"
    )
    [channel] = job["InputDataConfig"]
    assert channel["ChannelName"] == "wheels"
    place = channel["DataSource"]["S3DataSource"]["S3Uri"]
    assert place == f"s3://{BUCKET}/data/wheels-0123456789abcdef/"
    digest = next(each for each in puts if each.startswith("source/"))
    packed = account.client("s3").get_object(Bucket=BUCKET, Key=digest)["Body"].read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        listed = tar.extractfile("requirements.txt").read().decode()
        assert "wheels.lock" in tar.getnames() and listed.startswith("--no-index\n")
    # A retry knows it without the folder, which is another machine's.
    assert account.launch("stop", "closed-ec2", "--now")[0] == OK
    code, printed = account.launch("submit", "closed-ec2")
    assert code == OK, printed
    for number in (1, 2):
        noted = account.client("s3").get_object(
            Bucket=BUCKET, Key=f"runs/closed-ec2/attempts/{number}.request.json"
        )
        assert "wheels=wheels-0123456789abcdef" in noted["Body"].read().decode()
