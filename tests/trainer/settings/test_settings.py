"""Nearly every setting turned on at once in real runs and requests, from the command line on.

What each alone changes is in test_wiring.py.
"""

import ast
import dataclasses
import json
import shlex

import pytest
import torch

from launch.planning import prepare
from launch.targets.base import targets
from launch.targets.spec import load_target
from serving.handler import Settings
from tests.conftest import PROJECT, run_trainer
from trainer.common.errors import OK
from trainer.network.build import build
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings.words import readable

# Each run has all of these at values that are not the defaults. That each setting is seen where it
# acts, test_wiring.py holds.
RUNS = {
    "plain": (
        "seed=3",
        "data.resize=20",
        "data.size=16",
        "data.interpolation=bicubic",
        "data.workers=2",
        "data.cache=packed",
        "data.cache_gb=1",
        "data.max_broken=0.5",
        "data.augment.scale=[0.5,1.0]",
        "data.augment.ratio=[0.8,1.25]",
        "data.augment.flip=false",
        "data.augment.trivial=true",
        "data.augment.vertical_flip=true",
        "data.augment.rotation=10",
        "data.augment.jitter=[0.1,0.2,0.3,0.1]",
        "data.augment.randaugment=1",
        "data.augment.magnitude=5",
        "data.augment.erasing=0.5",
        "data.augment.mixup=0.2",
        "data.augment.cutmix=1",
        "model.head_hidden=8",
        "model.norm_stats=keep",
        "model.unfreeze_epochs=1",
        "data.valid=pictures/valid",
        "model.mean=[0.4,0.5,0.6]",
        "model.std=[0.2,0.3,0.4]",
        "optim=sgd",
        "optim.name=sgd",
        "optim.lr=0.01",
        "optim.head_lr=0.02",
        "optim.layer_decay=0.8",
        "optim.weight_decay=0",
        "optim.momentum=0.5",
        "optim.schedule=step",
        "optim.step_epochs=1",
        "optim.step_factor=0.5",
        "optim.warmup_epochs=0.5",
        "train.epochs=3",
        "train.batch_size=6",
        "train.accumulate=2",
        "train.label_smoothing=0",
        "train.clip_norm=1",
        "train.ema_decay=null",
        "train.monitor=valid_top1",
        "train.patience=2",
        "train.device=cpu",
        "train.precision=fp32",
        "train.channels_last=false",
        "train.deterministic=false",
        "train.threads=1",
        "train.processes=1",
        "train.hosts=1",
        "train.timeout_seconds=100",
        "train.stall_seconds=500",
        "train.on_nan=rewind",
        "checkpoint.minutes=1",
        "checkpoint.max_cost=0.5",
        "checkpoint.keep=3",
        "package.int8=true",
        "package.max_drop=1",
        "platform.run_dir=it's/my run",  # a folder's name may hold anything
        "platform.checkpoints=$HOME/saved",
        "platform.package=~/made here/model.tar.gz",
    ),
    "frozen backbone": (
        "model.freeze=backbone",
        "model.cached_views=3",
        "data.size=16",
        "data.resize=16",
        "data.cache=none",
        "optim.schedule=constant",
        "optim.warmup_epochs=0",
        "train.epochs=2",
        "train.batch_size=8",
        "train.monitor=valid_f1",
        "train.imbalance=sampler",
        "train.tta=flip",
        "train.exact_shards=2",
        "model.weights=start.pth",
        "data.root=.",
        "data.train=pictures/train",
        "data.test=pictures/valid",
        "data.valid_fraction=0.5",
        "platform.runs=#1, ä",
        "platform.cache=c=c",
        "platform.dollars_hour=36",
        "name=007",
    ),
}
# Two sweeps of two trials.
SWEEPS = {
    "grid": (
        "sweep=head",
        "sweep.objective=valid_f1",
        "sweep.points=2",
        "sweep.together=2",
        "train.label_smoothing=0",
        "model.head_hidden=null",
        "optim.weight_decay=0",
    ),
    "optuna": (
        "sweep.engine=optuna",
        "sweep.trials=2",
        "sweep.parallel=2",
        "sweep.together=1",
        "sweep.sampler=random",
        "sweep.pruner=median",
        "sweep.seed=3",
        "sweep.storage=shared.journal",
        "sweep.lost_seconds=60",
        "optim.lr=interval(0.01,0.02)",
    ),
}
# What test_wiring.py can't try: where a run that ends well has it at another value, as a file, and
# the word that must stand in it.
ELSEWHERE = {
    "model.name": ("settings/test_compose.py", "model.name=small_cnn"),
    "model.code": ("network/test_own.py", "model.code=mine.py"),
    "model.weights_dir": ("network/test_weight_folder.py", "model.weights_dir=weights"),
    "train.compile": ("training/test_compile.py", "train.compile=true"),
    "train.tensorboard": ("test_main.py", "train.tensorboard=true"),
    "train.mlflow": ("training/test_tracking.py", "train.mlflow=sqlite:///mlflow.db"),
    "train.parent": ("training/test_lineage.py", "train.parent=runs/first"),
    "train.wandb": ("training/test_tracking.py", "train.wandb=team"),
    "train.on_nan": ("training/test_diverged.py", "train.on_nan=rewind"),
    "train.stall_seconds": ("training/test_stall.py", "train.stall_seconds=20"),
    "platform.name": ("training/test_kills.py", "platform=ec2"),
    "model.candidates": ("training/test_recipe.py", "model.candidates=[squeezenet1_1]"),
    "train.margin": ("training/test_recipe.py", "train.margin=-5"),
    "train.keep": ("training/test_recipe.py", "train.keep=last"),
    "model.head": ("training/test_recipe.py", "model.head=probe"),
    "model.solve_on": ("training/test_recipe.py", "model.solve_on=both"),
    "recipe.minutes": ("training/test_recipe.py", "recipe.minutes=null"),
    "recipe.tune_minutes": ("training/test_recipe.py", "recipe.tune_minutes=0"),
    "recipe.prefer": ("training/test_recipe.py", "recipe.prefer=speed"),
}
# data.source and data.root are in each run; a space comes with sweep=NAME.
ALWAYS = {"data.source", "data.root", "sweep.space"}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_the_test_that_is_named_runs_the_trainer_with_it(key):
    path, word = ELSEWHERE[key]
    tree = ast.parse((PROJECT / "tests/trainer" / path).read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert word in texts
    assert called & {"run_trainer", "open_run"}


def flat(config: settings.Config) -> dict[str, object]:
    return {key: value for key, value, _ in settings.walk(config)}


def base(root: str) -> tuple[str, ...]:
    return (
        "data=folder", f"data.root={root}", "model=small_cnn", "platform=local",
        "platform.cache=cache",
    )  # fmt: skip


@pytest.fixture
def cwd(tmp_path, pictures, monkeypatch):
    """A working directory, and home, with the pictures and a file of weights."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").symlink_to(pictures)
    network = build("small_cnn", 3)
    torch.save(network.backbone.state_dict(), tmp_path / "start.pth")
    return tmp_path


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_with_every_setting_at_another_value(cwd, configure, kind):
    words = RUNS[kind]
    chosen, default = flat(configure(*base("pictures"), *words)), flat(configure(*base("x")))
    for word in words:
        key = word.split("=")[0]
        assert key == "optim" or chosen[key] != default[key], f"{word} is the default"
    code, said = run_trainer(cwd, *base("pictures"), *words)
    assert code == OK, said
    assert "has no effect" not in said
    run = cwd / str(chosen["platform.run_dir"] or f"{chosen['platform.runs']}/{chosen['name']}")
    package = cwd / str(chosen["platform.package"] or run / "model.tar.gz")
    assert json.loads((run / "result.json").read_text())["pictures"] == 9
    assert package.is_file()
    steps = [shlex.split(line) for line in said.split("next:\n")[1].splitlines()[:3]]
    predict, serve, rehearse = steps
    assert predict[2:4] == ["serving", "predict"] and (cwd / predict[4]).samefile(package)
    assert (cwd / predict[5]).is_dir()
    assert serve[1:4] == ["-m", "serving", "serve"] and (cwd / serve[4]).samefile(package)
    if rehearse[0] == "make":
        rehearse = shlex.split(rehearse[2].removeprefix("ARGS=").replace("$$", "$"))
    theirs = [word for word in rehearse if "=" in word]
    typed = [word for word in (*base("pictures"), *words) if not word.startswith("platform")]
    assert theirs == readable(typed)
    if kind == "frozen backbone":
        assert "pictures: 12 train, 12 valid, 9 test" in said


@pytest.mark.long
@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_with_every_setting_at_another_value(cwd, configure, kind):
    words = (
        *base("pictures"), "model.weights=start.pth", "data.size=16", "data.resize=16",
        "train.epochs=1", "train.batch_size=8", "name=it's a sweep", *SWEEPS[kind],
    )  # fmt: skip
    fixed, _ = space.split(words)
    chosen, default = flat(configure(*fixed)), flat(configure(*base("x")))
    for word in fixed:
        if word.startswith("sweep."):
            key = word.split("=")[0]
            assert chosen[key] != default[key], f"{word} is the default"
    code, said = run_trainer(cwd, "-m", *words)
    assert code == OK, said
    assert "has no effect" not in said
    assert {path.name for path in (cwd / "runs/it's a sweep").glob("0*")} == {"0000", "0001"}
    again = shlex.split(said.split("next:\n")[1].splitlines()[0])
    assert again[1:3] == ["-m", "trainer"] and set(base("pictures")) < set(again)


# --- the targets' ---

IMAGE = {"ec2": "ami-0123456789abcdef0", "sagemaker": "763104351884.dkr.ecr.eu-west-1.x/y:1"}
OTHERS = {
    "project": "dogs",
    "region": "us-west-2",
    "hours": "2",
    "spot": "true",
    "subnet": "subnet-0123456789abcdef0",
    "disk_gb": "110",
    "bucket": "own-bucket",
    "role": "own-role",
    "tags": "team=vision",
    "kms_key": "arn:aws:kms:us-west-2:123456789012:key/own",
    "security_groups": "sg-0123456789abcdef0",
    "public_ip": "false",
    "instances": "2",
    "retries": "3",
    "idle_minutes": "30",
    "zones": "us-east-1a",
    "max_dollars": "1",
    "repository": "https://example.org/packhorse.git",
}


@pytest.mark.parametrize("name", ["ec2", "sagemaker", "notebook"])
def test_each_setting_of_a_target_changes_what_is_sent(name, monkeypatch):
    monkeypatch.setattr("launch.cloud.source.build", lambda extras: b"")

    def sent(*words: str) -> tuple[object, ...]:
        plan = prepare(None, load_target([f"target={name}", *words]), ["train.epochs=1"])
        return plan.spec.region, plan.attempt.hours, plan.requests

    usual = sent()
    values = OTHERS | {
        "image": IMAGE.get(name, ""),
        "instance_type": {"ec2": "g5.xlarge"}.get(name, "ml.g5.xlarge"),
    }
    for key in settings.schema(targets()[name].config):
        # Of these AWS or an index is asked: tests/launch
        if key in ("name", "ssm_parameter", "spot_patience", "wheels"):
            continue
        if key in ("subnet", "security_groups") and name != "ec2":  # SageMaker takes both or none
            both = (f"target.{each}={values[each]}" for each in ("subnet", "security_groups"))
            assert sent(*both) != usual
        elif key == "wait_hours":
            assert sent("target.wait_hours=20", "target.spot=true") != sent("target.spot=true")
        else:
            assert sent(f"target.{key}={values[key]}") != usual, f"target.{key} has no effect"


# --- a server's: that each flag reaches it is in tests/serving/test_server.py ---

AS = {"batch_delay": "delay"}  # what the engine calls it


def test_each_setting_of_a_server_is_turned_on_somewhere():
    """As a flag or variable of a server, or where a handler or engine is made."""
    used = set()
    for path in (PROJECT / "tests/serving").glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CALLED:
                used |= {keyword.arg for keyword in node.keywords}
                used |= {flag(word.value) for word in node.args if isinstance(word, ast.Constant)}
    names = {AS.get(entry.name, entry.name) for entry in dataclasses.fields(Settings)}
    assert names <= used, f"no test of tests/serving sets {sorted(names - used)}"


CALLED = {"Settings", "Engine", "ask", "start"}


def flag(word: object) -> str:
    """--max-body and SERVING_MAX_BODY as max_body."""
    return str(word).removeprefix("--").removeprefix("SERVING_").replace("-", "_").lower()
