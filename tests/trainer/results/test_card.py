"""The model card: README.md of a package, as Hugging Face's hub reads it."""

import dataclasses

import pytest
import yaml

from trainer.network.weights import SCRATCH
from trainer.results.card import Card

CARD = Card(
    name="dogs-resnet50-1a2b",
    network="resnet50",
    data="dogs",
    classes=["beagle", "pug`", *(f"breed {number}" for number in range(60))],
    split="test",
    metrics={"loss": 0.5, "top1": 0.75, "top5": 0.9, "f1": 0.7},
    counts={"train": 1200, "valid": 30, "test": 20},
    labels=[0] * 15 + [1] * 5,
    weights={"source": "torchvision IMAGENET1K_V2 (resnet50.pth)", "licence": "Apache-2.0"},
    findings=["pictures in train, and in valid or test too: 1 the same file: a_b.png"],
    notes=["Probabilities: temperature 1.2"],
)


def head(card: Card) -> dict:
    return yaml.safe_load(card.text().split("---\n")[1])


def test_its_head_has_the_fields_that_the_hub_reads():
    fields = head(CARD)
    assert fields["license"] == "apache-2.0"
    assert fields["pipeline_tag"] == "image-classification"
    assert "resnet50" in fields["tags"] and fields["metrics"] == ["accuracy", "f1"]
    [model] = fields["model-index"]
    [result] = model["results"]
    assert model["name"] == "dogs-resnet50-1a2b"
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "dogs", "type": "imagefolder", "split": "test"}
    assert [(each["type"], each["value"]) for each in result["metrics"]] == [
        ("accuracy", 0.75),
        ("f1", 0.7),
    ]


@pytest.mark.parametrize(
    ("licence", "fields"),
    [
        (None, {"license": "unknown"}),
        ("CC-BY-NC-4.0", {"license": "cc-by-nc-4.0"}),
        ("DINOv3 License", {"license": "other", "license_name": "DINOv3 License"}),
    ],
)
def test_a_licence_is_one_that_the_hub_knows_or_is_named(licence, fields):
    card = dataclasses.replace(CARD, weights={"source": "timm", "licence": licence})
    assert {key: value for key, value in head(card).items() if "license" in key} == fields
    assert (licence or "nobody says") in card.text()


def test_it_says_what_a_reader_must_know():
    text = CARD.text()
    for line in (
        "| top-1 accuracy | 75.0% | 53.1% to 88.8% |",  # Wilson's, of 15 of 20
        "dogs: 1,200 train, 30 valid, 20 test pictures.",
        "torchvision IMAGENET1K\\_V2 (resnet50.pth). Licence: Apache-2.0.",
        "- pictures in train, and in valid or test too: 1 the same file: a\\_b.png",
        "61 of 62 have fewer than 10 pictures in test",
        "`beagle`, `pug`, `breed 0`",
        "and 12 more (package.json)",
        "Probabilities: temperature 1.2",
    ):
        assert line in text
    scratch = dataclasses.replace(CARD, weights={"source": SCRATCH, "licence": None}, findings=[])
    assert "None: trained from scratch." in scratch.text()
    assert "pictures\n\nNone.\n" in scratch.text()
    assert "optimistic" not in text
    assert "optimistic" in dataclasses.replace(CARD, split="valid").text()
