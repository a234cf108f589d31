import json
from dataclasses import replace

import pytest

from tests.conftest import PROJECT
from trainer.network.weights import SCRATCH
from trainer.results.bom import Materials

MATERIALS = Materials(
    network="resnet18",
    data="pets",
    classes=["cat", "dog"],
    files={"model.onnx": "a" * 64, "model.safetensors": "b" * 64},
    identity={"pictures": "c" * 64, "weights.tensors": "d" * 64},
    weights={"source": "timm/resnet18.a1_in1k", "licence": "apache-2.0"},
    libraries={"numpy": "2.4.6", "pillow-heif": "1.8.1"},
    metrics={"test_top1": 0.875, "epoch": 3},
)


def components(materials: Materials) -> dict[str, dict]:
    return {each["bom-ref"]: each for each in json.loads(materials.text())["components"]}


def test_it_names_files_weights_pictures_and_libraries():
    parts = components(MATERIALS)
    assert list(parts) == [
        "model.onnx",
        "model.safetensors",
        "weights",
        "pictures",
        "pkg:pypi/numpy@2.4.6",
        "pkg:pypi/pillow-heif@1.8.1",
    ]
    digests = {
        name: part.get("hashes", [{}])[0].get("content", "")[:1] for name, part in parts.items()
    }
    assert "".join(digests.values()) == "abdc"
    assert parts["weights"]["name"] == "timm/resnet18.a1_in1k"
    assert parts["weights"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    bill = json.loads(MATERIALS.text())
    assert bill["dependencies"] == [{"ref": "model", "dependsOn": list(parts)}]
    measured = bill["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
    assert measured == {"performanceMetrics": [{"type": "test_top1", "value": "0.875"}]}


WEIGHTS = {
    "scratch": {"source": SCRATCH, "licence": None},
    "nobody says": {"source": "mine.pth", "licence": None},
    "of its own": {"source": "https://a.example/w.pth", "licence": "ACME research only"},
}


def test_it_says_no_more_of_the_first_weights_than_is_known():
    said = {
        name: components(replace(MATERIALS, weights=weights)).get("weights")
        for name, weights in WEIGHTS.items()
    }
    assert said["scratch"] is None
    assert "licenses" not in said["nobody says"]
    assert said["of its own"]["licenses"] == [{"license": {"name": "ACME research only"}}]
    assert said["of its own"]["externalReferences"][0]["url"] == "https://a.example/w.pth"


# The standard's own schema comes with what writes the bill of a release.
SCHEMAS = next(PROJECT.glob(".venv-tools/lib/python3.*/site-packages/cyclonedx/schema/_res"), None)


@pytest.mark.skipif(SCHEMAS is None, reason="cyclonedx is not installed: make release")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_it_is_what_the_standard_says(weights):
    # imported here: they come with other tools of the tests
    from jsonschema import Draft7Validator
    from referencing import Registry, Resource

    assert SCHEMAS is not None
    schemas = {
        name: json.loads((SCHEMAS / f"{name}.SNAPSHOT.schema.json").read_text())
        for name in ("bom-1.6", "spdx", "jsf-0.82")
    }
    resources = [(each["$id"], Resource.from_contents(each)) for each in schemas.values()]
    validator = Draft7Validator(schemas["bom-1.6"], registry=Registry().with_resources(resources))
    bill = json.loads(replace(MATERIALS, weights=WEIGHTS[weights]).text())
    assert [error.message for error in validator.iter_errors(bill)] == []
