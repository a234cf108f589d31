"""The words of a command line: what may be typed, and the one line for what may not."""

import functools
import shlex
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from launch.targets.base import TargetConfig, targets
from launch.targets.spec import check_target, explained, typed
from tests.conftest import refusal
from trainer.common.command import one_line
from trainer.common.errors import UserError
from trainer.common.paths import expanded
from trainer.settings import config as settings
from trainer.settings import search_space as space
from trainer.settings.compose import CONF, check, compose, explain_settings, first_trial, resolve
from trainer.settings.words import is_one_path, override, parse, readable

SETTINGS = settings.schema()
PATHS = [key for key, entry in SETTINGS.items() if entry.metadata["path"]]

# What a person may call a folder.
NAMES = [
    *("/bilder/äö", "日本", "a#b", "a!b", "a&b", "dog's", 'say "x"', "my dogs", "a=b", "a,b"),
    *("a[1]", "[x]", "{x}", "a(1)", "f(x)", "a:b", "a%20", "a$5", "a;b", "a<b", "a`b", "a^b"),
    *("true", "007", "1e5", "2024.10", "1_000", "nan", "-x", "(a)", "'a'b", "it's 'so'", "a\\b"),
    *("a\tb", "a\nb", "a\u00a0b", "end\\", "#", "'"),
]


def test_what_may_stand_in_a_shell_may_stand_here(configure):
    for first in range(0, len(NAMES), len(PATHS)):
        named = dict(zip(PATHS, NAMES[first : first + len(PATHS)], strict=False))
        typed = [f"{key}={name}" for key, name in named.items()]
        config = dict(flat(configure("model=small_cnn", *typed)))
        assert {key: config[key] for key in named} == named


@pytest.mark.parametrize("name", NAMES)
def test_a_word_read_once_more_means_the_same_in_a_run_and_in_a_sweep(name):
    for key in PATHS:
        (word,) = words = readable([f"{key}={name}"])
        assert parse(words)[0].value() == name and readable(words) == words
        fixed, swept = space.split([f"{key}={name}", "optim.lr=1,2"])
        if "," not in name or key.startswith("platform."):
            assert fixed == [word] and set(swept) == {"optim.lr"}


def test_a_comma_in_a_sweeps_path_is_one_where_the_whole_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a,b", "a b,c", "a,b(1)"):
        (tmp_path / name).mkdir()
        for path in (name, f"~/{name}"):
            fixed, swept = space.split([f"data.root={path}", "optim.lr=1,2"])
            assert [each.value() for each in parse(fixed)] == [path] and set(swept) == {"optim.lr"}
            assert is_one_path(f"data.root={path}")
    fixed, swept = space.split(["data.root='a,b'"])
    assert parse(fixed)[0].value() == "a,b" and not swept
    for word in ("data.root=a,c", "data.root='a,b','a b,c'", "seed=1,2", "data.root=a\0b,c"):
        assert not is_one_path(word)
    assert set(space.split(["data.root=a,c"])[1]) == {"data.root"}


@hypothesis_settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["C"]), min_size=1))
def test_any_text_is_a_path_and_stays_itself(name):
    special = ("choice(", "range(", "interval(", "glob(", "shuffle(", "sort(", "tag(", "extend_")
    if name.strip() != name or name.lower() in ("null", "???") or "\\" in name or "$" in name:
        return  # Hydra's own
    if name[0] + name[-1] in ("''", '""') or name.lower().startswith((*special, "str(", "int(")):
        return
    (word,) = readable([f"data.root={name}"])
    assert parse([word])[0].value() == name


def test_a_path_that_needs_no_quotes_has_none():
    """Commands that are shown to be copied have it: data.root="/photos" needs two kinds of them."""
    assert override("data.root", "/photos/dogs-1") == "data.root=/photos/dogs-1"
    assert override("data.root", "/photos/my dogs") == 'data.root="/photos/my dogs"'


def test_what_hydras_grammar_means_stays(configure):
    typed = [
        *("optim.lr=1e-3", "data.augment.scale=[0.5,1]", "train.ema_decay=null", "name='007'"),
        *("data.root='my, dogs'", "data.root=${oc.env:HOME}/x", "data.train=null", "data=folder"),
        *("platform.cache=${platform.runs}/cache", "experiment=[dog_breeds]", "data.root=a\\,b"),
    ]
    assert readable(typed) == typed
    swept = [
        *("optim.lr=1,2", "optim.lr=interval(1,2)", "seed=range(0,3)", "model=a,b"),
        *("model.name=resnet18,resnet50", "model.weights='a b',c", "data.root=choice(a,b)"),
    ]
    assert readable(swept, sweeps=True) == swept


def test_home_and_environment_are_meant_as_a_shell_means_them(configure, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/big disk")
    for word in ("~/x", "'~/x'", "$HOME/x", "${HOME}/x", "'${HOME}/x'", "${oc.env:HOME}/x"):
        config = dict(flat(configure("model=small_cnn", *(f"{key}={word}" for key in PATHS))))
        assert {config[key] for key in PATHS} == {"/home/me/x"}
    assert configure("platform.runs=$SCRATCH/a,b").platform.runs == "/big disk/a,b"
    assert configure("platform.cache=${platform.runs}/c").platform.cache == "runs/c"
    assert expanded("./~/x") == "./~/x" and expanded("a~") == "a~"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a$nobody").mkdir()
    assert expanded("a$nobody") == "a$nobody"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("platform.runs=$NO_SUCH/x", ["platform.runs=$NO_SUCH/x", "export NO_SUCH="]),
        ("platform.runs=${NO_SUCH}/x", ["platform.runs=${NO_SUCH}/x", "export NO_SUCH="]),
        ("data.root=~no-such-user/x", ["data.root=~no-such-user/x", "no user", "./~no-such"]),
        ("data.root=a${", ["data.root=a${", "can't hold ${"]),
        ("data.root=", ["data.root=", "empty"]),
        ("data.root=???", ["data.root", "give data.root="]),
        ("data=~/dogs", ["data=~/dogs", "'data.root=~/dogs'"]),
        ("experiment=~/x", ["experiment=~/x", "dog_breeds"]),
        ("optim.lr=1#", ["optim.lr=1#", "float"]),
        ("model.mean=[0.5;1;1]", ["model.mean=[0.5;1;1]", "a list"]),
        ("optim.lr=1,2", ["optim.lr=1,2", "add -m"]),
        ("model.name=a,b", ["model.name=a,b", "add -m"]),
        ("seed", ["seed", "seed=..."]),
        ("dögs=3", ["dögs", "no such setting"]),
        ("hydra.job.name=ä", ["hydra.job.name=ä", "ä can't", "'hydra.job.name=\"ä\"'"]),
        ("model=a,b", ["model=a,b", "add -m"]),
        ("+data.root=a b", ["+data.root=a b", "'data.root=a b'"]),
        ("train={epohs: 3}", ["train.epohs", "did you mean train.epochs"]),
        ("experiment=[dog_bread]", ["experiment=dog_bread", "did you mean dog_breeds?"]),
        ("sweep.space.optim.lr=1", ["sweep.space.optim.lr=1", "-m"]),
        ("hydra.sweep.dir=/x", ["hydra.sweep.dir=/x", "platform.runs=DIR"]),
        ("hydra/launcher=joblib", ["hydra/launcher=joblib", "sweep.parallel=N"]),
    ],
)
def test_what_may_not_is_one_line(word, said):
    line = refusal(word)
    assert line is not None and "\n" not in line
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (
            "data.root=/a#1,/b#2",
            """# can't stand unquoted in a list; give 'data.root="/a#1","/b#2"'""",
        ),
        ("optim.lr=interval(1,2", "interval(low,high)"),
        ("train.batch_size=1,#", "# can't be read as a range"),
    ],
)
def test_a_range_that_cannot_be_read_is_one_line_with_the_quoted_word(word, said):
    with pytest.raises(UserError) as raised:
        space.split([word])
    assert said in str(raised.value) and "\n" not in str(raised.value)
    if "give" in said:
        (typed,) = shlex.split(said.split("give ")[1])
        assert space.split([typed])[1] == {"data.root": '"/a#1","/b#2"'}


def test_a_setting_that_must_be_given_can_be_swept(configure):
    fixed, swept = space.split(["model=torchvision", "model.name=resnet18,resnet50"])
    base = configure(*fixed, *space.firsts(swept))
    assert base.model.name == "resnet18"
    assert space.load(base, swept, fixed).space == (
        space.Categorical("model.name", ("resnet18", "resnet50")),
    )


def test_so_can_one_of_the_space_in_conf(tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "sweep/names.yaml").write_text(
        "defaults: [lists]\nspace:\n  model.name: resnet18,resnet50\n  optim.lr: 1,2\n"
    )
    words = first_trial(["sweep=names", "model=torchvision"], {}, conf)
    assert words == ["sweep=names", "model=torchvision", "model.name=resnet18"]
    sweep = space.load(compose(words, conf))
    assert sweep.space[0] == space.Categorical("model.name", ("resnet18", "resnet50"))


# --- every setting, given everything ---

NUMBERS = ["nan", "inf", "-1", "0", "18446744073709551616", "1e400", "1.5"]
OTHERS = ["a word", "null", "[1,2]", "[nan,1,1]", "[[1],[1]]", "{a: 1}", "true", "", "[", ","]


def test_every_setting_takes_a_value_or_refuses_it_in_one_line(configure):
    composed = resolve(["data=folder", "data.root=x"]).composed
    check_all(composed, SETTINGS, settings.load)


@pytest.mark.parametrize("name", ["ec2", "sagemaker", "notebook"])
def test_every_setting_of_a_target_takes_a_value_or_refuses_it_in_one_line(name):
    config = targets()[name].config
    entries = settings.schema(config, "target.")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("launch", [f"target={name}"])
    check_all(composed, entries, lambda composed: checked(composed, config))


def test_every_number_has_two_bounds():
    for schema in (SETTINGS, *(settings.schema(each.config) for each in targets().values())):
        for key, entry in schema.items():
            if settings.kinds(entry) & {int, float, list[float]}:
                lower = entry.metadata["above"], entry.metadata["at_least"]
                upper = entry.metadata["below"], entry.metadata["at_most"]
                assert lower != (None, None) and upper != (None, None), key


def test_every_setting_may_not_be_taken_away():
    for key in SETTINGS:
        with pytest.raises(UserError, match=f"~{key}: a setting can't be taken away"):
            check([f"~{key}"], list(SETTINGS), {})


def check_all(
    composed: DictConfig, schema: dict[str, Any], load: Callable[[DictConfig], Any]
) -> None:
    plain = OmegaConf.to_container(composed)
    for key in schema:
        before = functools.reduce(lambda node, part: node[part], key.split("."), plain)
        for value in (*NUMBERS, *OTHERS):
            word = f"{key}={value}"
            line, taken = applied(word, before, composed, load, schema)
            if line is None:
                assert took(taken, value), f"{word} was taken as {taken!r}"
            else:
                assert "\n" not in line and key.split(".")[-1] in line, f"{word}: {line}"
                assert "Cannot" not in line and "[0]" not in line, f"{word}: {line}"


def took(taken: Any, value: str) -> bool:
    """Whether a setting's value is what was typed, and not something made of it."""
    if isinstance(taken, bool):
        return value in ("0", "1", "true", "false")
    if isinstance(taken, int | float):
        return float(taken) == float(value)
    if isinstance(taken, list):
        return repr([float(each) for each in taken]) == repr(
            [float(each) for each in value.strip("[]").split(",")]
        )
    return taken == value or (value == "null" and taken is None)


def applied(
    word: str, before: Any, composed: DictConfig, load: Callable[[DictConfig], Any], schema: Any
) -> tuple[str | None, Any]:
    """Return the line that refuses a word, or what its setting is with it; it is `before` again.

    It is put into what Hydra has composed by Hydra's own function: to compose all of it for each of
    a thousand words takes minutes.
    """
    key = word.partition("=")[0]
    try:
        check([word], list(schema), {})
        words = parse(readable([word], schema))
        ConfigLoaderImpl._apply_overrides_to_config(words, composed)
        # What isn't given is filled in by `load`, so what was taken is looked at before it.
        taken = OmegaConf.select(composed, key)
        load(composed)
        if OmegaConf.is_config(taken):
            taken = OmegaConf.to_container(taken)
        return None, taken
    except Exception as error:
        line = one_line(error, explain_settings)
        assert line is not None, f"{word}: {error!r}"
        return line, None
    finally:
        OmegaConf.update(composed, key, before, merge=False)


def checked(composed: DictConfig, schema: type[TargetConfig]) -> None:
    """Check a target as `load_target` does."""
    with explained(settings.keys(schema, "target.")):
        check_target(typed(composed, schema))


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value, _ in settings.walk(config, prefix):
        yield key, value
