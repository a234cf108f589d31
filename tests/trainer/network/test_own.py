"""A person's own network, loss and metric: a Python file, held to its contract."""

import json
import re
import sys
import tarfile

import pytest
import torch

from tests.conftest import QUICK, refusal, run_trainer
from trainer.common.errors import MISTAKE, OK, UserError
from trainer.network import own

FILE = """
import torch
from torch import nn
from torch.nn import functional

def network(size):
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers), 32

def loss(output, target):  # focal, Lin et al. 2017
    log = functional.log_softmax(output, 1)
    if target.ndim == 1:
        target = functional.one_hot(target, output.shape[1])
    return -(target * (1 - log.exp()) ** 2 * log).sum()

def metric(output, target):
    hits = output.argmax(1) == target
    return {"worst": min(hits[target == each].float().mean() for each in target.unique())}
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def test_a_run_with_ones_own_network_loss_and_metric(tmp_path, pictures, write):
    write(FILE)
    words = (*QUICK, f"data.root={pictures}", "name=own", "model=own", "model.code=mine.py")
    code, said = run_trainer(tmp_path, *words)
    assert code == OK, said
    result = json.loads((tmp_path / "runs/own/result.json").read_text())
    rows = [
        json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()
    ]
    assert 0 <= result["worst"] <= result["top1"]
    assert all("valid_worst" in row for row in rows if "train_loss" in row)
    assert rows[-1]["test_worst"] == result["worst"]
    assert result["identity"]["model.code"] == own.digest(str(tmp_path / "mine.py"))
    with tarfile.open(tmp_path / "runs/own/model.tar.gz") as archive:
        assert json.load(archive.extractfile("package.json"))["metrics"]["test_worst"] >= 0
    write(FILE + "\n# another loss, for all that anybody knows\n")
    code, said = run_trainer(tmp_path, *words)
    assert code == MISTAKE and "this run began with other settings (model.code: " in said


def test_what_a_file_defines_is_used_and_the_rest_is_everybodys(write):
    mine = own.load(write(FILE))
    backbone, width = mine.backbone(16)
    assert backbone(torch.zeros(1, 3, 16, 16)).shape == (1, width) and backbone.training
    for mixes in (False, True):
        mine.check_loss(5, mixes)
    figures = mine.figures(torch.eye(2), torch.tensor([0, 0]), "valid")
    assert figures == {"valid_worst": 0.5}
    alone = own.load(write("def metric(output, target): return {}"))
    assert (alone.network, alone.loss) == (None, None)
    assert own.load(None).figures(torch.eye(2), torch.tensor([0, 1]), "valid") == {}


NETWORK = "from torch import nn\ndef network(size):\n    return "


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1", "it defines none of network, loss, metric"),
        ("import nothing_like_it", ", line 1: import: ModuleNotFoundError: No module named"),
        ("def network(size)\n  pass", ", line 1: import: SyntaxError: expected ':'"),
        (NETWORK + "nn.Flatten()", "network(size) must return (nn.Module, width)"),
        (
            NETWORK + "nn.Flatten(), 7",
            "for 2 images of 16 px the network returns [2, 768]; expected [2, 7]",
        ),
        (NETWORK + "nn.Linear(5, 2), 2", ": the network: RuntimeError: "),
        (NETWORK + "size / 0, 2", ", line 3: network: ZeroDivisionError: division by zero"),
        ("def loss(output, target): return output.mean()", "must be the sum over the images"),
        ("def loss(output, target): return output.detach().sum()", "a scalar with a gradient"),
        ("def loss(output, target): return output", "a scalar with a gradient"),
        ("def loss(output, target):\n  raise KeyError", ", line 2: loss: KeyError"),
        (
            "def metric(output, target): return {'top1': 1}",
            "a figure named 'top1'; allowed: a Python name",
        ),
        ("def metric(output, target): return {'a': None}", "metric: TypeError: "),
    ],
)
def test_what_keeps_no_contract_is_one_line(write, text, line):
    path = write(text)
    with pytest.raises(UserError) as error:
        mine = own.load(path)
        if mine.network:
            mine.backbone(16)
        mine.check_loss(3, False)
        mine.figures(torch.eye(3), torch.arange(3), "valid")
    assert str(error.value).startswith(f"model.code={path}")
    assert line in str(error.value) and "\n" not in str(error.value)


LIBRARY = {
    "kennel/__init__.py": "from kennel import parts",
    "kennel/parts.py": "def figures(output, target):\n    return {'worst': 0.25}",
    "kennel/dogs.py": """
from kennel.parts import figures as metric
class Strict:
    def metric(output, target):
        return 1 / 0
""",
    "kennel-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: kennel\nVersion: 1.0\n",
    "kennel-1.0.dist-info/entry_points.txt": "[packhorse]\nstrict = kennel.dogs:Strict\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """An installed package that has code for us, and offers some of it."""
    for name, text in LIBRARY.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.split(".")[0] == "kennel"]:
        del sys.modules[name]


def test_code_is_named_as_a_module_or_as_what_a_package_offers(library):
    mine = own.load("kennel.dogs")
    assert mine.figures(torch.eye(2), torch.tensor([0, 1]), "valid") == {"valid_worst": 0.25}
    place = "model.code=strict, line 5 of dogs.py: metric: ZeroDivisionError: division by zero"
    with pytest.raises(UserError, match=re.escape(place)):
        own.load("strict").figures(torch.eye(2), torch.tensor([0, 1]), "valid")
    before = own.digest("strict"), own.digest("kennel.dogs")
    assert before[0] == before[1], "all of the package is what it is"
    (library / "kennel/parts.py").write_text("def figures(output, target):\n    return {}")
    assert own.digest("strict") != before[0]
    for said, line in (
        ("kennel.cats", "import: ModuleNotFoundError: No module named 'kennel.cats'"),
        (
            "kennels",
            r"no installed package offers it \(entry points of the group packhorse \(.*str",
        ),
    ):
        with pytest.raises(UserError, match=line):
            own.load(said)


def test_what_can_be_known_at_once_is_refused_at_once(tmp_path, pictures):
    assert "model=own without model.code: give model.code=FILE" in refusal("model=own")
    code, said = run_trainer(
        tmp_path, f"data.root={pictures}", "model=own", "model.code=nowhere.py"
    )
    assert code == MISTAKE and "error: model.code=nowhere.py: there is no such file" in said
