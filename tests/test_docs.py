"""Every command that README.md and docs/ show is run, on small pictures and against AWS as a process; pages that are generated are current."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests import reference
from tests.conftest import PROJECT, make_pictures, run_trainer
from tests.launch.conftest import Cloud, founded
from tests.packages import make_contents, make_network
from trainer import space
from trainer.errors import MISTAKE, OK
from trainer.package import build

PAGES = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *sorted((PROJECT / "docs").glob("*.md"))]
PROGRAMS = ("make", "python", "curl", "pip", "git", "aws", "torchrun", "docker")
SMALL = ("train.epochs=1", "train.batch_size=8", "data.size=32", "data.resize=32", "data.workers=0", "platform=local")


def commands(prefix: str) -> list[str]:
    """The lines of the pages' fenced blocks that begin with `prefix`, without comments, each once."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                found.append(re.sub(r"\s{2,}#.*", "", line).strip())
    return sorted({line for line in found if line.startswith(prefix)})


def test_every_program_that_is_shown_is_known_here():
    shown = {line.split()[0] for line in commands("") if line and re.match(r"[a-z]+ ", line)}
    assert shown & set(PROGRAMS) <= {"make", "python", "curl"}, "a test below must run it"


@pytest.mark.parametrize("command", commands("make "))
def test_a_make_target_is_there(command):
    done = subprocess.run(["make", "-n", *shlex.split(command)[1:]], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the trainer ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the pictures and files that the commands name."""
    cwd = tmp_path_factory.mktemp("docs")
    for name in ("dogImages", "pets37"):
        make_pictures(cwd / name, {"train": 8, "valid": 3, "test": 3}, size=40)
    Image.new("RGB", (60, 50), "green").save(cwd / "dog.jpg")
    build(make_network(), make_contents(cwd / "golden"), cwd / "model.tar.gz")
    return cwd


def here(command: str, place: Path) -> list[str]:
    """The arguments behind `python -m PROGRAM`, with this machine's files in the place of the reader's."""
    command = command.replace("/data/dogImages", str(place / "dogImages")).replace("data.root=pets37", f"data.root={place}/pets37")
    return shlex.split(command.replace("runs/NAME/model.tar.gz", str(place / "model.tar.gz")))[3:]


@pytest.mark.parametrize("command", [line for line in commands("python -m trainer") if "--help" not in line])
def test_a_training_command_trains(place, tmp_path, configure, command):
    arguments = here(command, place)
    configure(*space.split([argument for argument in arguments if argument != "-m"])[0])  # as it stands
    if "optuna" in command:
        pytest.importorskip("optuna")
    # ... and on a network of this machine's size.
    arguments = [argument for argument in arguments if not argument.startswith(("model.name=", "model=", "experiment="))]
    own = [] if "data=folder" in command else ["data=folder", f"data.root={place}/dogImages"]
    arguments = [argument for argument in arguments if not argument.startswith(("model.weights=", "train.epochs=", "sweep.trials="))]
    arguments += [*own, "model=small_cnn", "model.weights=null", "sweep.trials=2", "sweep.points=2", *SMALL]
    if "-m" not in arguments:
        arguments += ["name=run"]
    swept = {argument.split("=")[0] for argument in arguments if "," in argument and not argument.split("=")[1].startswith("[")}
    arguments = [argument for argument in arguments if not (argument in SMALL and argument.split("=")[0] in swept)]
    code, said = run_trainer(tmp_path, *arguments)
    assert code == OK, said


# --- launch ---


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with founded(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        yield cloud


@pytest.mark.parametrize("command", sorted(commands("python -m launch"), key=lambda line: line.endswith(" down")))
def test_a_launch_command_is_understood(place, account, command):
    verb, *rest = here(command, place)
    if verb == "rehearse":  # tests/launch/test_rehearse.py rehearses; here, that these settings fit together
        verb = "plan"
    rest = [argument for argument in rest if argument not in ("--wait", "--follow")]
    code, said = account.launch(verb, *rest, *(["--yes"] if verb in ("up", "down") else []), cwd=place)
    # A run that is not complete can't be fetched: what is asked here is that the command is one.
    assert code == OK or (verb in ("fetch", "cost", "logs", "stop", "audit", "prices") and code in (OK, MISTAKE)), said
    assert "usage:" not in said and "Traceback" not in said


# --- serving ---


@pytest.mark.parametrize("command", [line for line in commands("python -m serving") if line.split()[3] not in ("serve", "bench")])
def test_a_serving_command_is_understood(place, account, command):
    done = subprocess.run(
        [sys.executable, "-m", "serving", *here(command, place), *(["--yes"] if "deploy" in command or "destroy" in command else [])],
        cwd=place, env=account.environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode in (OK, MISTAKE), done.stdout + done.stderr
    assert "usage:" not in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


# --- generated pages, and what the pages say ---


def test_the_configuration_page_is_current():
    assert reference.PAGE.read_text() == reference.page(), "run make docs"


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    code = "".join(path.read_text() for folder in ("trainer", "launch", "serving") for path in (PROJECT / folder).rglob("*.py"))
    plain = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", code))
    for message in re.findall(r"^\| `([^`]+)` \|", (PROJECT / "docs/troubleshooting.md").read_text(), re.MULTILINE):
        assert re.search(message, plain) or message in plain, message
