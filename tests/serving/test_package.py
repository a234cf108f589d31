import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from serving.__main__ import main
from serving.manifest import PackageError
from serving.package import load
from tests.conftest import PROJECT
from tests.packages import SIZE, make_contents, make_network
from trainer.images.decode import Preprocessing, optional_decoders
from trainer.results.package import build


@pytest.fixture
def package(original, tmp_path) -> Path:
    """A copy of the package's directory, to be harmed."""
    return Path(shutil.copytree(original / "package", tmp_path / "package"))


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    """Where archives are unpacked in the meantime."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def recorded(package: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(package / "golden/expected.npz") as expected:
        return expected["pixels"], expected["logits"]


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `check` says of a bad package, which must be one line and exit code 2."""
    assert main(["check", str(path)]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.startswith(f"{path}: ") and error.count("\n") == 1
    return error


# --- good packages ---


@pytest.mark.parametrize("form", ["package", "model.tar.gz"])
def test_a_package_says_what_went_in_and_computes_the_trained_network(original, temporary, form):
    loaded = load(original / form, threads=1)
    contents = make_contents(temporary)
    assert loaded.classes == contents.classes and loaded.preprocessing == contents.preprocessing
    assert (
        loaded.metrics == contents.metrics
        and loaded.config == contents.config
        and loaded.revision == contents.revision
    )
    pixels, logits = recorded(original / "package")
    for name, expected in zip(("0.jpg", "1.png", "2.webp"), pixels, strict=True):
        path = original / "package/golden" / name
        assert np.array_equal(loaded.prepare(path), expected) and np.array_equal(
            loaded.prepare(path.read_bytes()), expected
        )
    assert loaded.golden == 3 and loaded.difference <= 0.01 * loaded.allowed
    np.testing.assert_allclose(
        loaded.predict(pixels), logits, rtol=0, atol=1e-5 * np.abs(logits).max()
    )


def test_an_archive_is_unpacked_for_no_longer_than_loading_takes(original, temporary):
    loaded = load(original / "model.tar.gz")
    assert list(temporary.iterdir()) == []
    assert loaded.predict(np.zeros((1, SIZE, SIZE, 3), np.uint8)).shape == (1, 3)


def test_a_picture_gets_the_same_logits_in_a_batch_of_any_size(original):
    loaded = load(original / "package")
    pixels = np.random.default_rng(0).integers(0, 256, (5, SIZE, SIZE, 3), dtype=np.uint8)
    alone = np.concatenate([loaded.predict(pixels[number : number + 1]) for number in range(5)])
    for batch in range(1, 6):
        logits = loaded.predict(pixels[:batch])
        assert logits.dtype == np.float32 and logits.shape == (batch, 3)
        np.testing.assert_allclose(logits, alone[:batch], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_check_needs_neither_torch_nor_hydra_and_tells_a_person_what_it_found(original, tmp_path):
    script = (
        "import sys; from serving.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'hydra', 'omegaconf', 'onnx', 'trainer.results.package', 'launch'};"
        "print('imported:', *sorted(heavy & set(sys.modules))); sys.exit(code)"
    )
    result = run(
        "-c", script, "check", str(original / "model.tar.gz"), cwd=tmp_path, PYTHONPATH=str(PROJECT)
    )
    assert (result.returncode, result.stderr) == (0, "")
    *summary, ok, imported = result.stdout.splitlines()
    assert ok == "ok" and imported == "imported:"
    summary = "\n".join(summary)
    for part in (
        "3 (café, dog, hen)",
        "32 x 32, cut from a shorter side of 40 (bilinear)",
        "test_top1 0.875",
        "revision 0123abc",
        "3 pictures, pixels equal",
    ):
        assert part in summary


def test_a_bad_package_ends_a_real_process_with_one_line_and_exit_code_2(package, tmp_path):
    (package / "model.onnx").unlink()
    result = run("-m", "serving", "check", str(package), cwd=tmp_path, PYTHONPATH=str(PROJECT))
    assert (result.returncode, result.stdout, result.stderr) == (
        2,
        "",
        f"{package}: model.onnx is missing\n",
    )


def test_help_works_without_opening_onnx_runtime(tmp_path):
    result = run(
        "-X",
        "importtime",
        "-m",
        "serving",
        "check",
        "--help",
        cwd=tmp_path,
        PYTHONPATH=str(PROJECT),
    )
    assert result.returncode == 0 and "model.tar.gz" in result.stdout
    assert "onnxruntime" not in result.stderr and "torch" not in result.stderr


@pytest.mark.parametrize("name", [".DS_Store", "MAR-INF/MANIFEST.json"])
def test_files_that_other_tools_leave_in_a_directory_do_no_harm(package, name):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(b"\0")
    load(package)


@pytest.mark.parametrize(
    "name",
    [
        "code/__pycache__/inference.cpython-311.pyc",
        "code/serving/__pycache__/package.cpython-313.pyc",
        "code/serving/__pycache__/x.pyc",
        "code/serving/package.pyc",
        "code/sitecustomize.py",
        "code/numpy/__init__.py",
        "code/.hidden",
    ],
)
def test_a_file_that_could_run_in_the_place_of_the_code_is_refused(package, name, capsys):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(b"\0")
    assert f"'{name}' does not belong to the package" in refusal(package, capsys)


@pytest.mark.parametrize("name", ["code/serving/__pycache__/x.cpython-311.pyc", ".DS_Store", "a/b"])
def test_an_archive_holds_nothing_but_what_was_built(package, tmp_path, name, capsys):
    (package / name).parent.mkdir(exist_ok=True)
    (package / name).write_bytes(b"\0")
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(package, ".")
    assert f"'{name}' does not belong to the package" in refusal(path, capsys)


def test_what_python_compiles_of_the_code_that_runs_does_no_harm(package, tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import inference; inference.model_fn(sys.argv[2])"
    )
    for _ in range(2):  # the second time it lies there from the start
        done = run("-I", "-c", script, str(package / "code"), str(package), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert [*(package / "code").rglob("*.pyc")]


# --- damage ---


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(package: Path, **changes: Any) -> None:
    """Changes the manifest as a person with an editor would."""
    manifest = json.loads((package / "package.json").read_text())
    (package / "package.json").write_text(json.dumps(manifest | changes, indent=1))


def edit_preprocessing(package: Path, **changes: Any) -> None:
    edit(package, preprocessing={"resize": 40, "size": SIZE, "interpolation": "bilinear"} | changes)


def replace_picture(package: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(package / "golden/1.png")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda package: flip_a_bit(package / "model.safetensors"),
            "model.safetensors was changed after the package was built",
        ),
        (lambda package: flip_a_bit(package / "model.onnx"), "model.onnx was changed"),
        (
            lambda package: flip_a_bit(package / "code/trainer/images/decode.py"),
            "code/trainer/images/decode.py was changed",
        ),
        (replace_picture, "golden/1.png was changed"),
        (lambda package: (package / "golden/2.webp").unlink(), "golden/2.webp is missing"),
        (lambda package: (package / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda package: (package / "code/numpy.py").write_text(""),
            "'code/numpy.py' does not belong to the package",
        ),
        (
            lambda package: edit(package, classes=["dog", "café", "hen"]),
            "package.json was changed",
        ),
        (
            lambda package: edit_preprocessing(package, interpolation="bicubic"),
            "package.json was changed",
        ),
        (lambda package: edit_preprocessing(package, resize=41), "package.json was changed"),
        (lambda package: edit(package, sha256=None), "package.json was changed"),
        (
            lambda package: edit(package, format=2),
            "package.json: its format is '2', and this version reads 1",
        ),
        (
            lambda package: (package / "package.json").write_text("[]"),
            "package.json: its format is 'None'",
        ),
        (
            lambda package: (package / "package.json").write_text('{"format": 1'),
            "package.json is not JSON",
        ),
        (
            lambda package: (package / "package.json").write_bytes(b"\xff\xfe\0"),
            "package.json is not JSON",
        ),
        (
            lambda package: (package / "package.json").unlink(),
            "package.json is missing at the top level",
        ),
        (shutil.rmtree, "there is no such file or directory"),
    ],
)
def test_a_package_that_is_not_as_it_was_built_is_refused(
    package, harm: Callable[[Path], object], message, capsys
):
    harm(package)
    assert message in refusal(package, capsys)


# --- skew: packages that are whole and would answer wrongly ---


def seal(package: Path) -> None:
    """Brings every digest up to date, as a faulty builder would."""
    manifest = json.loads((package / "package.json").read_text())
    manifest["files"] = {
        name: hashlib.sha256((package / name).read_bytes()).hexdigest()
        for name in manifest["files"]
    }
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (package / "package.json").write_text(json.dumps(manifest))


def test_a_tolerance_beyond_numpys_numbers_is_read_without_a_warning(package):
    path = package / "package.json"
    tolerance = {"absolute": 1e300, "relative": 1e300}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tolerance": tolerance}))
    seal(package)
    assert load(package).allowed > 1e299


def change_weights(package: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes the largest weight tensor of the ONNX network."""
    model = onnx.load(package / "model.onnx")
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), tensor.name))
    onnx.save(model, package / "model.onnx")


def change_calibration(package: Path, **changes: Any) -> None:
    manifest = json.loads((package / "package.json").read_text())
    edit(package, calibration=manifest["calibration"] | changes)


def shorten_the_means(package: Path) -> None:
    """Changes the tensor by which the ONNX network computes distances."""
    model = onnx.load(package / "model.onnx")
    tensor = next(tensor for tensor in model.graph.initializer if [*tensor.dims] == [1152, 3])
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(values * np.float32(0.9), tensor.name))
    onnx.save(model, package / "model.onnx")


def fix_the_batch(package: Path) -> None:
    model = onnx.load(package / "model.onnx")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, package / "model.onnx")


def nudge_a_pixel(package: Path) -> None:
    pixels, logits = recorded(package)
    pixels[2, 5, 5, 1] ^= 1
    np.savez(package / "golden/expected.npz", pixels=pixels, logits=logits)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda package: edit_preprocessing(package, interpolation="bicubic"),
            r"golden/0.jpg: \d+ of its 3072 pixel values are off, by up to \d+",
        ),
        (
            lambda package: edit_preprocessing(package, resize=41),
            r"golden/0.jpg: \d+ of its 3072 pixel values are off",
        ),
        (nudge_a_pixel, "golden/2.webp: 1 of its 3072 pixel values are off, by up to 1;"),
        (replace_picture, "golden/1.png: .* pixel values are off"),
        (
            lambda package: (package / "golden/0.jpg").write_bytes(b"no picture"),
            r"golden/0.jpg can't be read as a picture on this machine \(not a JPEG",
        ),
        (
            lambda package: edit_preprocessing(package, size=28),
            "model.onnx does not fit package.json",
        ),
        (
            lambda package: edit(package, classes=["café", "dog"]),
            "model.onnx does not fit package.json",
        ),
        (fix_the_batch, "model.onnx does not fit package.json"),
        (
            lambda package: (package / "model.onnx").write_bytes(b"no network"),
            "model.onnx can't be opened by ONNX Runtime",
        ),
        (
            lambda package: change_weights(package, lambda weights: weights * np.float32(1.01)),
            "golden/.*: its logits are off by .*, allowed: ",
        ),
        (
            lambda package: change_calibration(package, temperature=0.6),
            "golden/.*: its probabilities are off by .*, allowed: ",
        ),
        (shorten_the_means, "golden/.*: its distances are off by .*, allowed: "),
        (
            lambda package: change_weights(package, lambda weights: weights * np.float32("nan")),
            "golden/0.jpg: its logits are off by nan",
        ),
    ],
)
def test_a_package_that_does_not_reproduce_its_golden_pictures_is_refused(
    package, harm: Callable[[Path], object], message, capfd
):
    harm(package)
    seal(package)
    assert re.search(message, refusal(package, capfd))


def test_sealing_alone_does_no_harm(package):
    seal(package)
    load(package)


# --- archives ---


def archive(path: Path, *members: tuple[str, Any, bytes]) -> Path:
    """A gzipped tar archive of (name, type, data) members. A link's data is its target."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, data in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if kind == tarfile.REGTYPE:
                entry.size = len(data)
            else:
                entry.linkname = data.decode()
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("name", "kind", "data", "message"),
    [
        (
            "../escaped",
            tarfile.REGTYPE,
            b"x",
            "'../escaped' would be unpacked outside the package's directory",
        ),
        ("code/../../escaped", tarfile.REGTYPE, b"x", "would be unpacked outside"),
        ("/{root}/escaped", tarfile.REGTYPE, b"x", "would be unpacked outside"),
        ("package.json", tarfile.SYMTYPE, b"/etc/passwd", "'package.json' is a link or a device"),
        ("model.onnx", tarfile.LNKTYPE, b"../../escaped", "'model.onnx' is a link or a device"),
        ("golden/0.jpg", tarfile.FIFOTYPE, b"", "'golden/0.jpg' is a link or a device"),
        ("golden/0.jpg", tarfile.CHRTYPE, b"", "'golden/0.jpg' is a link or a device"),
        ("model/package.json", tarfile.REGTYPE, b"{}", "package.json is missing at the top level"),
    ],
)
def test_an_archive_that_reaches_outside_or_is_laid_out_otherwise_is_refused(
    tmp_path, temporary, name, kind, data, message, capsys
):
    path = archive(tmp_path / "model.tar.gz", (name.format(root=tmp_path), kind, data))
    assert message in refusal(path, capsys)
    assert not list(tmp_path.rglob("escaped")) and list(temporary.iterdir()) == []


@pytest.mark.parametrize("size", [9 << 30, -1024])
def test_an_archive_whose_header_states_an_absurd_size_is_refused(
    tmp_path, temporary, size, capsys
):
    entry = tarfile.TarInfo("model.onnx")
    entry.size = size
    path = tmp_path / "model.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.fileobj.write(entry.tobuf(tarfile.GNU_FORMAT))
    assert f"'model.onnx' brings the unpacked size to {size:,} bytes" in refusal(path, capsys)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"PK\x03\x04 this is another kind of archive",
    ],
    ids=["truncated", "header only", "empty", "zip"],
)
def test_a_file_that_is_no_whole_archive_is_refused(original, tmp_path, temporary, harm, capsys):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(harm((original / "model.tar.gz").read_bytes()))
    assert "it is not a whole gzipped tar archive" in refusal(path, capsys)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_one_changed_byte_of_an_archive_is_noticed(original, tmp_path, where, capsys):
    data = bytearray((original / "model.tar.gz").read_bytes())
    data[int(where * len(data))] ^= 0x10
    path = tmp_path / "model.tar.gz"
    path.write_bytes(data)
    refusal(path, capsys)


# --- code/inference.py, as AWS's toolkit uses it ---


def test_the_packages_own_code_answers_as_the_network_did(original, tmp_path):
    code = original / "package/code"
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import inference, serving.package, trainer.images.decode;"
        "package = inference.model_fn(sys.argv[2]);"
        "picture = inference.input_fn(bytearray(open(sys.argv[3], 'rb').read()), 'image/png');"
        "prediction = inference.predict_fn(picture, package);"
        "print(inference.output_fn(prediction, 'application/json', None));"
        "print(serving.package.__file__, trainer.images.decode.__file__)"
    )
    # -I: without our PYTHONPATH and the current directory, so that only the package's own code can
    # be found.
    picture = original / "package/golden/1.png"
    result = run(
        "-I", "-B", "-c", script, str(code), str(original / "package"), str(picture), cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    answer, modules = result.stdout.splitlines()
    assert modules == f"{code}/serving/package.py {code}/trainer/images/decode.py"
    np.testing.assert_allclose(
        json.loads(answer), recorded(original / "package")[1][1:2], rtol=0, atol=1e-5
    )


@pytest.mark.skipif(not optional_decoders()["avif"], reason="this Pillow reads no AVIF")
def test_the_packages_own_code_decodes_an_avif_in_a_process_of_its_own(original, tmp_path):
    code = original / "package/code"
    Image.new("RGB", (60, 40), "teal").save(tmp_path / "picture.avif")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from trainer.images import apart, decode;"
        "print(decode.shrink('picture.avif', 16, 'bilinear').shape, apart.__file__)"
    )
    said = {"PYTHONDONTWRITEBYTECODE": ""}  # Python takes an empty one for none
    result = run("-I", "-B", "-c", script, str(code), cwd=tmp_path, **said)
    assert result.stdout == f"(16, 24, 3) {code}/trainer/images/apart.py\n", result.stderr
    assert not [*code.rglob("__pycache__")]  # -B holds for it too


@pytest.mark.parametrize("interpolation", ["bicubic", "lanczos", "box"])
def test_every_preprocessing_reproduces(tmp_path, interpolation):
    contents = make_contents(
        tmp_path / "pictures", Preprocessing(resize=SIZE, size=SIZE, interpolation=interpolation)
    )
    build(make_network(), contents, tmp_path / "package", archive=False)
    assert load(tmp_path / "package").preprocessing.interpolation == interpolation


def test_load_raises_one_error_class_for_every_bad_package(tmp_path):
    with pytest.raises(PackageError, match="no such file"):
        load(tmp_path / "missing.tar.gz")
