from collections.abc import Callable

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import PROJECT
from trainer.common.errors import UserError
from trainer.settings import search_space as space
from trainer.settings import words
from trainer.settings.config import Config
from trainer.settings.search_space import Categorical, Continuous, Integer

Configure = Callable[..., Config]

RANGES = {
    "optim.lr=interval(1e-4,1)": Continuous("optim.lr", 1e-4, 1.0, log=False),
    "optim.lr=tag(log,interval(1e-4,1e-1))": Continuous("optim.lr", 1e-4, 1e-1, log=True),
    "train.ema_decay=interval(0.9,0.99)": Continuous("train.ema_decay", 0.9, 0.99, log=False),
    "train.batch_size=interval(8,64)": Integer("train.batch_size", 8, 64, log=False),
    "train.batch_size=tag(log,interval(8,64))": Integer("train.batch_size", 8, 64, log=True),
    "optim.lr=1,2": Categorical("optim.lr", (1.0, 2.0)),
    "seed=range(0,3)": Categorical("seed", (0, 1, 2)),
    "data.augment.flip=true,false": Categorical("data.augment.flip", (True, False)),
    "model.head_hidden=null,128": Categorical("model.head_hidden", (None, 128)),
    "data.augment.scale=[0.5,1],[0.25,1]": Categorical(
        "data.augment.scale", ([0.5, 1.0], [0.25, 1.0])
    ),
    "model.weights='a b',choice.pth": Categorical("model.weights", ("a b", "choice.pth")),
    "model=resnet50,mobilenet_v2": Categorical("model", ("resnet50", "mobilenet_v2")),
}


@pytest.mark.parametrize("override", RANGES)
def test_a_range_has_the_type_of_its_setting(override: str, configure: Configure) -> None:
    key, text = override.split("=", 1)
    found = space.parameter(key, text, configure())
    assert found == RANGES[override]
    kind = type(found.choices[0]) if isinstance(found, Categorical) else type(found.low)
    assert all(type(value) in (kind, int) for value in space.grid(found, 4))


MISTAKES = {
    "optim.lrr=1,2": "did you mean optim.lr",
    "optim.lr=5": "is not a range",
    "optim.lr=glob(*)": "is not a range",
    "optim.lr=[1": "can't be read",
    "optim.lr=-1,1": "above 0",
    "optim.lr=interval(0,1)": "above 0",
    "optim.lr=a,b": "of the wrong type",
    "optim.lr=1,1.0": "names a value twice",
    "optim.lr=tag(log,interval(0.1,0.01))": "low below high",
    "optim.lr=tag(log2,interval(0.1,1))": "log2 is not known",
    "optim.weight_decay=tag(log,interval(0,1))": "logarithmic scale can't contain 0",
    "train.batch_size=interval(8.5,64)": "integer",
    "optim.name=interval(1,2)": "not a number",
    "optim.name=adamw,lion": "adamw, sgd",
    "name=a,b": "can't try this setting",
    "platform.cache=a,b": "can't try this setting",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_wrong_range_is_one_line_that_says_why(override: str, configure: Configure) -> None:
    key, text = override.split("=", 1)
    with pytest.raises(UserError) as raised:
        space.parameter(key, text, configure())
    assert (
        MISTAKES[override] in str(raised.value)
        and key in str(raised.value)
        and "\n" not in str(raised.value)
    )


@pytest.mark.parametrize(
    "option",
    sorted(path.stem for path in (PROJECT / "conf/sweep").glob("*.yaml") if path.stem != "lists"),
)
def test_every_space_in_conf_loads(option: str, configure: Configure) -> None:
    assert space.load(configure(f"sweep={option}")).space


def test_ranges_of_the_command_line_go_before_those_of_the_space(configure: Configure) -> None:
    fixed, swept = space.split(["sweep=lr_batch", "optim.lr=0.1,0.2", "train.epochs=3"])
    assert fixed == ["sweep=lr_batch", "train.epochs=3"]
    assert space.load(configure(*fixed), swept).space == (
        Categorical("optim.lr", (0.1, 0.2)),
        Categorical("train.batch_size", (16, 32, 64)),
    )
    fixed, swept = space.split(["sweep=lr_batch", "train.batch_size=16"])
    assert [parameter.key for parameter in space.load(configure(*fixed), swept, fixed).space] == [
        "optim.lr"
    ]  # one value is no range
    with pytest.raises(UserError, match="nothing to try"):
        space.load(configure())


def test_a_grid_holds_both_bounds_and_is_even_on_its_scale() -> None:
    assert space.grid(Continuous("x", 1e-4, 1e-1, log=True), 4) == (1e-4, 1e-3, 1e-2, 1e-1)
    assert space.grid(Continuous("x", 0.0, 1.0, log=False), 5) == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert space.grid(Integer("x", 8, 64, log=True), 4) == (8, 16, 32, 64)
    assert space.grid(Integer("x", 1, 2, log=False), 4) == (1, 2)  # no value twice


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["C"]))
)


@settings(max_examples=500, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_what_hydra_reads_is_the_value_of_the_same_type(value: words.Value) -> None:
    def plain(read):
        return (
            [plain(each) for each in read]
            if isinstance(read, list)
            else getattr(read, "text", read)
        )

    (read,) = OverridesParser.create().parse_overrides([words.override("key", value)])
    assert repr(plain(read.value())) == repr(value)
