"""What imports what: the design's walls.

Read from the syntax of every module, so that a new one is held to them too; and, since imports are
also made by name and by other packages, seen in a few fresh processes.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import PROJECT

PROGRAMS = ("trainer", "launch", "serving")

# From below to above: a room imports only from those before it.
LAYERS = {
    "trainer": (
        "common", "settings", "images", "distributed",
        "network", "training", "results", "sweep", "__main__",
    ),
    "launch": ("cloud", "targets", "audit", "local", "verbs", "__main__"),
}  # fmt: skip
# What of another program a program may use. A name stands for all below it.
BORROWS = {
    "trainer": (),
    "launch": ("trainer.settings", "trainer.common", "trainer.images"),
    "serving": (
        "trainer.images",
        "trainer.common",
        "trainer.network",
        "trainer.results",
        "launch.cloud",
    ),
}
# The one arrow beside these: in a container, the trainer is called and not started, so that what
# ended it can be told to SageMaker. What Python imports (launch/python) is both of the others. And
# the runs in the bucket stand in the trainer's table of runs.
EXCEPTIONS = {
    ("launch.local", "trainer.__main__"),
    ("launch.verbs", "trainer.runs"),
    ("launch.python", "serving.backends"),
    ("launch.python", "serving.bulk"),
    ("launch.python", "serving.package"),
    ("launch.python", "serving.locate"),
    ("launch.python", "serving.sources"),
    ("launch.python", "trainer.results"),
    ("launch.python", "trainer.training"),
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the three programs, by its dotted name; a package by its folder's."""
    paths = [path for program in PROGRAMS for path in sorted((PROJECT / program).rglob("*.py"))]
    dotted = {".".join(path.relative_to(PROJECT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def room(module: str) -> str:
    """The folder of a module, two names deep; a file beside the folders is a room of its own."""
    return ".".join(module.split(".")[:2])


def named(node: ast.AST) -> Iterator[str]:
    """The modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        assert node.module and not node.level, "imports are absolute here"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules() else node.module


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: not functions, nor what is for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_import(child)


@cache
def imports(module: str, everywhere: bool = False) -> frozenset[str]:
    """What a module imports as it is imported; everywhere: or later."""
    tree = ast.parse(modules()[module].read_text())
    nodes = ast.walk(tree) if everywhere else at_import(tree)
    return frozenset(name for node in nodes for name in named(node))


def loaded_with(module: str) -> set[str]:
    """All that is loaded with a module: other packages by their first name, ours in full."""
    loaded: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        own = [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]
        for each in [part for part in own if part in modules()] or parts[:1]:
            if each not in loaded:
                loaded.add(each)
                waiting += imports(each) if each in modules() else []
    return loaded


@cache
def arrows() -> dict[tuple[str, str], set[str]]:
    """(room, another room that it imports from): the modules that do."""
    found: dict[tuple[str, str], set[str]] = {}
    for module in modules():
        for name in imports(module, everywhere=True) & modules().keys():
            if room(name) != room(module) and "." in name:
                found.setdefault((room(module), room(name)), set()).add(module)
    return found


def below(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(f"{each}.") for each in allowed)


# --- rooms ---


def test_no_room_imports_one_above_it():
    wrong = {}
    for (source, used), importing in arrows().items():
        (program, place), (other, other_place) = source.split("."), used.split(".")
        order = LAYERS.get(program, ())
        known = program == other and {place, other_place} <= set(order)
        if known and order.index(other_place) > order.index(place):
            wrong[source, used] = importing
    assert {arrow: who for arrow, who in wrong.items() if arrow not in EXCEPTIONS} == {}


def test_rooms_make_no_circle():
    """Arrows from or to where none goes on are taken away until none is left, or a circle."""
    left = {arrow for arrow in arrows() if arrow not in EXCEPTIONS}
    while True:
        inner = {source for source, _ in left} & {used for _, used in left}
        kept = {arrow for arrow in left if set(arrow) <= inner}
        if kept == left:
            break
        left = kept
    assert sorted(left) == []


def test_a_program_takes_from_another_what_it_may():
    wrong = {
        (source, used): importing
        for (source, used), importing in arrows().items()
        if source.split(".")[0] != used.split(".")[0]
        if not below(used, BORROWS[source.split(".")[0]])
    }
    assert {arrow: who for arrow, who in wrong.items() if arrow not in EXCEPTIONS} == {}


def test_an_exception_that_nothing_needs_is_struck_out():
    assert set() == EXCEPTIONS - arrows().keys()


def late_imports(module: str) -> Iterator[tuple[int, bool]]:
    """The line of each import inside a function, and whether the lines above it say why."""
    text = modules()[module].read_text()
    lines = text.splitlines()
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    above = lines[max(function.lineno, node.lineno - 6) : node.lineno]
                    yield node.lineno, any("imported here" in line for line in above)


def test_an_import_inside_a_function_says_why():
    """Each is a slow or an optional dependency: `# imported here: ...`."""
    silent = {
        module: numbers
        for module in modules()
        if (numbers := sorted({line for line, said in late_imports(module) if not said}))
    }
    assert silent == {}


# --- packages ---


def loading(names: list[str], unwanted: set[str]) -> dict[str, set[str]]:
    """The modules that load something unwanted, and what."""
    assert names, "there is nothing to look at"
    return {name: both for name in names if (both := loaded_with(name) & unwanted)}


def test_the_trainer_knows_neither_aws_nor_the_other_programs():
    names = [name for name in modules() if below(name, ("trainer",))]
    assert loading(names, {"boto3", "botocore", "launch", "serving"}) == {}


def test_launch_never_loads_torch():
    names = [name for name in modules() if below(name, ("launch",))]
    assert loading(names, {"torch", "torchvision"}) == {}


def test_what_answers_requests_loads_neither_torch_nor_hydra_nor_launch():
    """Only what runs on the user's machine (deploy, bench) takes launch's way to AWS."""
    names = [
        name
        for name in modules()
        if below(name, ("serving",)) and not below(name, ("serving.deploy", "serving.bench"))
    ]
    unwanted = {"torch", "torchvision", "hydra", "omegaconf", "boto3", "launch"}
    assert loading(names, unwanted) == {}


@pytest.mark.parametrize(
    "place",
    [
        "trainer.settings",
        "trainer.common",
        "trainer.images.datasets",
        "trainer.images.folder",
        "trainer.training.run",
        "trainer.distributed.world",
    ],
)
def test_settings_and_folders_and_the_world_are_read_without_torch(place):
    names = [name for name in modules() if below(name, (place,))]
    of_torch = {"trainer.common.randomness", "trainer.common.threads"}
    names = [name for name in names if name not in of_torch]
    assert loading(names, {"torch", "torchvision"}) == {}


def test_the_one_preprocessing_needs_pillow_and_numpy_alone():
    outside = {name for name in loaded_with("trainer.images.decode") if "." not in name}
    assert outside - sys.stdlib_module_names <= {"PIL", "numpy", "trainer"}


def test_what_an_answer_is_made_by_needs_numpy_alone():
    outside = {name for name in loaded_with("trainer.results.prediction") if "." not in name}
    assert outside - sys.stdlib_module_names <= {"numpy", "trainer"}


def test_serving_takes_of_the_trainers_results_what_needs_numpy_alone():
    takers = {
        used
        for module in modules()
        for used in imports(module, everywhere=True)
        if below(module, ("serving",)) and below(used, ("trainer.results",))
    }
    answers = {"trainer.results.calibrate", "trainer.results.prediction"}
    # The last one by `evaluate` alone, when it is asked for.
    assert takers == answers | {"trainer.results.predictions", "trainer.results.evaluation"}


# --- the same in processes ---


def loaded_by(code: str) -> set[str]:
    """The top-level names of all modules that a process has loaded after running `code`."""
    script = f"import sys\n{code}\nprint('loaded', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=PROJECT,
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("loaded", 1)[1].split())


def import_all(program: str) -> str:
    """The statement that imports a program.

    But for what of serving talks to AWS, and for what Python imports by another name.
    """
    others = ("serving.deploy", "launch.python")
    names = [name for name in modules() if below(name, (program,)) and not below(name, others)]
    return "import " + ", ".join(names)


@pytest.mark.parametrize(
    ("program", "unwanted"),
    [
        ("trainer", {"boto3", "botocore", "launch", "serving"}),
        ("launch", {"torch", "torchvision"}),
        ("serving", {"torch", "torchvision", "hydra", "omegaconf", "boto3"}),
    ],
)
def test_all_modules_of_a_program_together(program, unwanted):
    assert loaded_by(import_all(program)).isdisjoint(unwanted)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_answered_without_torch(program):
    code = f"""
import runpy
sys.argv = ["{program}", "--help"]
try:
    runpy.run_module("{program}", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""
    assert "torch" not in loaded_by(code)


def test_a_small_network_needs_no_torchvision_to_start():
    code = "from trainer.network import build\nbuild.build('small_cnn', 3)"
    assert "torchvision" not in loaded_by(f"{import_all('trainer')}\n{code}")


def test_the_first_step_needs_no_compiler_nor_does_that_of_a_resumed_run():
    code = """
import torch
from trainer.network import build, device, optim
device.make_deterministic()
network = build.build("small_cnn", 3)
optimizer = optim.build(network, "adamw", lr=0.1, head_lr=None, weight_decay=0.1, momentum=0.9)
network(torch.zeros(2, 16, 16, 3)).sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
"""
    assert loaded_by(code).isdisjoint({"torchvision", "sympy"})  # torch._dynamo brings SymPy


# --- tests ---


def test_the_tests_mirror_the_tree():
    """Each folder of tests has its counterpart in the code, and each room its folder of tests."""
    folders = {
        path.parent.relative_to(PROJECT / "tests")
        for program in PROGRAMS
        for path in (PROJECT / "tests" / program).rglob("test_*.py")
    }
    folders.discard(Path("launch/python"))  # which is on Python's path itself
    assert [folder for folder in folders if not (PROJECT / folder / "__init__.py").exists()] == []
    # Rehearsed by its verb's tests; and what serves is tested as one, from tests/serving.
    # What Python imports as packhorse is tested from tests/launch/python.
    elsewhere = {
        Path("launch/local"),
        Path("launch/python/packhorse"),
        Path("serving/deploy"),
        Path("serving/adapters"),
    }
    rooms = {
        path.parent.relative_to(PROJECT) for name, path in modules().items() if name.count(".") == 2
    }
    assert rooms - folders <= elsewhere
