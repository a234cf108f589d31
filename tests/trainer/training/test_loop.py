import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.soak import difference
from trainer.common.errors import Interrupted, UserError
from trainer.common.interrupt import Stop
from trainer.images.augment import Augmentation
from trainer.images.decode import Preprocessing
from trainer.images.folder import scan
from trainer.images.loader import ImageLoader
from trainer.network import optim
from trainer.network.build import Classifier, build
from trainer.training import checkpoint, metrics
from trainer.training.loop import Checkpoints, Learner, Progress, evaluate, fit, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_loader(pictures: Path, workers: int = 0, trivial: bool = True) -> ImageLoader:
    folder = scan({split: str(pictures / split) for split in ("train", "valid", "test")}, 0.2)
    return ImageLoader(
        folder,
        Preprocessing(18, 16, "bilinear"),
        Augmentation((0.3, 1.0), (0.75, 1.33), True, trivial),
        batch_size=8,
        seed=7,
        workers=workers,
    )


def make_network(dropout: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    network = build("small_cnn", 3)
    network.head = nn.Sequential(nn.Dropout(dropout), network.head) if dropout else network.head
    return network


@dataclasses.dataclass
class Session:
    """A small training as `trainer.__main__` builds it, in this process."""

    learner: Learner
    progress: Progress
    ledger: metrics.Ledger
    checkpoints: Checkpoints
    stop: Stop

    def outcome(self) -> dict:
        state = self.learner.state()
        rows = [
            {
                key: value
                for key, value in row.items()
                if key not in ("seconds", "data_wait", "evaluate_seconds")
            }
            for row in self.ledger.rows
        ]
        progress = dataclasses.asdict(self.progress)
        return copy.deepcopy(state) | {
            "rows": rows,
            "progress": {key: progress[key] for key in ("epoch", "batch", "step", "best")},
        }


def open_session(
    root: Path, precision: torch.dtype = torch.float32, dropout: float = 0.0
) -> Session:
    network = make_network(dropout)
    optimizer = optim.build(
        network, "adamw", lr=3e-3, head_lr=1e-2, weight_decay=0.05, momentum=0.9
    )
    learner = Learner(network, optimizer, CPU, precision, ema_decay=0.9)
    root.mkdir(exist_ok=True)
    ledger = metrics.Ledger(root / "metrics.jsonl")
    checkpoints = Checkpoints(root / "checkpoints", checkpoint.Cadence(1e-9, 1.0), 2, ledger, {})
    progress = Progress()
    if found := checkpoint.newest(root / "checkpoints"):
        learner.restore(found[1])
        progress = Progress(**found[1]["progress"])
    ledger.restore(progress.rows)
    return Session(learner, progress, ledger, checkpoints, Stop())


def train(session: Session, feed: ImageLoader, config) -> None:
    fit(
        session.learner,
        feed,
        config,
        session.progress,
        session.ledger,
        session.checkpoints,
        session.stop,
    )


@pytest.fixture
def config(configure):
    return configure(
        "train.epochs=2",
        "train.batch_size=8",
        "train.accumulate=2",
        "train.clip_norm=1",
        "data.augment.mixup=0.4",
        "data.augment.cutmix=1",
        "seed=7",
    )


@pytest.fixture
def whole_fp32(tmp_path, pictures, config) -> dict:
    """What the undisturbed run with dropout comes to."""
    session = open_session(tmp_path / "whole", dropout=0.3)
    train(session, make_loader(pictures), config)
    return session.outcome()


class StopAt(ImageLoader):
    """A feed that asks to stop when a certain batch is read, of training or of evaluation."""

    def asked(self, stop: Stop, at: int) -> "StopAt":
        object.__setattr__(self, "left", at)
        object.__setattr__(self, "stop", stop)
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


def interrupted_training(
    root: Path, pictures: Path, config, at: int, change_state=None, **settings
) -> Session:
    """Trains, is stopped when batch number `at` is read, and goes on in a fresh session from what is on disk."""
    feed = make_loader(pictures)
    first = open_session(root, **settings)
    stopping = StopAt(**vars(feed)).asked(first.stop, at)
    with pytest.raises(Interrupted, match="the test"):
        train(first, stopping, config)
    if change_state:
        (path,) = checkpoint.steps(root / "checkpoints")[-1:]
        state = checkpoint.load(path)
        change_state(state)
        for old in checkpoint.steps(root / "checkpoints"):
            old.rename(root / f"was-{old.name}")
        checkpoint.save(root / "checkpoints", path.name, state)
    second = open_session(root, **settings)
    train(second, feed, config)
    return second


# An epoch reads 3 batches for training and 2 for evaluation.
@pytest.mark.parametrize("at", range(10))
def test_a_stop_at_any_batch_and_a_new_start_give_the_undisturbed_run(
    tmp_path, pictures, config, whole_fp32, at
):
    resumed = interrupted_training(tmp_path / "resumed", pictures, config, at, dropout=0.3)
    assert difference(whole_fp32, resumed.outcome()) is None


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
    feed, root = make_loader(pictures), tmp_path / "damaged"
    first = open_session(root, dropout=0.3)
    with pytest.raises(Interrupted):
        train(first, StopAt(**vars(feed)).asked(first.stop, 6), config)
    harm(checkpoint.steps(root / "checkpoints")[-1] / file)
    second = open_session(root, dropout=0.3)
    assert 0 < second.progress.step < first.progress.step
    train(second, feed, config)
    assert difference(whole_fp32, second.outcome()) is None


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
    # By valid_top1, the first epoch stays the best: a run that forgets it is noticed.
    config = compose(
        [
            "train.epochs=2",
            "train.batch_size=8",
            "train.accumulate=2",
            "train.monitor=valid_top1",
            "seed=7",
        ]
    )
    session = open_session(tmp_path_factory.mktemp("whole"), torch.float16, dropout=0.3)
    torch.set_num_threads(1)
    train(session, make_loader(pictures), config)
    return session, config


def test_float16_resumes_exactly_too(tmp_path, pictures, whole_fp16):
    whole, config = whole_fp16
    resumed = interrupted_training(
        tmp_path / "resumed", pictures, config, 6, precision=torch.float16, dropout=0.3
    )
    assert difference(whole.outcome(), resumed.outcome()) is None


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
        dropout=0.3,
    )
    assert difference(whole.outcome(), resumed.outcome()) is not None


def test_the_number_of_threads_that_read_changes_nothing(tmp_path, pictures, config):
    outcomes = []
    for workers in (0, 1, 2, 3):
        session = open_session(tmp_path / str(workers), dropout=0.3)
        train(session, make_loader(pictures, workers), config)
        outcomes.append(session.outcome())
    for other in outcomes[1:]:
        assert difference(outcomes[0], other) is None


def test_four_parts_of_eight_give_the_gradient_of_one_batch_of_32():
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
        optimizer = torch.optim.SGD(copied.parameters(), lr=1.0)
        learner = Learner(copied, optimizer, CPU, torch.float32)
        train_step(
            learner, pixels, labels, accumulate=accumulate, label_smoothing=0.1, clip_norm=None
        )
        after.append((copied.state_dict(), learner.sums()))
    for name, tensor in after[0][0].items():
        torch.testing.assert_close(tensor, after[1][0][name], rtol=1e-5, atol=1e-6)
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-6)
    assert not torch.equal(network.head.weight, after[0][0]["head.weight"])


def test_a_step_reports_loss_and_hits():
    network = make_network()
    pixels, labels = (
        torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    learner = Learner(network, torch.optim.SGD(network.parameters(), lr=0.0), CPU, torch.float32)
    with torch.no_grad():
        logits = copy.deepcopy(network).train()(pixels)
    train_step(learner, pixels, labels, accumulate=1, label_smoothing=0.0, clip_norm=None)
    loss, right, count = learner.sums()
    assert loss == pytest.approx(
        nn.functional.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-6
    )
    assert (right, count) == ((logits.argmax(1) == labels).sum().item(), 6)


def test_clipping_bounds_the_update():
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    learner = Learner(network, torch.optim.SGD(network.parameters(), lr=1.0), CPU, torch.float32)
    pixels, labels = (
        torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8),
        torch.randint(0, 3, (8,)),
    )
    train_step(learner, pixels, labels, accumulate=2, label_smoothing=0.0, clip_norm=0.01)
    moved = [parameter - before[name] for name, parameter in network.named_parameters()]
    assert torch.cat([change.flatten() for change in moved]).norm().item() == pytest.approx(
        0.01, rel=1e-3
    )


def test_evaluation_sees_every_picture_once_in_order(pictures):
    feed = make_loader(pictures, workers=2)
    logits, labels = evaluate(make_network(), feed.eval_batches("test"), CPU, torch.float32, Stop())
    assert len(logits) == 9 and labels.tolist() == feed.folder.splits["test"].labels.tolist()


def test_the_average_is_a_weighted_sum_of_all_weights(config):
    learner = Learner(
        make_network(),
        torch.optim.SGD([nn.Parameter(torch.zeros(1))]),
        CPU,
        torch.float32,
        ema_decay=0.5,
    )
    start = learner.network.head.bias.detach().clone()
    with torch.no_grad():
        learner.network.head.bias.add_(1.0)
    assert learner.average is not None
    learner.average.update(step=1)  # decay 2/11 while young
    torch.testing.assert_close(
        learner.average.network.head.bias, start * 2 / 11 + (start + 1) * 9 / 11
    )
    learner.average.update(step=1000)
    torch.testing.assert_close(
        learner.average.network.head.bias, start * 1 / 11 + (start + 1) * 10 / 11
    )
    assert not any(parameter.requires_grad for parameter in learner.average.network.parameters())


def test_a_diverging_run_ends_with_a_remedy(tmp_path, pictures, config):
    session = open_session(tmp_path)
    with torch.no_grad():
        session.learner.network.head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match=r"training diverged; lower optim.lr"):
        train(session, make_loader(pictures), config)
    assert checkpoint.steps(tmp_path / "checkpoints") == []  # a broken state is not worth keeping


def test_patience_ends_a_run_that_no_longer_improves(tmp_path, pictures, configure):
    config = configure(
        "train.epochs=50",
        "train.batch_size=8",
        "train.patience=2",
        "optim.lr=1e-9",
        "optim.schedule=constant",
    )
    session = open_session(tmp_path)
    for group in session.learner.optimizer.param_groups:
        group["peak_lr"] = 1e-12
    session.learner.average = None
    train(session, make_loader(pictures), config)
    assert session.progress.epoch < 50 and session.progress.stale_epochs() == 2


def test_an_epoch_without_a_hit_says_so(tmp_path, pictures, configure):
    session = open_session(tmp_path / "run")
    linear = session.learner.network.head
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor([-1e6, -1e6, 1e6]))  # always the third class
    feed = make_loader(pictures)
    two = [label for label in feed.folder.splits["train"].labels if label < 2]
    paths = feed.folder.splits["train"].paths[: len(two)]
    splits = feed.folder.splits | {
        "train": dataclasses.replace(feed.folder.splits["train"], paths=paths, labels=np.array(two))
    }
    feed = dataclasses.replace(feed, folder=dataclasses.replace(feed.folder, splits=splits))
    train(session, feed, configure("train.epochs=1", "train.batch_size=8", "optim.lr=1e-9"))
    assert session.ledger.rows[0]["train_top1"] == 0
