"""What the command line means: the kind of machine, the trainer's settings for the job, and the
names that follow from them.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile

import pytest

from launch.cloud import source
from launch.planning import described, missing, prepare
from launch.targets.base import NAMES, RUN, Spec, fit, targets
from launch.targets.sagemaker import for_job
from launch.targets.spec import (
    load_config,
    load_target,
    pictures_name,
    run_id,
    split_overrides,
    weights_name,
)
from trainer.common.errors import UserError


def make_spec(*arguments: str, **changes: object) -> Spec:
    targets, overrides = split_overrides(arguments)
    target = load_target(targets)
    config, data = load_config(target, overrides)
    run = run_id(target, config, data, overrides)
    spec = Spec(
        target,
        config,
        overrides,
        run,
        account="123456789012",
        region="eu-west-1",
        data=data,
        source="ab" * 32,
        revision=None,
    )
    return dataclasses.replace(spec, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_every_target_composes_and_is_of_its_type(name):
    target = load_target([f"target={name}"])
    assert type(target) is targets()[name].config and target.name == name


def test_overrides_are_told_apart():
    ours, theirs = split_overrides(
        ["target=tuner", "target.spot=true", "sweep=head", "optim.lr=1e-3", "+x=target=1"]
    )
    assert ours == ["target=tuner", "target.spot=true"]
    assert theirs == ("sweep=head", "optim.lr=1e-3", "+x=target=1")


MISTAKES = {
    "target=ec3": ["target=ec3", "notebook", "tuner"],
    "target.spott=true": ["target.spott", "did you mean target.spot"],
    "target.hours=0": ["target.hours=0", "above 0 and at most 120"],
    "target.hours=long": ["target.hours=long", "float"],
    "target.project=My": ["target.project=My", "lower-case"],
    "target.disk_gb=10": ["target.disk_gb=10", "at least 75"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_what_is_allowed(override):
    with pytest.raises(UserError) as error:
        load_target([override])
    assert all(part in str(error.value) for part in MISTAKES[override]), error.value
    assert "\n" not in str(error.value)


def test_a_spot_job_must_have_time_to_wait():
    with pytest.raises(UserError, match=r"allowed: target\.wait_hours >= target.hours"):
        load_target(["target=sagemaker", "target.spot=true", "target.hours=20"])


def test_pictures_lie_where_the_job_finds_them(tmp_path):
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs/1.jpg").write_bytes(b"1")
    typed, given = (
        (["data=folder", "data.root=/mnt/dogs"], None),
        (["data=folder"], tmp_path / "dogs"),
    )
    for name, root in (
        ("ec2", "/opt/dlami/nvme/data/{}"),
        ("sagemaker", "/opt/ml/input/data/training"),
    ):
        target = load_target([f"target={name}"])
        for (overrides, folder), expected in (
            (typed, "dogs"),
            (given, pictures_name(tmp_path / "dogs")),
        ):
            config, data = load_config(target, overrides, folder)
            assert (config.data.root, data, config.platform.name) == (
                root.format(expected),
                expected,
                name,
            )
    digested = pictures_name(tmp_path / "dogs")
    cases = (
        (["data.root=/mnt/dogs"], None, "dogs", "auto"),
        ([], tmp_path / "dogs", digested, "auto"),
        (["experiment=dog_breeds"], tmp_path / "dogs", digested, "resnet50"),
    )
    for overrides, folder, expected, model in cases:
        config, data = load_config(load_target([]), overrides, folder)
        assert (config.data.source, data, config.model.name) == ("folder", expected, model)
    with pytest.raises(UserError, match="--data DIR"):
        load_config(load_target([]), ["data=folder"])
    with pytest.raises(UserError, match="give data=folder"):
        load_config(load_target([]), ["data=fashion_mnist"], tmp_path / "dogs")
    with pytest.raises(UserError, match="in one folder"):
        load_config(load_target([]), ["data=folder", "data.root=x", "data.train=/elsewhere"])


def test_a_folder_of_weights_travels_as_the_pictures_do(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: b"")
    folder = tmp_path / "closed"
    folder.mkdir()
    for name, root in (
        ("ec2", "/opt/dlami/nvme/data/{}"),
        ("sagemaker", "/opt/ml/input/data/weights"),
        ("tuner", "/opt/ml/input/data/weights"),
    ):
        (folder / "resnet18.pth").write_bytes(b"1")
        target = load_target([f"target={name}"])
        overrides = ["data=folder", "data.root=dogs", f"model.weights_dir={folder}"]
        if name == "tuner":
            overrides.append("sweep=lr_batch")
        plan, place = prepare(None, target, overrides), weights_name(folder)
        assert place == plan.spec.weights and place.startswith("closed-")
        assert plan.spec.config.model.weights_dir == plan.spec.weights_root == root.format(place)
        assert not missing(None, plan, None)
        uploads = described(None, plan, None, "")["uploads"]
        assert uploads["weights"] == f"s3://{plan.spec.bucket}/data/{place}"
        sent = json.dumps([request.parameters for request in plan.requests])
        assert place in sent
        if name == "ec2":
            assert f"model.weights_dir={plan.spec.weights_root}" in sent
        else:
            assert str(folder) not in sent
        # With other weights it is another run.
        (folder / "resnet18.pth").write_bytes(b"2")
        after = prepare(None, target, overrides).spec
        assert after.run == plan.spec.run
        assert after.identity["weights"] != plan.spec.identity["weights"]
    with pytest.raises(UserError, match=r"weights_dir=no/such: there is no such folder"):
        load_config(load_target([]), ["data=folder", "data.root=x", "model.weights_dir=no/such"])
    given = "model.weights_dir=/opt/ml/input/data/training/weights"  # among the pictures
    config, _ = load_config(load_target([]), ["data=folder", "data.root=x", given])
    assert f"model.weights_dir={config.model.weights_dir}" == given
    assert for_job([given, f"model.weights_dir={folder}"]) == [given]


def test_a_table_of_labels_lies_among_the_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dogs/a/1.jpg", "dogs/sub/labels.csv", "labels.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    dogs = tmp_path / "dogs"
    config, _ = load_config(load_target([]), ["data.labels=sub/labels.csv"], dogs)
    assert config.data.labels == "sub/labels.csv"
    for given, allowed in (
        ("dogs/sub/labels.csv", "sub/labels.csv"),
        (f"{dogs}/sub/labels.csv", "sub/labels.csv"),
        ("labels.csv", "labels.csv"),
        ("/elsewhere/labels.csv", "labels.csv"),
    ):
        with pytest.raises(UserError, match=rf"put it into {dogs}, .*data.labels={allowed}$"):
            load_config(load_target([]), [f"data.labels={given}"], dogs)


def test_code_of_ones_own_travels_with_the_source(tmp_path, monkeypatch):
    """A file under its content's name, a module under its own, as an entry point stands for it."""
    tarball = source.build()
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: tarball)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    about = "kennel-1.dist-info"
    for name, text in {
        "mine.py": "network = 1",
        "site/kennel/__init__.py": "raise SystemExit('planning imports it')",
        "site/kennel/sub/dogs.py": "loss = 1",
        f"site/{about}/METADATA": "Metadata-Version: 2.1\nName: kennel\nVersion: 1\n",
        f"site/{about}/entry_points.txt": "[packhorse]\nfocal = kennel.sub.dogs:Focal\n",
        "site/launch/x.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    package = {"kennel/__init__.py", "kennel/sub/dogs.py"}
    digest = hashlib.sha256(b"network = 1").hexdigest()[:16]
    data = ["data.root=dogs"]
    for words, sent, travels in (
        (["model.code=mine.py"], f"own/{digest}.py", {f"own/{digest}.py"}),
        (["model.code=focal"], "kennel.sub.dogs:Focal", package),
        (["data.labels=kennel.sub.dogs"], "kennel.sub.dogs", package),
        (["model.code=/opt/ml/input/data/training/mine.py"], "training/mine.py", set()),
    ):
        for target in ("ec2", "sagemaker"):
            plan = prepare(None, load_target([f"target={target}"]), [*data, *words])
            with tarfile.open(fileobj=io.BytesIO(plan.source)) as tar:
                names = set(tar.getnames())
            with tarfile.open(fileobj=io.BytesIO(tarball)) as tar:
                assert names - set(tar.getnames()) == travels
            assert sent in json.dumps([request.parameters for request in plan.requests])
            assert plan.spec.source == hashlib.sha256(plan.source).hexdigest()
            assert not missing(None, plan, None)
            again = prepare(None, load_target([f"target={target}"]), [*data, *words])
            assert again.source == plan.source
    before = prepare(None, load_target([]), [*data, "model.code=mine.py"]).spec
    (tmp_path / "mine.py").write_text("network = 2")
    assert prepare(None, load_target([]), [*data, "model.code=mine.py"]).spec.run != before.run
    with pytest.raises(UserError, match="a job has launch of Packhorse itself; give your module"):
        source.with_files(tarball, {"launch/x.py": tmp_path / "site/launch/x.py"})


def test_the_run_of_a_table_is_found_again_from_any_directory(tmp_path, monkeypatch):
    words = ("target=ec2", "data.root=dogs", "data.labels=labels.csv")
    here = make_spec(*words).run
    monkeypatch.chdir(tmp_path)
    assert make_spec(*words).run == here != make_spec(*words[:2]).run


def test_what_a_job_cannot_have_is_refused_before_it_is_read(tmp_path):
    (tmp_path / "dogs.zip").touch()
    with pytest.raises(UserError, match=r"dogs.zip: a job takes a folder of pictures, not an arch"):
        pictures_name(tmp_path / "dogs.zip")
    (tmp_path / "a").mkdir()
    (tmp_path / os.fsdecode(b"a/caf\xe9.jpg")).touch()
    with pytest.raises(UserError, match=r"caf\\xe9.jpg is not named in UTF-8"):
        pictures_name(tmp_path)


def test_pictures_are_named_by_all_that_is_uploaded_of_them_and_by_nothing_else(tmp_path):
    def name_of(folder: str, files: dict[str, bytes]) -> str:
        for path, content in files.items():
            (tmp_path / folder / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / path).write_bytes(content)
        return pictures_name(tmp_path / folder)

    files = {"train/a/1.jpg": b"1", "train/b/2.jpg": b"2"}
    name = name_of("here/My dogs", files)
    assert re.fullmatch(r"My-dogs-[0-9a-f]{8}-[0-9a-f]{16}", name) and name == fit(name, RUN)
    assert (
        name_of(
            "there/My dogs",
            {**files, ".DS_Store": b"x", "train/a/.1.jpg.swp": b"x", "train/a/@eaDir/1.jpg": b"x"},
        )
        == name
    ), "hidden files stay here"
    others = {
        "content": files | {"train/b/2.jpg": b"3"},
        "swapped": {"train/a/1.jpg": b"2", "train/b/2.jpg": b"1"},
        "renamed": {"train/a/1.jpg": b"1", "train/b/3.jpg": b"2"},
        "another class": {"train/a/1.jpg": b"1", "train/a/2.jpg": b"2"},
        "one more": files | {"train/c/empty.jpg": b""},
        "one less": {"train/a/1.jpg": b"1"},
    }
    names = {what: name_of(f"{what}/My dogs", changed) for what, changed in others.items()}
    assert len({name, *names.values()}) == 1 + len(others), names
    assert len(name_of(f"long/{'n' * 200}", files)) == RUN


def test_the_run_is_found_again_from_any_directory_and_told_apart_by_what_decides_it(
    tmp_path, monkeypatch
):
    here = make_spec("target=ec2").run
    monkeypatch.chdir(tmp_path)
    assert make_spec("target=ec2").run == here
    assert make_spec("target=ec2", "target.spot=true", "target.hours=2").run == here, (
        "where and how long is not what"
    )
    others = [
        ("target=sagemaker",),
        ("optim.lr=0.5",),
        ("data=folder", "data.root=/a/dogs"),
        ("data=folder", "data.root=/a/cats"),
    ]
    assert len({here, *(make_spec(*other).run for other in others)}) == 5
    assert (
        make_spec("data=folder", "data.root=/a/dogs").run
        == make_spec("data=folder", "data.root=/b/dogs").run
    )
    assert (
        make_spec("name=My run").run
        == fit("My run", RUN)
        != make_spec("name=My-run").run
        == "My-run"
    )


@pytest.mark.parametrize("target", NAMES)
def test_names_are_as_long_as_aws_allows(target):
    spec = make_spec(
        f"target={target}", f"name={'x.' * 40}", "target.project=a-project-of-twentyy", attempt=123
    )
    limit = 32 if target == "tuner" else 63  # botocore's sagemaker model
    assert (
        re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*", spec.job_name) and len(spec.job_name) <= limit
    )
    assert spec.job_name.endswith("-123") and len(spec.run) <= RUN
    assert len(spec.bucket) <= 63


def test_arns_follow_the_partition():
    assert make_spec().role("ec2") == "arn:aws:iam::123456789012:role/packhorse-ec2-eu-west-1"
    assert make_spec(region="cn-north-1").role("training").startswith("arn:aws-cn:iam::")
    assert make_spec().uri("runs", "x") == "s3://packhorse-123456789012-eu-west-1/runs/x"
