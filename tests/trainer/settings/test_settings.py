"""Every setting of a run is turned on in a real run: here, or in the test that is named."""

import json

import pytest

from tests.conftest import run_trainer
from trainer.common.errors import OK
from trainer.settings import config as settings

# Each run has all of these at values that are not the defaults.
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
        "data.augment.mixup=0.2",
        "data.augment.cutmix=1",
        "model.head_hidden=8",
        "model.mean=[0.4,0.5,0.6]",
        "model.std=[0.2,0.3,0.4]",
        "optim=sgd",
        "optim.name=sgd",
        "optim.lr=0.01",
        "optim.head_lr=0.02",
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
        "checkpoint.minutes=1",
        "checkpoint.max_cost=0.5",
        "checkpoint.keep=3",
        "package.int8=true",
        "package.max_drop=1",
        "platform.runs=elsewhere",
        "platform.run_dir=elsewhere/this",
        "platform.checkpoints=saved",
        "platform.package=made/model.tar.gz",
    ),
    "frozen backbone": (
        "model.freeze=backbone",
        "model.cached_views=2",
        "data.size=16",
        "data.resize=16",
        "data.cache=none",
        "optim.schedule=constant",
        "optim.warmup_epochs=0",
        "train.epochs=2",
        "train.batch_size=8",
        "train.monitor=valid_f1",
        "train.exact_shards=2",
        "platform.run_dir=frozen",
        "platform.package=frozen/model.tar.gz",
    ),
}
ELSEWHERE = {
    "name": "test_kills.py",
    "data.source": "every run",
    "data.root": "every run",
    "data.train": "test_kills.py",
    "data.valid": "test_kills.py",
    "data.test": "test_splits_may_lie_anywhere, below",
    "data.leaks": "test_care.py",
    "data.valid_fraction": "test_splits_may_lie_anywhere, below",
    "model.name": "test_model.py",
    "model.weights": "test_model.py",
    "train.compile": "test_compile.py",
    "train.tensorboard": "test_main.py",
    "platform.name": "every run",
    "platform.cache": "every run",
}


def test_each_setting_of_a_run_is_turned_on_somewhere():
    here = {setting.split("=")[0] for run in RUNS.values() for setting in run}
    known = settings.keys()
    of_a_run = {key for key in known if not key.startswith("sweep.")}  # these: test_sweep.py
    untried = of_a_run - here - ELSEWHERE.keys()
    remedy = "give each a value in RUNS, or name the test that does in ELSEWHERE"
    assert not untried, f"{remedy}: {sorted(untried)}"
    assert not ELSEWHERE.keys() - of_a_run, "no such settings"


def flat(config: settings.Config) -> dict[str, object]:
    return {key: value for key, value, _ in settings.walk(config)}


@pytest.mark.parametrize("values", RUNS.values(), ids=RUNS)
def test_a_run_with_every_setting_at_another_value(tmp_path, pictures, configure, values):
    base = (
        "data=folder", f"data.root={pictures}", "model=small_cnn",
        "platform=local", "platform.cache=cache",
    )  # fmt: skip
    chosen, default = (flat(configure(*base, *more)) for more in (values, ()))
    for setting in values:
        key = setting.split("=")[0]
        assert key == "optim" or chosen[key] != default[key], f"{setting} is the default"
    code, said = run_trainer(tmp_path, *base, *values)
    assert code == OK, said
    assert "has no effect" not in said
    run = tmp_path / chosen["platform.run_dir"]
    assert json.loads((run / "result.json").read_text())["pictures"] == 9
    assert (tmp_path / chosen["platform.package"]).is_file()


def test_splits_may_lie_anywhere(tmp_path, pictures):
    roots = (
        "data=folder",
        "data.root=.",
        f"data.train={pictures}/train",
        f"data.test={pictures}/valid",
        "model=small_cnn",
    )
    code, said = run_trainer(
        tmp_path, *roots, "data.valid_fraction=0.5", "data.size=16", "data.resize=16",
        "train.epochs=1", "train.batch_size=4", "platform=local", "platform.cache=cache",
    )  # fmt: skip
    assert code == OK, said
    assert "pictures: 12 train, 12 valid, 9 test" in said
