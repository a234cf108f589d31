"""Accounts that are not empty and new: a second region, and things of one's own that are used."""

import dataclasses
from collections.abc import Iterator

import pytest

from launch.cloud import s3
from launch.cloud.session import Aws
from launch.targets.spec import load_target
from tests.launch.conftest import CREDENTIALS, REGION, Cloud, running
from trainer.common.errors import MISTAKE, OK, UserError

OWN, PHOTOS = "company-ml", "company-photos"
FAST = ("--yes", "--every", "0.05")
NETWORK = ("target.subnet=subnet-0123456789abcdef0", "target.security_groups=sg-0123456789abcdef0")
KEY = "arn:aws:kms:us-east-1:123456789012:key/01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """With a foundation in a bucket of the company's, and pictures in another one."""
    with running(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        client = cloud.client("s3")
        for bucket in (OWN, PHOTOS):
            client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=OWN, Key="theirs", Body=b"1")
        client.put_object(Bucket=PHOTOS, Key="dogs/train/beagle/1.jpg", Body=b"1")
        launch(cloud, "up", f"target.bucket={OWN}", *FAST, f"PicturesBucket={PHOTOS}")
        yield cloud


def launch(cloud: Cloud, *words: str) -> str:
    code, printed = cloud.launch(*words)
    assert code == OK, printed
    return printed


def test_a_second_region_has_a_foundation_of_its_own(account):
    west = "target.region=us-west-2"
    launch(account, "up", west, *FAST)
    roles = {role["RoleName"] for role in account.client("iam").list_roles()["Roles"]}
    assert {"packhorse-training-us-east-1", "packhorse-training-us-west-2"} <= roles
    launch(account, "down", west, *FAST)
    roles = {role["RoleName"] for role in account.client("iam").list_roles()["Roles"]}
    assert "packhorse-training-us-east-1" in roles and "packhorse-training-us-west-2" not in roles


def test_a_job_takes_what_is_the_companys(account):
    own = (f"target.bucket={OWN}", "target.tags=team=vision,cost=42", *NETWORK)
    before = len(account.calls())
    launch(account, "submit", "target=sagemaker", *own, "name=own", f"target.kms_key={KEY}")
    job = account.client("sagemaker").describe_training_job(TrainingJobName="packhorse-own-1")
    assert job["OutputDataConfig"]["S3OutputPath"] == f"s3://{OWN}/runs/own/output"
    assert job["OutputDataConfig"]["KmsKeyId"] == KEY
    assert job["VpcConfig"]["Subnets"] == ["subnet-0123456789abcdef0"]
    tags = account.client("sagemaker").list_tags(ResourceArn=job["TrainingJobArn"])["Tags"]
    told = {tag["Key"]: tag["Value"] for tag in tags}
    assert told == {"team": "vision", "cost": "42", "project": "packhorse", "run": "own"}
    held = [
        call["parameters"].get("ExpectedBucketOwner")
        for call in account.calls()[before:]
        if call["service"] == "s3" and call["client"]
    ]
    assert held and set(held) == {"123456789012"}, "a bucket's name can be guessed"


def test_pictures_that_are_on_s3_are_read_where_they_lie(account):
    given = (f"target.bucket={OWN}", "data=folder", f"data.root=s3://{PHOTOS}/dogs")
    launch(account, "submit", "target=sagemaker", *given, "name=photos")
    job = account.client("sagemaker").describe_training_job(TrainingJobName="packhorse-photos-1")
    [channel] = job["InputDataConfig"]
    assert channel["DataSource"]["S3DataSource"]["S3Uri"] == f"s3://{PHOTOS}/dogs/"
    printed = launch(account, "plan", "target=ec2", *given, "name=machine", "--full")
    assert f"data=s3://{PHOTOS}/dogs\n" in printed and "missing" not in printed
    assert f"arn:aws:s3:::{PHOTOS}/dogs/*" in printed, "the role may read it, where up was told"
    changed = [
        call
        for call in account.calls()
        if call["client"]
        and call["parameters"].get("Bucket") == PHOTOS
        and not call["operation"].startswith(("List", "Get", "Head"))
    ]
    assert changed == []
    printed = launch(account, "plan", *given[:2], f"data.root=s3://{PHOTOS}/cats")
    assert f"there is nothing below s3://{PHOTOS}/cats/train/" in printed
    code, printed = account.launch("plan", *given[:2], "data.root=s3://Photos")
    assert code == MISTAKE and "allowed: s3://BUCKET/PREFIX" in printed


def test_a_bucket_in_another_region_is_named_before_anything_is_sent(account):
    """SageMaker takes none of another region, and EC2 would pay for each picture."""
    place = {"LocationConstraint": "eu-west-1"}
    account.client("s3").create_bucket(Bucket="company-eu", CreateBucketConfiguration=place)
    for words in (
        ["target.bucket=company-eu"],
        [f"target.bucket={OWN}", "data=folder", "data.root=s3://company-eu/dogs"],
    ):
        printed = launch(account, "plan", "target=sagemaker", "name=afar", *words)
        assert "missing: a bucket in us-east-1, where the machines are: s3://company-eu" in printed
        assert "give target.region=eu-west-1, or another bucket" in printed
        code, printed = account.launch("submit", "target=sagemaker", "name=afar", *words)
        assert code == MISTAKE and "s3://company-eu is in eu-west-1" in printed


def test_a_bucket_of_ones_own_is_never_made_nor_emptied(account):
    own = f"target.bucket={OWN}"
    printed = launch(account, "down", own, *FAST)
    assert f"leaves    s3://{OWN}" in printed
    s3 = account.client("s3")
    assert s3.get_object(Bucket=OWN, Key="theirs")["Body"].read() == b"1"
    assert s3.get_object(Bucket=PHOTOS, Key="dogs/train/beagle/1.jpg")["Body"].read() == b"1"


MISTAKES = {
    ("target=ec2", "target.tags=team"): "KEY=VALUE",
    ("target=ec2", "target.tags=project=other"): "Packhorse's own",
    ("target=ec2", "target.tags=Project=other"): "Packhorse's own",
    ("target=ec2", "target.tags=team=a,team=b"): "each KEY once",
    ("target=ec2", "target.tags=aws:team=a"): "begins with aws:",
    ("target=ec2", f"target.tags={'k' * 129}=a"): "keys of up to 128",
    ("target=ec2", "target.tags=" + ",".join(f"k{n}=v" for n in range(46))): "up to 45",
    ("target=ec2", "target.tags=team=<b>"): "letters, digits, spaces",
    ("target=sagemaker", "target.subnet=subnet-1"): "takes both or none",
    ("target=notebook", "target.security_groups=sg-1"): "takes both or none",
}


@pytest.mark.parametrize("words", MISTAKES, ids=lambda words: " ".join(words)[:60])
def test_what_does_not_go_together_is_refused(words):
    with pytest.raises(UserError, match=MISTAKES[words]):
        load_target(words)


def test_what_a_key_of_ones_own_encrypts_has_no_md5_as_its_etag(account, tmp_path, monkeypatch):
    """Pictures that are there are known by name and size, results held to what S3 says."""
    for name, value in (CREDENTIALS | {"AWS_ENDPOINT_URL": account.url}).items():
        monkeypatch.setenv(name, value)
    client, bucket = account.client("s3"), "company-keyed"
    client.create_bucket(Bucket=bucket)
    rule = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": KEY}
    encryption = {"Rules": [{"ApplyServerSideEncryptionByDefault": rule}]}
    client.put_bucket_encryption(Bucket=bucket, ServerSideEncryptionConfiguration=encryption)
    folder = tmp_path / "dogs"
    (folder / "train").mkdir(parents=True)
    (folder / "train/1.jpg").write_bytes(b"a picture")
    aws = Aws("packhorse", REGION, bucket)
    s3.write(aws, "source/code", b"")
    assert s3.has_own_key(aws, "source/code") and not s3.has_own_key(aws, "source/none")
    for _ in range(2):
        s3.upload_folder(aws, folder, "data/x/", is_encrypted=True)
    uploads = [
        call["parameters"]["Key"] for call in account.calls() if call["operation"] == "PutObject"
    ]
    assert uploads.count("data/x/train/1.jpg") == 1
    [(name, item)] = s3.listing(aws, "data/x/").items()
    assert item.etag != s3.etag(folder / name)
    s3.download(aws, {name: item}, tmp_path / "fetched")
    assert (tmp_path / "fetched" / name).read_bytes() == b"a picture"
    with pytest.raises(UserError, match="is not what S3 holds"):
        s3.download(aws, {name: dataclasses.replace(item, size=3)}, tmp_path / "other")
