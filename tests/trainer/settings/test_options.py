"""--help with what each setting means, --version, and options that don't exist."""

import importlib.metadata

import pytest

from trainer import __version__
from trainer.common.errors import UserError
from trainer.settings import config as settings
from trainer.settings import options, reference


def test_help_shows_each_setting_with_its_meaning(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = options.answer(["--help"])
    assert page is not None
    for key in settings.schema():
        assert f"\n  {key}=" in page
    meanings = [each for entries in reference.trainer_settings().values() for each in entries]
    together = " ".join(page.split())
    assert all(each.meaning and " ".join(each.meaning.split()) in together for each in meanings)
    assert max(map(len, page.splitlines())) <= 100


def test_help_of_a_section_or_a_part_of_a_name():
    assert set(reference.page("optim").split()) >= {"optim.lr=null", "optim=adamw|sgd"}
    page = options.answer(["--help", "momentum"])
    assert page is not None
    assert "optim.momentum=" in page
    assert page.count("=0.") == 1
    with pytest.raises(UserError, match=r"optim\.momentm: .* did you mean optim\.momentum"):
        reference.page("optim.momentm")


def test_the_version_is_the_projects_and_torchs():
    assert options.answer(["--version"]) == options.versions()
    assert f"packhorse {__version__}, torch {importlib.metadata.version('torch')}" in (
        options.versions()
    )
    assert importlib.metadata.version("packhorse") == __version__


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--epochs", "5"], "--epochs: .*: train.epochs=5$"),
        (["--batch-size=8"], "--batch-size=8: .*: train.batch_size=8$"),
        (["--lr"], "--lr: .*: optim.lr=...$"),
        (["seed=1", "--seed", "data.size=2"], "--seed: .*: seed=...$"),
        (["--wrong"], "--wrong: there is no such option; .* --help shows them$"),
    ],
)
def test_an_option_that_is_none_is_answered_with_the_setting(words, line):
    with pytest.raises(UserError, match=line):
        options.answer(words)


@pytest.mark.parametrize("words", [["seed=1"], ["--cfg", "job"], ["--resolve", "-c", "job"], []])
def test_hydras_own_options_stay(words):
    assert options.answer(words) is None
