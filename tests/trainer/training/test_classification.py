import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from trainer.network import startup
from trainer.training.metrics import better, classification


def test_the_metrics_by_hand():
    """Ten images of seven classes: five are right at once, nine within the first five places."""
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 4, 6])
    logits = torch.zeros(10, 7)
    logits += torch.tensor([0.0, -0.1, -0.2, -0.3, -0.4, -0.5, -0.6])  # 0 before 1 before 2 ...
    logits[4, 1] = 1.0
    found = classification(logits, labels, "valid")
    assert found["valid_top1"] == 0.5  # four of class 0, one of class 1
    assert found["valid_top5"] == pytest.approx(0.9)
    # class 0: 4 of 9 said, all found; 1: 1 of 1 said, of 2 found; the others with pictures: none
    f1 = (2 * (4 / 9) / (4 / 9 + 1) + 2 * 0.5 / 1.5 + 0 * 4) / 6
    assert found["valid_f1"] == pytest.approx(f1, abs=1e-6)
    chances = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    loss = -chances[torch.arange(10), labels].log().mean().item()
    assert found["valid_loss"] == pytest.approx(loss, abs=2e-6)


def test_in_deterministic_mode_many_classes_take_no_more_memory(monkeypatch):
    """torchmetrics would compare each with all pairs of classes: 16 GB for 2,000 of 1,000."""
    count, counted = torch.bincount, []

    def bincount(*arguments, **options):
        counted.append(torch.are_deterministic_algorithms_enabled())
        return count(*arguments, **options)

    labels, logits = torch.arange(60) % 30, torch.eye(30).repeat(2, 1)
    usual = classification(logits, labels, "valid")
    monkeypatch.setattr(torch, "bincount", bincount)
    startup.set_deterministic()
    try:
        assert classification(logits, labels, "valid") == usual
        assert counted and not any(counted)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("classes", [2, 5, 40])
def test_the_figures_are_those_of_torchmetrics_for_the_logits(classes):
    random = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=random)
    labels = torch.randint(0, classes, (300,), generator=random)
    found = classification(logits, labels, "valid")
    theirs = {
        "valid_top1": multiclass_accuracy(logits, labels, classes, average="micro"),
        "valid_top5": multiclass_accuracy(
            logits, labels, classes, average="micro", top_k=min(5, classes)
        ),
        "valid_f1": multiclass_f1_score(logits, labels, classes, average="macro"),
    }
    assert {name: round(value.item(), 6) for name, value in theirs.items()} == {
        name: found[name] for name in theirs
    }


@pytest.mark.parametrize(
    ("monitor", "loss", "top1", "is_better"),
    [
        ("valid_loss", 0.9, 0.1, True),
        ("valid_refinement", 0.9, 0.1, True),
        ("valid_refinement", 1.1, 0.9, False),
        ("valid_loss", 1.1, 0.9, False),
        ("valid_top1", 1.1, 0.6, True),
        ("valid_top1", 0.9, 0.4, False),
        ("valid_top1", 0.9, 0.5, True),  # equal: the lower loss at its best temperature
        ("valid_top1", 1.1, 0.5, False),
        ("valid_loss", 1.0, 0.9, False),
    ],
)
def test_what_is_better(monitor, loss, top1, is_better):
    best = {"valid_loss": 1.0, "valid_refinement": 1.0, "valid_top1": 0.5}
    now = {"valid_loss": loss, "valid_refinement": loss, "valid_top1": top1}
    assert better(now, best, monitor) == is_better
