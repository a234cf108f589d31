"""Every command that README.md and docs/ show succeeds, and generated pages are current.

The commands run on small pictures and against AWS as a process.
"""

import ast
import base64
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from serving import __main__ as serving_command
from serving import contract
from serving.adapters import lambda_proxy
from serving.deploy import bundle, image
from tests import picture, reference
from tests.conftest import (
    PROJECT,
    ended,
    make_pictures,
    run_module,
    run_trainer,
    start,
    wait_for,
)
from tests.launch.conftest import Cloud, Forked, running
from tests.launch.verbs.test_verbs import leave_results, run_of
from tests.packages import CLASSES, make_contents, make_network
from tests.serving.conftest import Server
from tests.serving.test_deploy import BUCKET, endpoint_and_function
from trainer.common.errors import OK
from trainer.results.package import build
from trainer.settings import search_space as space

PAGES = [
    PROJECT / "README.md",
    PROJECT / "CONTRIBUTING.md",
    *sorted((PROJECT / "docs").glob("*.md")),
]
NAMES = [page.name for page in PAGES]
PROGRAMS = ("make", "python", "curl", "pip", "git", "aws", "torchrun", "docker")
MODULES = ("trainer", "launch", "serving")  # python -m these: each has a test below
SMALL = (
    "train.epochs=1",
    "train.batch_size=8",
    "data.size=32",
    "data.resize=32",
    "data.workers=0",
    "platform=local",
)

# What is not run as it stands, and why. Everything else must end with exit code 0.
NOT_AS_IT_STANDS = {
    "--wait": "it waits for AWS to train; tests/launch/verbs/test_verbs.py waits",
    "--follow": "Ctrl-C ends it; tests/launch/verbs/test_verbs.py follows to the end of a run",
    "rehearse": "minutes; tests/launch/verbs/test_rehearse.py rehearses, here it must plan",
    "https://example.com": "no test needs the internet; tests/serving/test_fetch.py fetches",
    "make": "it would set up this environment again; what its targets run is there",
}


def lines(page: Path) -> list[str]:
    """The lines of a page's fenced blocks, in their order and without comments."""
    shown = []
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for block in (text for language, text in blocks if language != "text"):  # text: what one sees
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            shown.append(re.sub(r"\s{2,}#.*", "", line).strip())
    return shown


def commands(prefix: str) -> list[str]:
    """Those lines of all pages that begin with `prefix`, each once."""
    return sorted({line for page in PAGES for line in lines(page) if line.startswith(prefix)})


def pages_with(prefix: str) -> list[str]:
    """The names of the pages that show a command."""
    return [page.name for page in PAGES if any(line.startswith(prefix) for line in lines(page))]


def test_every_program_that_is_shown_is_known_here():
    shown = {line.split()[0] for line in commands("") if line and re.match(r"[a-z]+ ", line)}
    assert shown & set(PROGRAMS) <= {"make", "python", "curl"}, "a test below must run it"
    for line in commands("python "):
        assert line.split()[1:3] in [["-m", module] for module in MODULES], (
            f"{line}: a test below must run it"
        )


@pytest.mark.parametrize("command", commands("make "))
def test_what_a_make_target_runs_is_there(command):
    done = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for module in re.findall(r"python -m ([\w.]+)", done.stdout):
        assert importlib.util.find_spec(module), f"{command} runs {module}, which is not there"
    for path in re.findall(r"\btests/\S+", done.stdout):
        assert (PROJECT / path).exists(), f"{command} names {path}, which is not there"


# --- the trainer ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the pictures and files that the commands name."""
    cwd = tmp_path_factory.mktemp("docs")
    for name in ("dogImages", "pets37"):
        make_pictures(cwd / name, {"train": 8, "valid": 3, "test": 3}, CLASSES, size=40)
    make_pictures(cwd / "data/fashion_mnist", {"test": 1})
    Image.new("RGB", (60, 50), "green").save(cwd / "dog.jpg")
    (cwd / "runs/NAME").mkdir(parents=True)
    build(make_network(), make_contents(cwd / "golden"), cwd / "runs/NAME/model.tar.gz")
    return cwd


def here(command: str, place: Path) -> list[str]:
    """Return what follows `python -m PROGRAM`, with this machine's files for the reader's."""
    command = command.replace("/data/dogImages", str(place / "dogImages")).replace(
        "data.root=pets37", f"data.root={place}/pets37"
    )
    command = command.replace("ACCOUNT", "123456789012").replace("REGION", "us-east-1")
    return shlex.split(command)[3:]


@pytest.mark.long
@pytest.mark.parametrize(
    "command", [line for line in commands("python -m trainer") if "--help" not in line]
)
def test_a_training_command_trains(place, tmp_path, configure, command):
    arguments = here(command, place)
    configure(
        *space.split([argument for argument in arguments if argument != "-m"])[0]
    )  # as it stands
    if "optuna" in command:
        pytest.importorskip("optuna")
    # ... and on a network of this machine's size.
    arguments = [
        argument
        for argument in arguments
        if not argument.startswith(("model.name=", "model=", "experiment="))
    ]
    own = [] if "data=folder" in command else ["data=folder", f"data.root={place}/dogImages"]
    arguments = [
        argument
        for argument in arguments
        if not argument.startswith(
            ("model.weights=", "train.parent=", "train.epochs=", "sweep.trials=")
        )
    ]
    arguments += [
        *own,
        "model=small_cnn",
        "model.weights=null",
        "sweep.trials=2",
        "sweep.points=2",
        *SMALL,
    ]
    if "-m" not in arguments:
        arguments += ["name=run"]
    swept = {
        argument.split("=")[0]
        for argument in arguments
        if "," in argument and not argument.split("=")[1].startswith("[")
    }
    arguments = [
        argument
        for argument in arguments
        if not (argument in SMALL and argument.split("=")[0] in swept)
    ]
    code, said = run_trainer(tmp_path, *arguments)
    assert code == OK, said


@pytest.mark.parametrize("command", commands("make doctor"))
def test_the_doctor_examines_what_is_shown(place, command):
    shown = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=PROJECT, capture_output=True, text=True
    ).stdout
    line = next(line for line in shown.splitlines() if "-m trainer.doctor" in line)
    arguments = [argument for argument in here(line, place) if not argument.startswith("model=")]
    arguments += ["model=small_cnn", *SMALL, "--seconds=0.2", "platform.cache=cache"]
    code, said = run_module(place, "trainer.doctor", *arguments)
    assert code == OK, said


# --- launch: each page's commands in their order, in an account of its own ---


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with running(tmp_path_factory.mktemp("aws") / "calls.jsonl") as cloud:
        yield cloud


def end_run(cloud: Cloud, target: str, run: str, package: bytes, attempt: int = 1) -> None:
    """Leave what a machine or SageMaker leaves when a run is complete."""
    s3 = cloud.client("s3")
    if target == "ec2":
        result = json.dumps({"top1": 0.8}).encode()
        s3.put_object(Bucket=BUCKET, Key=f"runs/{run}/output/model.tar.gz", Body=package)
        s3.put_object(Bucket=BUCKET, Key=f"runs/{run}/output/result.json", Body=result)
        done = json.dumps({"attempt": attempt, "code": 0, "reason": "done"}).encode()
        s3.put_object(Bucket=BUCKET, Key=f"runs/{run}/attempts/{attempt}.json", Body=done)
    else:
        job = f"packhorse-{run}-1"
        cloud.post(
            "/strict/end",
            job=job,
            status="Completed",
            hours=2,
            billed=3600,
            metrics={"test_top1": 0.8},
        )
        leave_results(cloud, f"runs/{run}/output/{job}/output", package, 0.8)


@pytest.mark.parametrize("command", commands("make plan"))
def test_what_make_plan_shows_is_planned(place, server, command):
    shown = subprocess.run(
        ["make", "-n", *shlex.split(command)[1:]], cwd=PROJECT, capture_output=True, text=True
    ).stdout
    line = next(line for line in shown.splitlines() if "-m launch plan" in line)
    code, said = server.launch(*here(line, place), cwd=place)
    assert code == OK and "costs" in said, said


TRANSCRIPT = (
    r"<!-- transcript: {}(?: from (?P<begin>[^\n]+?))?(?: to (?P<end>[^\n]+?))? -->\n"
    r"```text\n(?P<said>.*?)```"
)


def check_transcript(page: Path, verb: str, said: str, place: Path) -> None:
    """Hold what a command says against what the page shows of it, the first time on the page.

    "from WORDS" shows it from the line on that begins with these words, "to WORDS" until such a
    line. `make transcripts` writes it into the page instead.
    """
    text = page.read_text()
    shown = re.search(TRANSCRIPT.format(verb), text, re.DOTALL)
    if shown is None:
        return
    said = timeless(said, place)
    if shown["begin"]:
        _, begin, rest = f"\n{said}".partition("\n" + shown["begin"])
        said = begin.lstrip("\n") + rest
    if shown["end"]:
        said = said.partition("\n" + shown["end"])[0] + "\n"
    if "WRITE_TRANSCRIPTS" in os.environ:
        page.write_text(text[: shown.start("said")] + said + text[shown.end("said") :])
        return
    # In this order. What a busy machine says in between, as that it waits, is not on the page.
    lines_said = iter(said.splitlines())
    for line in shown["said"].splitlines():
        assert line in lines_said, f"{page.name}: {verb}: {line}\nmake transcripts\n{said}"


def timeless(said: str, place: Path) -> str:
    """What a command says, without what differs from day to day and from machine to machine."""
    for pattern, word in (
        (rf"{re.escape(str(place))}/dogImages", "/data/dogImages"),
        (r"\S+/bin/python(?= -m)", "python"),
        (r"\d{4}-\d\d-\d\d", "2026-11-26"),
        (r"\d\d:\d\d UTC", "12:00 UTC"),
        (r"[\d,]+ bytes", "N bytes"),
        (r" +$", ""),
        (r"\b[0-9a-f]{32}\b", "DIGEST"),
        (r"\bi-[0-9a-f]{17}\b", "i-0123456789abcdef0"),
        (r"\bvpc-[0-9a-f]{17}\b", "vpc-0123456789abcdef0"),
        (r"\b[0-9a-f]{64}\b", "SHA256"),
        (r"-[0-9a-f]{16}\b", "-DIGEST"),
        (r"-[0-9a-f]{8}\b", "-ID"),
        (r"^ *[\d.]+ kB", "  N kB"),
        (r"\([\d.]+ MB\)", "(N MB)"),
        (r"^[\w ]+: \d+ of \d+\n", ""),  # how far it is
    ):
        said = re.sub(pattern, word, said, flags=re.MULTILINE)
    return said


@pytest.mark.parametrize("name", pages_with("python -m launch"))
def test_the_launch_commands_of_a_page_succeed(place, server, name):
    server.reset()
    shown = [
        line for line in lines(PAGES[NAMES.index(name)]) if line.startswith("python -m launch")
    ]
    if not any(line.split()[3] == "up" for line in shown):
        assert server.launch("up", "--yes", "--every", "0.05")[0] == OK  # said on another page
    submitted: list[tuple[str, str]] = []  # (target, run)
    told: set[str] = set()  # verbs whose transcript is held against the page
    for line in shown:
        verb, *rest = here(line, place)
        rest = [argument for argument in rest if argument not in NOT_AS_IT_STANDS]
        if verb in ("up", "down"):
            rest += ["--yes", "--every", "0.05"]  # there is nobody to ask
        if verb == "connect":
            rest.append("--show")  # it would open a shell
        if verb in ("fetch", "cost") and submitted:
            end_run(server, *submitted.pop(), (place / "runs/NAME/model.tar.gz").read_bytes())
        code, said = server.launch("plan" if verb in NOT_AS_IT_STANDS else verb, *rest, cwd=place)
        assert code == OK, f"{line}\n{said}"
        assert "Traceback" not in said
        if verb not in told:
            check_transcript(PAGES[NAMES.index(name)], verb, said, place)
        told.add(verb)
        if verb == "submit":
            [target] = [
                argument.removeprefix("target=")
                for argument in rest
                if argument.startswith("target=")
            ]
            submitted.append((target, run_of(said)))


@pytest.mark.long
@pytest.mark.parametrize("name", ["first-ec2.md", "first-sagemaker.md", "spot.md"])
def test_what_is_waited_for_comes_to_its_end_also_when_a_machine_is_taken_back(place, server, name):
    """A page's commands with --wait, word for word; a spot machine is lost in the middle."""
    server.reset()
    assert server.launch("up", "--yes", "--every", "0.05")[0] == OK
    package = (place / "runs/NAME/model.tar.gz").read_bytes()
    shown = [line for line in lines(PAGES[NAMES.index(name)]) if "--wait" in line]
    assert shown
    for line in shown:
        words = here(line, place)
        target = next(word.partition("=")[2] for word in words if word.startswith("target="))
        planned = server.launch("plan", *words[1:-1], "--json")[1]
        run = json.loads(planned)["run"]
        process = server.start(*words, "--every", "0.2")
        attempt = 1
        if target == "ec2":
            [machine] = waited_for(lambda run=run: machines_of(server, run))
            if "target.spot=true" in words:
                server.post(
                    "/strict/end_instance", instance=machine, code="Server.SpotInstanceTermination"
                )
                waited_for(lambda run=run: len(machines_of(server, run)) == 2)
                attempt = 2
        else:
            waited_for(
                lambda: server.client("sagemaker").list_training_jobs()["TrainingJobSummaries"]
            )
        end_run(server, target, run, package, attempt)
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == OK and "is complete" in printed, printed
        assert ("asking for another" in printed) == (attempt == 2)


def machines_of(cloud: Cloud, run: str) -> list[str]:
    """The ids of a run's machines, the ended ones too."""
    filters = [{"Name": "tag:run", "Values": [run]}]
    groups = cloud.client("ec2").describe_instances(Filters=filters)["Reservations"]
    return [each["InstanceId"] for group in groups for each in group["Instances"]]


def waited_for(look):
    """What `look` returns once that is anything."""
    found = []
    assert wait_for(lambda: found.append(look()) or found[-1], 300)
    return found[-1]


# --- serving ---


@pytest.fixture
def served(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """`python -m serving serve` as it is shown, with the newest run's package."""
    monkeypatch.chdir(place)
    server = Server(tmp_path / "log.txt")
    yield server
    server.kill()


def test_the_server_is_started_as_shown():
    assert commands("python -m serving serve") == ["python -m serving serve"]


@pytest.mark.parametrize("command", commands("curl "))
def test_a_curl_command_gets_a_prediction(place, served, command):
    if not shutil.which("curl"):
        pytest.skip("needs curl")
    arguments = shlex.split(
        command.replace("http://127.0.0.1:8080", f"http://127.0.0.1:{served.port}")
    )
    asked = subprocess.run(
        [*arguments, "-w", "\n%{http_code}"], cwd=place, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    answer, status = asked.stdout.rsplit("\n", 1)
    if "https://example.com" in command:
        assert status == "200" or understood_url(json.loads(answer)), answer
    else:
        assert status == "200", answer


def understood_url(answer: dict[str, str]) -> bool:
    """Whether a request was refused for its URL alone, which leads nowhere without the internet."""
    return "the URL" in answer["error"]


def json_requests() -> list[tuple[str, str]]:
    """The JSON objects that the pages show for a picture, as (page, object)."""
    shown = re.compile(r"`(\{\"[^`]*\})`")
    return [(page.name, body) for page in PAGES for body in shown.findall(page.read_text())]


@pytest.mark.parametrize(("page", "shown"), json_requests())
def test_a_json_request_gets_a_prediction_by_both_ways_in(place, served, page, shown):
    picture = base64.b64encode((place / "dog.jpg").read_bytes()).decode()
    body = shown.replace("<base64>", picture).encode()
    ways = {"server": (body, "application/json")}
    if b"https://" not in body:
        query = contract.read(body, "application/json", lambda_proxy.MAX_PICTURES)
        ways["function"] = lambda_proxy.prepare(query)  # what it asks the endpoint
    for way, (asked, content_type) in ways.items():
        answer = served.invoke(asked, content_type)
        if b"https://" in body:
            assert understood_url(answer.json), f"{page}, {way}: {answer.body!r}"
        else:
            assert answer.status == 200, f"{page}, {way}: {answer.body!r}"


@pytest.fixture(scope="module")
def strict_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with running(tmp_path_factory.mktemp("aws") / "calls.jsonl", "tests.serving.aws") as cloud:
        yield cloud


@pytest.mark.parametrize("name", pages_with("python -m serving"))
def test_the_serving_commands_of_a_page_succeed(place, strict_server, tmp_path, monkeypatch, name):
    strict_server.reset()
    # What the endpoint needs comes from pip's index, which is not for tests.
    monkeypatch.setattr(bundle, "libraries", lambda *_, **__: {"numpy/__init__.py": b""})
    monkeypatch.setattr(image, "EVERY", 0.02)
    s3 = strict_server.client("s3")
    s3.create_bucket(Bucket=BUCKET)
    s3.put_bucket_versioning(Bucket=BUCKET, VersioningConfiguration={"Status": "Enabled"})

    checked: set[str] = set()

    def serving(line: str, *arguments: str, **environment: str) -> None:
        words = [*here(line, place), *arguments]
        variables = strict_server.environment() | environment
        if serving_command.VERBS[words[0]] == "deploy":  # it asks AWS: boto3 is imported here
            forked = Forked(serving_command.main, words, place, variables)
            said, _ = forked.communicate()
            code = forked.returncode
        else:
            code, said = ended(start(place, ["serving", *words], variables, forked=False))
        assert code == OK, f"{line}\n{said}"
        shown = " ".join(word for word in words if word in (words[0], "--build"))
        if shown not in checked:
            check_transcript(PAGES[NAMES.index(name)], shown, said, place)
        checked.add(shown)

    for line in lines(PAGES[NAMES.index(name)]):
        if line.startswith("openssl "):  # the key, for the signature of the lines below
            subprocess.run(shlex.split(line), cwd=place, check=True, capture_output=True)
        if not line.startswith("python -m serving") or line.startswith("python -m serving serve"):
            continue
        verb = line.split()[3]
        if verb in ("deploy", "destroy"):
            serving(line, "--yes")  # there is nobody to ask
        elif verb == "invoke":
            with endpoint_and_function(uploaded_function(strict_server), tmp_path) as (
                _,
                environment,
            ):
                serving(line, **environment)
        else:
            serving(line)


def uploaded_function(cloud: Cloud) -> bytes:
    """The function's archive, as it was deployed."""
    [stack] = cloud.client("cloudformation").describe_stacks()["Stacks"]
    values = {each["ParameterKey"]: each["ParameterValue"] for each in stack["Parameters"]}
    stored = cloud.client("s3").get_object(Bucket=values["Bucket"], Key=values["CodeKey"])
    return bytes(stored["Body"].read())


# --- generated pages, and what the pages say ---


def test_the_configuration_page_is_current():
    assert reference.PAGE.read_text() == reference.page(), "run make docs"


def test_the_troubleshooting_page_has_every_refusal_of_aws():
    assert reference.TROUBLESHOOTING.read_text() == reference.troubleshooting(), "run make docs"


LINKED = [*PAGES, *sorted((PROJECT / "docs/decisions").glob("*.md")), *PROJECT.glob("*.md")]


def sections(page: Path) -> dict[str, str]:
    """The text below each heading of a page, by the name that GitHub gives it in links."""
    _, *parts = re.split(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in parts[::2]]
    return dict(zip(names, parts[1::2], strict=True))


def test_every_link_leads_somewhere():
    for page in LINKED:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
            if link.startswith(("http", "mailto:")):
                continue
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in sections(target), f"{page.name}: {link}"


NUMBER = r"(?<![\w-])\d[\d.,]*(?<![.,])(?!\w)"  # but that of ResNet-50


def facts() -> list[tuple[list[str], str]]:
    """What the README's first screen measures: the figures of each fact, and what it links to."""
    first_screen = (PROJECT / "README.md").read_text().partition("\nYou need ")[0]
    shown = re.findall(r"^- \*\*.+?\*\* (.+?)\n(?=- |\Z)", first_screen, re.MULTILINE | re.DOTALL)
    links = re.compile(r"\]\(([^)]+)\)")
    return [(re.findall(NUMBER, links.sub("]", fact)), links.findall(fact)[-1]) for fact in shown]


def test_the_readme_has_five_facts_with_figures():
    assert len(facts()) == 5
    assert all(figures for figures, _ in facts())


@pytest.mark.parametrize(("figures", "link"), facts())
def test_every_figure_of_the_first_screen_stands_where_it_was_measured(figures, link):
    """A benchmark that is run again changes its page: then the README's figure follows."""
    path, _, anchor = link.partition("#")
    page = PROJECT / path
    measured = sections(page)[anchor] if anchor else page.read_text()
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", measured), (
            f"{figure} is not in {link}: take the README's from there"
        )


def test_the_readme_shows_a_picture_of_a_report():
    [shown] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (PROJECT / "README.md").read_text())
    with Image.open(PROJECT / shown) as opened:
        assert opened.size == (picture.WIDTH, picture.HEIGHT)
    assert (PROJECT / shown).stat().st_size <= picture.MAX_BYTES


def test_every_page_stands_once_in_the_sites_navigation():
    def pages(entries) -> Iterator[str]:
        for entry in entries:
            [value] = entry.values()
            if isinstance(value, str):
                yield value
            else:
                yield from pages(value)

    navigation = list(pages(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"]))
    assert len(navigation) == len(set(navigation))
    lying = {page.name for page in (PROJECT / "docs").glob("*.md")}
    assert lying <= set(navigation)


def messages_of(code: str) -> Iterator[str]:
    """Every text in the code, with … for what is put into it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sdr]", "…", node.value)


def test_every_message_of_the_troubleshooting_page_is_in_the_code():
    said = "\n".join(
        message
        for folder in MODULES
        for path in (PROJECT / folder).rglob("*.py")
        for message in messages_of(path.read_text())
    )
    page = reference.TROUBLESHOOTING.read_text().partition(reference.REFUSED)[0]
    shown = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    assert len(shown) > 20
    missing = [message for message in shown if not (message in said or re.search(message, said))]
    assert missing == []
