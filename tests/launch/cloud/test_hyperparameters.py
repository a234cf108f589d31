"""What a hyperparameter carries is what the user typed, and Hydra reads the same from it."""

import json
import re

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.cloud import hyperparameters as codec
from launch.cloud.request import Request, check
from tests.conftest import PROJECT
from trainer.common.errors import UserError
from trainer.settings import config

KEYS = ["name", "optim.lr", "data.augment.scale", "model", "+a.b", "++c", "data@x.y"]
NASTY = st.text(
    st.sampled_from("a=,:'\"\\[]{}()$# \t\n\r\x0b\x85\u2028\u00a0é犬🐕%0.1e-+~\x7f\udc80"),
    max_size=30,
)
TYPED = st.one_of(
    NASTY,
    st.text(max_size=30).filter(lambda text: "\0" not in text),
    st.integers().map(str),
    st.floats().map(repr),
    st.sampled_from(
        [
            "null",
            "true",
            "False",
            "1e-3",
            "1_000",
            "",
            '""',
            "[1, 2.5, 'a b']",
            "{a: 1, b: [x, null]}",
            "'it\\'s'",
            "res net",
            "-0",
            "01",
            "inf",
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(TYPED, min_size=50, max_size=50), st.sampled_from(KEYS))
def test_ten_thousand_values_come_back_whatever_they_hold(values, key):
    for value in values:
        encoded = codec.encode([f"{key}={value}"])
        (carried,) = encoded.values()
        json.loads(carried)
        assert carried.isprintable()
        survived = json.loads(json.dumps(encoded).encode())  # hyperparameters.json
        assert codec.decode(survived) == [f"{key}={value}"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=res net", "res net"),
        ("name='a=b, c'", "a=b, c"),
        ('name="1e-3"', "1e-3"),
        ("name=null", None),
        ("name='null'", "null"),
        ("name=", ""),
        ("name='[x]'", "[x]"),
        ("name='café犬'", "café犬"),
        (r"name='it\'s'", "it's"),
        ("name='two\nlines'", "two\nlines"),
        ("name='true'", "true"),
    ],
)
def test_hydra_reads_what_it_would_have_read_on_the_command_line(override, expected):
    config.register()
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        typed = compose("config", [override, "platform=local"])
        carried = compose("config", [*codec.decode(codec.encode([override])), "platform=local"])
    assert typed == carried
    assert typed.name == expected and type(typed.name) is type(expected)


def test_types_of_numbers_lists_and_booleans_arrive():
    overrides = [
        "optim.lr=1e-3",
        "data.augment.scale=[0.5, 1.0]",
        "data.augment.flip=false",
        "train.epochs=3",
        "optim.head_lr=null",
        "model=resnet50",
    ]
    config.register()
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        loaded = config.load(
            compose("config", [*codec.decode(codec.encode(overrides)), "platform=local"])
        )
    assert (loaded.optim.lr, loaded.data.augment.scale, loaded.data.augment.flip) == (
        0.001,
        [0.5, 1.0],
        False,
    )
    assert (loaded.train.epochs, loaded.optim.head_lr, loaded.model.name) == (3, None, "resnet50")


def test_a_tuned_value_stands_for_itself():
    tuned = {
        "optim.lr": "0.0031622776601683795",
        "train.epochs": "7",
        "optim": "adamw",
        "_tuning_objective_metric": "valid_top1",
        "sagemaker_program": '"x"',
    }
    assert codec.decode(tuned) == [
        "optim=adamw",
        "optim.lr=0.0031622776601683795",
        "train.epochs=7",
    ]


def test_deletion_differs_from_an_empty_value():
    assert codec.decode(codec.encode(["~a", "b=", "~c=null"])) == ["~a", "b=", "~c=null"]


def test_order_is_kept_where_it_matters():
    assert codec.decode(codec.encode(["optim.lr=1", "optim=sgd"])) == [
        "optim=sgd",
        "optim.lr=1",
    ]  # Hydra takes options before values anyway
    assert codec.decode(codec.encode(["optim={lr: 2}", "optim.lr=1"])) == [
        "optim={lr: 2}",
        "optim.lr=1",
    ]
    assert codec.decode(codec.encode(["a=1", "a=2"])) == ["a=2"]
    for pair in (["optim.lr=1", "optim={lr: 2}"], ["a=1", "++a=2"]):
        with pytest.raises(UserError, match="SageMaker doesn't keep this order; give"):
            codec.encode(pair)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "name=" + "x" * 255,
            "name: 257 characters, and SageMaker allows 256; "
            "write it into conf/experiment/NAME.yaml",
        ),
        ("name=" + "🐕" * 128, "258 characters"),
        ("--multirun", "a job takes settings only"),
        ("epochs", "a job takes settings only"),
        ("sagemaker_program=x.py", "SageMaker reserves this name"),
        ("name=a\0b", "NUL"),
    ],
)
def test_what_cannot_be_carried_is_refused(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        codec.encode([override])


def test_more_settings_than_sagemaker_takes():
    with pytest.raises(UserError, match="101 settings, and SageMaker allows 100"):
        codec.encode([f"a{number}=1" for number in range(101)])


@settings(max_examples=200, deadline=None)
@given(NASTY.filter(lambda text: "\udc80" not in text))
def test_aws_takes_every_encoded_value(value):
    shape = {
        "TrainingJobName": "a",
        "RoleArn": "arn:aws:iam::000000000000:role/x",
        "OutputDataConfig": {"S3OutputPath": "s3://a"},
    }
    check(
        Request(
            "sagemaker",
            "CreateTrainingJob",
            shape | {"HyperParameters": codec.encode([f"name={value}"])},
        )
    )


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(
        [
            "1",
            "1e-3",
            "null",
            "'a b'",
            "[1,{a: 2}]",
            "{a: [1, x y]}",
            "choice(1,2)",
            "res net",
            '"q"',
            "${oc.env:HOME}",
        ]
    ),
    st.sampled_from(KEYS),
)
def test_the_parsed_override_is_the_same(value, key):
    parse = OverridesParser.create().parse_override
    (carried,) = codec.decode(codec.encode([f"{key}={value}"]))
    assert repr(parse(carried).value()) == repr(parse(f"{key}={value}").value())
