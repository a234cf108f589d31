import pytest
import torch

from trainer.common.errors import UserError
from trainer.network import device
from trainer.training.loop import seed_dropout


def test_apples_gpu_is_taken_where_there_is_one(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    machine = device.prepare("mps", "auto")
    assert (machine.device.type, machine.precision) == ("mps", torch.float32)
    assert "may not give the same bits" in caplog.text
    assert machine.environment()["device"] == "Apple GPU"
    with machine.autocast():  # of a device that isn't here: float32 needs none
        pass
    for precision in ("bf16", "fp16"):
        with pytest.raises(UserError, match=f"train.precision={precision}.*allowed: auto, fp32"):
            device.prepare("mps", precision)
    with pytest.raises(UserError, match="2 processes run on this host: it has one GPU"):
        device.prepare("mps", "auto", local_size=2)


def test_without_one_a_line_says_so():
    if torch.backends.mps.is_available():
        pytest.skip("this is a Mac")
    with pytest.raises(UserError, match=r"train.device=mps: .* no Apple GPU here.*device=auto"):
        device.choose("mps")


def test_dropout_on_apples_gpu_is_seeded_by_its_own_generator(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.mps, "manual_seed", seeds.append)
    before = torch.get_rng_state()
    for step, shard in ((0, 0), (0, 1), (1, 0), (0, 0)):
        seed_dropout(torch.device("mps"), 7, step, shard)
    assert seeds[0] == seeds[3] and len(set(seeds)) == 3
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("native", "precision", "frozen", "expected"),
    [
        (True, "auto", True, torch.bfloat16),
        (True, "auto", False, torch.float32),
        (True, "fp32", True, torch.float32),
        (False, "auto", True, torch.float32),
    ],
)
def test_a_cpu_sees_a_frozen_backbones_pictures_in_bfloat16_where_it_has_that(
    monkeypatch, native, precision, frozen, expected
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    machine = device.prepare("cpu", precision, frozen=frozen)
    assert machine.precision == torch.float32
    assert machine.for_frozen().precision == expected
    assert ("features" in machine.environment()) == (expected == torch.bfloat16)
    assert machine.facts()["the precision of frozen features"] == str(machine.for_frozen())
    assert machine.in_float32().precision == torch.float32
