import hashlib
import json
import logging
import signal
import subprocess
import tarfile
import tomllib
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from tests.conftest import PROJECT
from tests.packages import SIZE, make_calibrated, make_contents, make_network
from trainer.common.errors import MISTAKE, UserError
from trainer.common.serving_code import SERVING_CODE
from trainer.network.distance import WithDistance
from trainer.results import package

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an archive, what was unpacked from it, and the golden pictures. Read it,
    don't change it.
    """
    root = tmp_path_factory.mktemp("package")
    contents = replace(make_contents(root / "pictures"), created=CREATED)
    package.build(make_network(), contents, root / "model.tar.gz")
    with tarfile.open(root / "model.tar.gz") as tar:
        tar.extractall(root / "unpacked", filter="data")
    return root


def manifest(directory: Path) -> dict:
    return json.loads((directory / "package.json").read_text())


def test_an_archive_holds_all_that_serving_needs_and_nothing_else_is_left(built):
    with tarfile.open(built / "model.tar.gz") as tar:
        names = tar.getnames()
    code = sorted(["inference.py", "requirements.txt", "serving/ray_app.py", *SERVING_CODE])
    golden = ["0.jpg", "1.png", "2.webp", "expected.npz"]
    assert names == ["bom.json"] + [f"code/{name}" for name in code] + [
        f"golden/{name}" for name in golden
    ] + [
        "model.onnx",
        "model.safetensors",
        "package.json",
    ]
    assert sorted(path.name for path in built.iterdir()) == ["model.tar.gz", "pictures", "unpacked"]


def test_the_manifest_says_what_was_given_and_the_digest_of_every_other_file(built):
    unpacked = built / "unpacked"
    said = manifest(unpacked)
    assert (
        said["format"] == 1
        and said["created"] == "2026-01-02T03:04:05+00:00"
        and said["revision"] == "0123abc"
    )
    assert said["classes"] == ["café", "dog", "hen"] and said["metrics"] == {
        "test_top1": 0.875,
        "test_loss": 0.5,
    }
    assert said["preprocessing"] == {"resize": 40, "size": SIZE, "interpolation": "bilinear"}
    assert said["config"] == {
        "model.name": "small_cnn",
        "data.augment.scale": [0.3, 1.0],
        "model.weights": None,
    }
    assert said["versions"]["torch"] == torch.__version__.split("+")[0]
    others = {
        path.relative_to(unpacked).as_posix(): path
        for path in unpacked.rglob("*")
        if path.is_file()
    }
    del others["package.json"]
    assert said["files"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in others.items()
    }


def test_the_weights_are_the_networks_by_the_trainers_names(built):
    weights, state = load_file(built / "unpacked/model.safetensors"), make_network().state_dict()
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


def test_golden_pictures_travel_byte_for_byte_with_the_networks_own_logits(built):
    for name, original in (("0.jpg", "wide.JPG"), ("1.png", "tall.png"), ("2.webp", "square.webp")):
        assert (built / "unpacked/golden" / name).read_bytes() == (
            built / "pictures" / original
        ).read_bytes()
    expected = np.load(built / "unpacked/golden/expected.npz")
    assert expected["pixels"].dtype == np.uint8 and expected["pixels"].shape == (3, SIZE, SIZE, 3)
    with torch.no_grad():
        logits = make_network().eval()(torch.from_numpy(expected["pixels"])).numpy()
    assert np.array_equal(expected["logits"], logits)


def test_the_code_is_a_copy(built):
    for name in ("serving/package.py", "trainer/images/decode.py"):
        assert (built / "unpacked/code" / name).read_bytes() == (PROJECT / name).read_bytes()
    assert (built / "unpacked/code/inference.py").read_bytes() == (
        PROJECT / "serving/adapters/toolkit.py"
    ).read_bytes()


def test_the_code_requires_what_the_project_requires(built):
    dependencies = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    lines = (built / "unpacked/code/requirements.txt").read_text().splitlines()
    assert len(lines) == 3 and set(lines) <= set(dependencies)


def test_a_package_asks_for_what_reads_the_pictures_that_it_was_trained_on():
    extra = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [*package._requirements(frozenset({".jpg", ".heic", ".avif"})).values()]
    assert lines == ["numpy>=1.26", "pillow>=11.3", "onnxruntime>=1.19", "pillow-heif>=1.1"]
    assert lines[-1:] == extra["optional-dependencies"]["heic"]


def test_nothing_of_this_machine_is_in_the_network(built):
    assert str(PROJECT).encode() not in (built / "unpacked/model.onnx").read_bytes()


@pytest.mark.parametrize("name", ["small_cnn", "resnet18"])
def test_onnx_computes_the_network_for_any_batch(tmp_path, name):
    network = make_network(name)
    package.build(
        network, make_contents(tmp_path / "pictures"), tmp_path / "package", archive=False
    )
    session = onnxruntime.InferenceSession(
        tmp_path / "package/model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [(value.name, value.type, value.shape) for value in session.get_inputs()] == [
        ("pixels", "tensor(uint8)", ["batch", SIZE, SIZE, 3])
    ]
    assert [(value.name, value.type, value.shape) for value in session.get_outputs()] == [
        ("logits", "tensor(float)", ["batch", 3])
    ]
    network.eval()
    for batch in range(1, 6):
        pixels = torch.randint(0, 256, (batch, SIZE, SIZE, 3), dtype=torch.uint8)
        with torch.no_grad():
            logits = network(pixels).numpy()
        np.testing.assert_allclose(
            session.run(None, {"pixels": pixels.numpy()})[0],
            logits,
            rtol=0,
            atol=1e-5 * np.abs(logits).max(),
        )


def test_the_distance_is_computed_in_the_graph_as_in_pytorch(tmp_path):
    contents = make_calibrated(tmp_path / "pictures")
    network = make_network()
    package.build(network, contents, tmp_path / "package", archive=False)
    said = manifest(tmp_path / "package")
    assert said["calibration"] == asdict(contents.calibration)
    session = onnxruntime.InferenceSession(
        tmp_path / "package/model.onnx", providers=["CPUExecutionProvider"]
    )
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("logits", ["batch", 3]),
        ("distance", ["batch"]),
    ]
    pixels = torch.randint(0, 256, (5, SIZE, SIZE, 3), dtype=torch.uint8)
    both = WithDistance(network.eval(), contents.means)
    with torch.no_grad():
        logits, distance = (each.numpy() for each in both(pixels))
        assert np.array_equal(logits, network(pixels).numpy())
    computed = session.run(None, {"pixels": pixels.numpy()})
    np.testing.assert_allclose(computed[0], logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(computed[1], distance, rtol=0, atol=1e-5)
    assert load_file(tmp_path / "package/model.safetensors").keys() == network.state_dict().keys()


def test_the_callers_network_stays_as_it_is(tmp_path):
    network = make_network()
    network.backbone[1].eval()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    package.build(network, make_contents(tmp_path / "pictures"), tmp_path / "model.tar.gz")
    assert [module.training for module in network.modules()] == modes
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in network.parameters()
    )
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())


def test_equal_inputs_give_equal_bytes(built, tmp_path):
    contents = replace(make_contents(tmp_path / "pictures"), created=CREATED)
    package.build(make_network(), contents, tmp_path / "other-name.tar.gz")
    assert (tmp_path / "other-name.tar.gz").read_bytes() == (built / "model.tar.gz").read_bytes()


def test_a_directory_that_exists_gets_the_files_of_an_older_package_replaced(tmp_path):
    target = tmp_path / "model"
    for older in ("golden/9.bmp", "code/gone.py", "mine.txt"):
        (target / older).parent.mkdir(parents=True, exist_ok=True)
        (target / older).write_text("older")
    package.build(make_network(), make_contents(tmp_path / "pictures"), target, archive=False)
    assert sorted(path.name for path in target.iterdir()) == [
        "bom.json",
        "code",
        "golden",
        "mine.txt",
        "model.onnx",
        "model.safetensors",
        "package.json",
    ]
    assert not (target / "golden/9.bmp").exists() and not (target / "code/gone.py").exists()
    assert manifest(target)["files"].keys() >= {"golden/0.jpg", "code/inference.py"}


def test_a_folder_called_serving_where_the_user_stands_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "serving").mkdir()
    (tmp_path / "serving/__init__.py").touch()
    (tmp_path / "serving/__main__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    package.build(make_network(), make_contents(tmp_path / "pictures"), Path("model.tar.gz"))
    assert (tmp_path / "model.tar.gz").is_file()


def test_the_exporter_is_silent(tmp_path, capfd, caplog, recwarn):
    caplog.set_level(logging.DEBUG)
    ONNXRegistry.from_torchlib.cache_clear()  # which tests/packages.py remembers
    package.build(make_network(), make_contents(tmp_path / "pictures"), tmp_path / "model.tar.gz")
    assert capfd.readouterr() == ("", "")
    assert (
        not [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
        and not recwarn.list
    )


class Diverged(nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 3), torch.nan)


class Unexportable(nn.Module):
    """Its path depends on a pixel's value, which a graph can't follow."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logits = pixels.float().mean((1, 2))
        return logits if pixels[0, 0, 0, 0] > 7 else -logits


class Unlike(nn.Module):
    """Computes something else in the exported graph, as a fault of an exporter would."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2)) + (1.0 if torch.compiler.is_exporting() else 0.0)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (Diverged(), UserError, "the network's logits are not finite numbers"),
        (Unexportable(), UserError, "PyTorch can't export this network as ONNX"),
        (
            Unlike(),
            package.SelfTestFailed,
            "golden/[0-2].[a-z]+: its logits are off by 1 from the recorded ones",
        ),
    ],
)
def test_a_network_that_can_not_be_packaged_leaves_what_was_there(
    tmp_path, network, error, message, archive
):
    target = tmp_path / "out" / "model"
    older = target if archive else target / "package.json"
    older.parent.mkdir(parents=True)
    older.write_text("older")
    with pytest.raises(error, match=message) as raised:
        package.build(network, make_contents(tmp_path / "pictures"), target, archive=archive)
    assert "\n" not in str(raised.value)
    assert older.read_text() == "older" and list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("gone.png", None, "it is missing"),
        ("broken.png", b"GIF8", "the model package needs this picture, but: "),
        ("text.jpg", b"hello", "the model package needs this picture, but: not a JPEG"),
    ],
)
def test_a_golden_picture_that_can_not_be_read_is_named(tmp_path, name, data, message):
    contents = make_contents(tmp_path / "pictures")
    picture = tmp_path / "pictures" / name
    if data is not None:
        picture.write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        package.build(
            make_network(),
            replace(contents, golden=[*contents.golden, str(picture)]),
            tmp_path / "out/model.tar.gz",
        )
    assert not list((tmp_path / "out").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, less than the weights take."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("archive", [True, False])
def test_a_full_disk_is_an_error_of_the_system_and_leaves_nothing(tmp_path, small_disk, archive):
    with pytest.raises(OSError, match="No space left on device") as raised:
        package.build(
            make_network(),
            make_contents(tmp_path / "pictures"),
            small_disk / "model",
            archive=archive,
        )
    assert raised.value.filename == str(small_disk / "model")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []
    assert not list(small_disk.rglob(".writing-*"))


class Scaled(nn.Module):
    def __init__(self, offset: float) -> None:
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(3)), offset

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean((1, 2)) * self.scale + self.offset


def test_the_kept_graph_of_a_network_that_computes_otherwise_costs_no_package(tmp_path):
    contents = replace(make_contents(tmp_path / "pictures"), graph=tmp_path / "kept.graph")
    package.build(Scaled(0.0), contents, tmp_path / "first.tar.gz")
    kept = contents.graph.read_bytes()
    package.build(Scaled(1000.0), contents, tmp_path / "second.tar.gz")
    assert contents.graph.read_bytes() != kept
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("code", [-signal.SIGKILL, MISTAKE])
def test_a_self_test_that_the_machine_or_a_disk_ended_is_made_again(built, monkeypatch, code):
    real, hit = package.sessions.run, [code]

    def run(*arguments, **options):
        result = real(*arguments, **options)
        result.returncode = hit.pop() if hit else result.returncode
        return result

    monkeypatch.setattr(package.sessions, "run", run)
    package._self_test(built / "unpacked")
    hit[:] = [1, 1]
    with pytest.raises(package.SelfTestFailed, match="exit code 1"):
        package._self_test(built / "unpacked")
