from dataclasses import replace

import numpy as np
import onnx
import pytest

from serving.package import load
from tests.packages import make_calibrated, make_contents, make_network
from trainer.common.errors import UserError
from trainer.results import calibrate, quantize
from trainer.results.package import build
from trainer.results.quantize import Pictures, choose, int8, logits, scores


@pytest.fixture(scope="module")
def float_model(original) -> bytes:
    return (original / "package/model.onnx").read_bytes()


@pytest.fixture(scope="module")
def pictures(original, float_model) -> Pictures:
    """The golden pictures with some noise, labelled as the float network sees them.

    So it is correct about all of them.
    """
    with np.load(original / "package/golden/expected.npz") as recorded:
        golden = np.repeat(recorded["pixels"], 20, axis=0).astype(int)
    pixels = np.clip(
        golden + np.random.default_rng(0).integers(-20, 21, golden.shape), 0, 255
    ).astype(np.uint8)
    return Pictures(pixels, logits(float_model, pixels).argmax(1))


def test_an_int8_package_holds_8_bit_weights_and_answers_nearly_as_the_float_network(
    tmp_path, pictures, expected
):
    contents = replace(make_contents(tmp_path / "pictures"), int8=pictures, max_drop=0.2)
    build(make_network(), contents, tmp_path / "package", archive=False)
    package = load(tmp_path / "package")
    kinds = {
        tensor.data_type
        for tensor in onnx.load(tmp_path / "package/model.onnx").graph.initializer
        if len(tensor.dims) == 4
    }
    assert onnx.TensorProto.INT8 in kinds and onnx.TensorProto.FLOAT not in kinds
    assert package.metrics["float_top1"] == 1 and package.metrics["int8_top1"] >= 0.8
    logits_int8 = package.predict(
        np.stack(
            [
                package.prepare(tmp_path / "package/golden" / name)
                for name in ("0.jpg", "1.png", "2.webp")
            ]
        )
    )
    assert 0 < np.abs(logits_int8 - expected).max() < 0.1 * np.abs(expected).max()


def test_int8_is_calibrated_on_its_own_logits_and_its_distance_stays_in_float(
    tmp_path, original, pictures
):
    contents = make_calibrated(tmp_path / "pictures")
    build(
        make_network(),
        replace(contents, int8=pictures, max_drop=0.2),
        tmp_path / "package",
        archive=False,
    )
    package = load(tmp_path / "package", threads=1)
    model = onnx.load(tmp_path / "package/model.onnx")
    alone = set(quantize._for_distance_alone(model))
    kinds = {node.op_type for node in model.graph.node if node.name in alone}
    assert "MatMul" in kinds and not kinds & {"QuantizeLinear", "DequantizeLinear"}
    given = scores((tmp_path / "package/model.onnx").read_bytes(), pictures.pixels)
    fitted, _ = calibrate.fit(given["logits"], pictures.labels, given["distance"])
    assert package.calibration == fitted and fitted.pictures == len(pictures.labels)
    in_float = load(original / "package", threads=1).network(pictures.pixels).distance
    assert in_float is not None
    assert np.abs(given["distance"] - in_float).max() < 0.1 * np.ptp(in_float)


def test_int8_that_costs_too_much_accuracy_is_refused(float_model, pictures):
    message = (
        r"int8 has a top-1 accuracy of [\d.]+ on 60 validation pictures, float32 1\.0000; "
        r"package\.max_drop allows -0\.01 less; set package\.int8"
    )
    with pytest.raises(UserError, match=message):
        int8(float_model, pictures, max_drop=-0.01)  # not even an equal accuracy is enough


def test_accuracy_is_compared_on_pictures_that_did_not_calibrate_where_there_are_enough(
    float_model, pictures
):
    many = Pictures(np.tile(pictures.pixels, (8, 1, 1, 1)), np.tile(pictures.labels, 8))
    with pytest.raises(UserError, match="on 280 validation pictures"):
        int8(float_model, many, max_drop=-1)


def test_the_pictures_are_spread_over_the_whole_split(original):
    contents = make_contents(original / "pictures")
    chosen = choose([*contents.golden] * 400, np.arange(1200), contents.preprocessing)
    assert (
        len(chosen.labels) == 700
        and chosen.labels[0] == 0
        and chosen.labels[-1] == 1199
        and np.diff(chosen.labels).max() <= 2
    )


def test_a_network_that_averages_over_the_flip_is_served_so(tmp_path):
    network = make_network()
    network.averages_flip = True
    contents = make_contents(tmp_path / "pictures")
    config = {**contents.config, "train.tta": "flip"}
    target = tmp_path / "package"
    # Checked by ONNX Runtime before it is there.
    build(network, replace(contents, config=config), target, archive=False)
    packages = [load(target, threads=1, backend=backend) for backend in ("onnx", "torch")]
    pixels = np.stack([packages[0].prepare(target / "golden/0.jpg")])
    logits, other = (package.predict(pixels) for package in packages)
    np.testing.assert_allclose(logits, other, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        packages[0].predict(pixels[:, :, ::-1].copy()), logits, rtol=0, atol=1e-5
    )


def test_the_torch_back_end_gives_the_same_scores(original, expected):
    package = load(original / "package", threads=1, backend="torch")
    pixels = np.stack([package.prepare(original / "package/golden/2.webp")])
    given = package.network(pixels)
    np.testing.assert_allclose(given.logits, expected[2:], rtol=0, atol=1e-5)
    by_onnx = load(original / "package", threads=1).network(pixels)
    np.testing.assert_allclose(given.distance, by_onnx.distance, rtol=0, atol=1e-6)
    assert given.distance[0] > package.calibration.farthest
