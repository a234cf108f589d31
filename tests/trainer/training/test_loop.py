import copy
import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.soak import difference
from tests.trainer.trainings import (
    SAVED_OFTEN,
    make_loader,
    make_network,
    open_training,
    outcome,
)
from trainer.common.errors import Interrupted, UserError
from trainer.images.loader import ImageLoader
from trainer.network.build import Classifier
from trainer.network.ema import ModelEma
from trainer.training import checkpoint
from trainer.training import training as training_module
from trainer.training.loop import fit, predict, seed_dropout, train_one_epoch, train_one_step
from trainer.training.metrics import better
from trainer.training.training import Training

RECIPE = (
    "model=small_cnn", "data.size=16", "data.resize=18", "train.epochs=2", "train.batch_size=8",
    "train.accumulate=2", "train.ema_decay=0.9", "optim.lr=3e-3", "optim.head_lr=1e-2",
    "optim.weight_decay=0.05", "train.monitor=valid_top1", "train.threads=1", "seed=7",
    *SAVED_OFTEN,
)  # fmt: skip


@pytest.fixture
def config(configure):
    return configure(
        *RECIPE, "train.clip_norm=1", "data.augment.mixup=0.4", "data.augment.cutmix=1",
        "optim.layer_decay=0.8", "model.unfreeze_epochs=1", "train.imbalance=logits",
    )  # fmt: skip


@pytest.fixture
def whole_fp32(tmp_path, pictures, config) -> dict:
    """What the undisturbed run with dropout comes to."""
    training = open_training(
        tmp_path / "whole", config, make_loader(pictures), make_network(dropout=0.3)
    )
    fit(training)
    return outcome(training)


class StopAt(ImageLoader):
    """A loader that asks to stop when a certain batch is read, of training or of evaluation."""

    def asked(self, at: int) -> "StopAt":
        object.__setattr__(self, "left", at)
        object.__setattr__(self, "stop", None)
        return self

    def _counted(self, batches):
        for batch in batches:
            if self.left == 0:
                self.stop.ask("the test")
            object.__setattr__(self, "left", self.left - 1)
            yield batch

    def train_batches(self, epoch, first=0):
        return self._counted(super().train_batches(epoch, first))

    def eval_batches(self, name):
        return self._counted(super().eval_batches(name))


def stopped_training(
    root: Path, pictures: Path, config, at: int, precision=torch.float32
) -> Training:
    """A training with dropout that was stopped when batch number `at` was read."""
    loader = StopAt(**vars(make_loader(pictures))).asked(at)
    training = open_training(root, config, loader, make_network(0.3), precision=precision)
    object.__setattr__(loader, "stop", training.stop)
    with pytest.raises(Interrupted, match="the test"):
        fit(training)
    return training


def interrupted_training(
    root: Path, pictures: Path, config, at: int, change_state=None, precision=torch.float32
) -> Training:
    """A training that was stopped when batch number `at` was read, and went on from what is on
    disk.
    """
    stopped_training(root, pictures, config, at, precision)
    if change_state:
        (path,) = checkpoint.steps(root / "checkpoints")[-1:]
        state = checkpoint.load(path)
        change_state(state)
        for old in checkpoint.steps(root / "checkpoints"):
            old.rename(root / f"was-{old.name}")
        checkpoint.save(root / "checkpoints", path.name, state)
    loader = make_loader(pictures)
    training = open_training(root, config, loader, make_network(0.3), precision=precision)
    fit(training)
    return training


# An epoch reads 3 batches for training and 2 for evaluation.
@pytest.mark.parametrize("at", range(10))
def test_a_stop_at_any_batch_and_a_new_start_give_the_undisturbed_run(
    tmp_path, pictures, config, whole_fp32, at
):
    resumed = interrupted_training(tmp_path / "resumed", pictures, config, at)
    assert difference(whole_fp32, outcome(resumed)) is None


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm",
    [
        flip_a_bit,
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
    ],
)
def test_a_damaged_newest_checkpoint_costs_a_few_steps_and_no_bit(
    tmp_path, pictures, config, whole_fp32, file, harm
):
    root = tmp_path / "damaged"
    first = stopped_training(root, pictures, config, 6)
    harm(checkpoint.steps(root / "checkpoints")[-1] / file)
    second = open_training(root, config, make_loader(pictures), make_network(0.3))
    assert 0 < second.progress.step < first.progress.step
    fit(second)
    assert difference(whole_fp32, outcome(second)) is None


def forget_buffers(state):
    for name, tensor in state["network"].items():
        if name.endswith("running_mean"):
            tensor.zero_()


def forget_moments(state):
    for entry in state["optimizer"]["state"].values():
        entry["exp_avg"].zero_()


def forget_optimizer_step(state):
    for entry in state["optimizer"]["state"].values():
        entry["step"].zero_()


LEFT_OUT = {
    "weights": lambda state: state["network"]["head.1.weight"].zero_(),
    "buffers": forget_buffers,
    "moving average": lambda state: state.update(
        average={name: tensor.clone() for name, tensor in state["network"].items()}
    ),
    "optimizer's moments": forget_moments,
    "optimizer's step": forget_optimizer_step,
    "learning rates of the groups": lambda state: [
        group.update(peak_lr=1e-3) for group in state["optimizer"]["groups"]
    ],
    "gradient scale": lambda state: state["scaler"].update(scale=2.0),
    "growth of the gradient scale": lambda state: state["scaler"].update(_growth_tracker=0),
    "step": lambda state: state["progress"].update(step=0),
    "position in the epoch": lambda state: state["progress"].update(batch=0),
    "epoch": lambda state: state["progress"].update(epoch=0),
    "sums of the running epoch": lambda state: state["progress"].update(sums=[0.0, 0.0, 1.0]),
    "ledger": lambda state: state["progress"].update(rows=[]),
    "best so far": lambda state: state["progress"].update(best=None),
}


@pytest.fixture(scope="module")
def whole_fp16(tmp_path_factory, pictures):
    """The undisturbed run in float16 with a gradient scaler, which PyTorch runs on a CPU too."""
    from trainer.settings import config as settings
    from trainer.settings.compose import compose

    settings.register()
    # So slow, the first epoch stays the best: a run that forgets it is noticed.
    config = compose([*RECIPE, "optim.lr=3e-4"])
    root = tmp_path_factory.mktemp("whole")
    training = open_training(
        root, config, make_loader(pictures), make_network(0.3), precision=torch.float16
    )
    torch.set_num_threads(1)
    fit(training)
    assert training.progress.best is not None and training.progress.best["epoch"] == 1
    return training, config


def test_float16_resumes_exactly_too(tmp_path, pictures, whole_fp16):
    whole, config = whole_fp16
    resumed = interrupted_training(
        tmp_path / "resumed", pictures, config, 6, precision=torch.float16
    )
    assert difference(outcome(whole), outcome(resumed)) is None


@pytest.mark.parametrize("item", LEFT_OUT)
def test_leaving_out_any_saved_item_is_noticed(tmp_path, pictures, whole_fp16, item):
    whole, config = whole_fp16
    resumed = interrupted_training(
        tmp_path / "resumed",
        pictures,
        config,
        6,
        LEFT_OUT[item],
        precision=torch.float16,
    )
    assert difference(outcome(whole), outcome(resumed)) is not None


def test_a_checkpoint_is_of_its_moment_though_it_is_copied_later(
    tmp_path, pictures, configure, monkeypatch
):
    """Of what the next batch changes on its way forward, and of what its step does."""
    training = open_training(tmp_path / "run", configure(*RECIPE), make_loader(pictures))
    asked, freeze, settle = threading.Event(), checkpoint.freeze, training.checkpoints.settle

    def freeze_until_asked(state):
        frozen = freeze(state)

        def late(memory):
            asked.wait()
            return frozen(memory)

        return late

    def ask_and_settle():
        asked.set()
        settle()

    monkeypatch.setattr(checkpoint, "freeze", freeze_until_asked)
    monkeypatch.setattr(training.checkpoints, "settle", ask_and_settle)
    training.begin_epoch()
    first, second, *_ = training.data.train_batches(0)
    train_one_step(training, *first)
    training.progress.step, before = 1, copy.deepcopy(training.state())
    average = copy.deepcopy(training.eval_model.state_dict())
    asked.clear()
    training.keep_best({"valid_top1": 0.5})
    training.checkpoints.save()
    train_one_step(training, *second)
    training.ema.update(2)
    asked.set()
    training.checkpoints.wait()
    [newest] = checkpoint.steps(tmp_path / "run/checkpoints")
    saved, after = checkpoint.load(newest), training.state()
    [mean, *_] = [name for name in saved["network"] if name.endswith("running_mean")]
    assert not torch.equal(after["network"][mean], before["network"][mean])
    for part in ("network", "average", "optimizer"):
        assert difference(saved[part], before[part]) is None
        assert difference(after[part], before[part]) is not None
    assert difference(saved["best"]["network"], dict(average)) is None


def test_a_state_keeps_what_ones_own_network_changes_on_its_way_forward(
    tmp_path, pictures, configure
):
    code = tmp_path / "own.py"
    code.write_text("def metric(output, target):\n    return {}\n")
    network = make_network()

    def change(module: nn.Module, _: object) -> None:
        module.head.weight.data.add_(1)

    network.register_forward_pre_hook(change)
    config = configure(*RECIPE, f"model.code={code}")
    training = open_training(tmp_path / "run", config, make_loader(pictures), network)
    kept = training.state()["network"]["head.weight"]
    before = kept.clone()
    image, _ = next(training.data.train_batches(0))
    training.model(image)
    assert torch.equal(kept, before)
    assert not torch.equal(network.head.weight, before)


def test_the_number_of_threads_that_read_changes_nothing(tmp_path, pictures, config):
    outcomes = []
    for workers in (0, 1, 2, 3):
        loader = make_loader(pictures, workers)
        training = open_training(tmp_path / str(workers), config, loader, make_network(0.3))
        fit(training)
        outcomes.append(outcome(training))
    for other in outcomes[1:]:
        assert difference(outcomes[0], other) is None


def test_four_parts_of_eight_give_the_gradient_of_one_batch_of_32(tmp_path, pictures, configure):
    class Plain(nn.Module):  # no BatchNorm, whose statistics are those of a part
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(16)
            )

        def forward(self, pictures):
            return self.layers(pictures)

    torch.manual_seed(0)
    network = Classifier(Plain(), nn.Linear(16, 5), (0.5,) * 3, (0.5,) * 3)
    pixels, labels = (
        torch.randint(0, 256, (32, 12, 12, 3), dtype=torch.uint8),
        torch.randint(0, 5, (32,)),
    )
    network(pixels)
    after = []
    for accumulate in (1, 4):
        copied = copy.deepcopy(network)
        training = one_step(tmp_path / str(accumulate), pictures, configure, copied, accumulate)
        training.optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
        train_one_step(training, pixels, labels)
        after.append((copied.state_dict(), training.sums.fetch()))
    for name, tensor in after[0][0].items():
        torch.testing.assert_close(tensor, after[1][0][name], rtol=1e-5, atol=1e-6)
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-6)
    assert not torch.equal(network.head.weight, after[0][0]["head.weight"])


def one_step(
    root: Path, pictures, configure, network: Classifier, accumulate: int = 1, *overrides: str
) -> Training:
    """A training in train mode, of which a test takes a single step by itself."""
    words = (f"train.accumulate={accumulate}", "train.label_smoothing=0", "train.ema_decay=null")
    config = configure(*RECIPE, *words, *overrides)
    training = open_training(root, config, make_loader(pictures), network)
    training.begin_epoch()
    return training


def test_a_step_reports_loss_and_hits(tmp_path, pictures, configure):
    network = make_network()
    pixels, labels = (
        torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    with torch.no_grad():
        logits = copy.deepcopy(network).train()(pixels)
    training = one_step(tmp_path, pictures, configure, network)
    train_one_step(training, pixels, labels)
    loss, correct, count = training.sums.fetch()
    expected = nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (correct, count) == ((logits.argmax(1) == labels).sum().item(), 6)


def test_rare_classes_get_a_margin_by_logit_adjustment(tmp_path, pictures, configure):
    network = make_network()
    pixels, labels = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8), torch.arange(6) % 3
    with torch.no_grad():
        logits = copy.deepcopy(network).train()(pixels)
    training = one_step(tmp_path, pictures, configure, network, 1, "train.imbalance=logits")
    counts = torch.tensor([16.0, 7.0, 1.0])
    training.log_prior = (counts / 24).log()
    train_one_step(training, pixels, labels)
    loss, correct, _ = training.sums.fetch()
    # Menon et al. 2021, equation 10: log(1 + sum over others of pi_y'/pi_y * exp(f_y' - f_y)).
    expected = sum(
        (counts / counts[label] * (row - row[label]).exp()).sum().log().item()
        for row, label in zip(logits, labels, strict=True)
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert correct == (logits.argmax(1) == labels).sum().item()


def test_the_prior_is_that_of_the_training_pictures(tmp_path, pictures, configure):
    loader = make_loader(pictures)
    train = loader.folder.splits["train"]
    fewer = dataclasses.replace(train, paths=train.paths[:18], labels=train.labels[:18])
    folder = dataclasses.replace(loader.folder, splits=loader.folder.splits | {"train": fewer})
    loader = dataclasses.replace(loader, folder=folder)
    config = configure(*RECIPE, "train.imbalance=logits")
    training = open_training(tmp_path, config, loader)
    assert training.log_prior.exp().tolist() == pytest.approx([8 / 18, 8 / 18, 2 / 18])


def test_the_head_is_trained_first_and_then_all_layers(tmp_path, pictures, configure):
    words = ("model.unfreeze_epochs=2", "train.epochs=3", "train.ema_decay=null")
    training = open_training(tmp_path, configure(*RECIPE, *words), make_loader(pictures))
    backbone = training.network.backbone
    for trained in (False, False, True):
        before = copy.deepcopy(training.network.state_dict())
        train_one_epoch(training)
        after = training.network.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in before if name.startswith("head.")} <= moved
        statistics = {f"backbone.{name}" for name, _ in backbone.named_buffers()}
        assert (statistics <= moved) if trained else (moved <= {"head.weight", "head.bias"})
        assert [each.requires_grad for each in backbone.parameters()] == [trained] * 12
        training.end_epoch({})
    moments = training.optimizer.state_dict()["state"].values()
    assert sorted({entry["step"].item() for entry in moments}) == [3, 9]


@pytest.mark.parametrize(
    ("top1", "loss", "best"),
    [
        ((0.5, 0.6, 0.6), (1.0, 0.9, 0.8), 3),
        ((0.5, 0.6, 0.6), (1.0, 0.8, 0.8), 2),
        ((0.5, 0.6, 0.5), (1.0, 0.9, 0.8), 2),
        ((0.6, 0.6, 0.5), (0.9, 1.0, 0.8), 1),
    ],
)
def test_of_equal_epochs_the_one_of_lower_refinement_is_best(top1, loss, best):
    rows = [
        {"valid_top1": accuracy, "valid_refinement": its_loss}
        for accuracy, its_loss in zip(top1, loss, strict=True)
    ]
    kept = 0
    for number, row in enumerate(rows):
        if better(row, rows[kept], "valid_top1"):
            kept = number
    assert kept + 1 == best


def test_a_network_that_tells_more_is_better_however_sure_of_itself_it_is(
    tmp_path, pictures, configure
):
    training = open_training(tmp_path, configure(*RECIPE), make_loader(pictures))
    labels = torch.arange(60) % 3
    dull = torch.zeros(60, 3)
    dull[:, 0] = 1e-3
    knowing = torch.nn.functional.one_hot(labels, 3).float()
    knowing[::4] = knowing[::4].roll(1, dims=1)  # a quarter is wrong, all are as sure as can be
    first, second = (training.measure(20 * each, labels) for each in (dull, knowing))
    assert second["valid_loss"] > first["valid_loss"]
    assert better(second, first, "valid_refinement")
    assert not better(second, first, "valid_loss")


def test_clipping_bounds_the_update(tmp_path, pictures, configure):
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    training = one_step(tmp_path, pictures, configure, network, 2, "train.clip_norm=0.01")
    training.optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    pixels, labels = (
        torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8),
        torch.randint(0, 3, (8,)),
    )
    train_one_step(training, pixels, labels)
    moved = [parameter - before[name] for name, parameter in network.named_parameters()]
    norm = torch.cat([change.flatten() for change in moved]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path, pictures, configure):
    network = make_network()
    training = one_step(tmp_path, pictures, configure, network, 2, "train.clip_norm=0.01")
    training.optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    training.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = copy.deepcopy(network.state_dict())
    train_one_step(training, torch.full((8, 16, 16, 3), 7), torch.randint(0, 3, (8,)))
    moved = [parameter - before[name] for name, parameter in network.named_parameters()]
    norm = torch.cat([change.flatten() for change in moved]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_dropout_differs_in_each_step_and_shard_and_comes_again():
    def drawn(seed: int, step: int, shard: int) -> list[float]:
        seed_dropout(torch.device("cpu"), seed, step, shard)
        return torch.rand(4).tolist()

    states = [(7, 0, 0), (8, 0, 0), (7, 1, 0), (7, 0, 1)]
    first = [drawn(*state) for state in states]
    assert len(set(map(tuple, first))) == 4
    assert [drawn(*state) for state in states] == first


def test_evaluation_sees_every_picture_once_in_order(tmp_path, pictures, config):
    loader = make_loader(pictures, workers=2)
    training = open_training(tmp_path, config, loader)
    batches = loader.eval_batches("test")
    logits, labels = predict(training, training.network, batches, training.machine)
    assert len(logits) == 9 and labels.tolist() == loader.folder.splits["test"].labels.tolist()


def test_the_average_is_a_weighted_sum_of_all_weights():
    network = make_network()
    ema = ModelEma(network, decay=0.5)
    start = network.head.bias.detach().clone()
    with torch.no_grad():
        network.head.bias.add_(1.0)
    ema.update(step=1)  # decay 2/11 while young
    torch.testing.assert_close(ema.network.head.bias, start * 2 / 11 + (start + 1) * 9 / 11)
    ema.update(step=1000)
    torch.testing.assert_close(ema.network.head.bias, start * 1 / 11 + (start + 1) * 10 / 11)
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())


def test_a_diverging_run_ends_with_a_remedy(tmp_path, pictures, config):
    training = open_training(tmp_path, config, make_loader(pictures))
    with torch.no_grad():
        training.network.head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"training diverged; lower optim.lr"):
        fit(training)
    assert checkpoint.steps(tmp_path / "checkpoints") == []  # a broken state is not worth keeping


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, pictures, configure):
    words = ("train.epochs=50", "train.patience=2", "optim.schedule=constant")
    config = configure(*RECIPE, *words, "train.ema_decay=null")
    training = open_training(tmp_path, config, make_loader(pictures))
    for group in training.optimizer.param_groups:
        group["peak_lr"] = 1e-12
    fit(training)
    assert training.progress.best is not None
    assert training.progress.epoch == training.progress.best["epoch"] + 2 < 50


def test_an_epoch_without_a_hit_says_so(tmp_path, pictures, configure):
    network = make_network()
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor([-1e6, -1e6, 1e6]))  # always the third class
    loader = make_loader(pictures)
    train = loader.folder.splits["train"]
    two = [label for label in train.labels if label < 2]
    few = dataclasses.replace(train, paths=train.paths[: len(two)], labels=np.array(two))
    folder = dataclasses.replace(loader.folder, splits=loader.folder.splits | {"train": few})
    loader = dataclasses.replace(loader, folder=folder)
    config = configure(*RECIPE, "train.epochs=1", "optim.lr=1e-9", "optim.head_lr=1e-9")
    training = open_training(tmp_path / "run", config, loader, network)
    fit(training)
    assert training.metrics_file.rows[0]["train_top1"] == 0


def test_the_network_normalises_by_the_settings_mean_and_std(configure):
    config = configure("model=small_cnn", "model.mean=[0.2,0.4,0.6]", "model.std=[0.1,0.2,0.3]")
    network = training_module.new_network(config, ("a", "b", "c"))
    assert torch.allclose(network.mean.flatten() / 255, torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(network.std.flatten() / 255, torch.tensor([0.1, 0.2, 0.3]))


def test_each_step_mixes_in_its_own_way_and_always_in_the_same(tmp_path, pictures, config):
    training = open_training(tmp_path / "run", config, make_loader(pictures), make_network(0.3))
    pixels = torch.rand(8, 16, 16, 3)
    labels = torch.arange(8) % training.data.classes

    def mixed(step: int) -> torch.Tensor:
        training.progress.step = step
        return training.mix(pixels.clone(), labels, 0)[0]

    assert torch.equal(mixed(3), mixed(3))
    assert not torch.equal(mixed(3), mixed(4))
