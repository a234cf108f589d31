"""The model card: README.md of a package, with the fields that Hugging Face's hub reads.

https://huggingface.co/docs/hub/model-cards (the fields), and Mitchell et al., "Model cards for
model reporting" (FAT* 2019), for what a reader must know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trainer.network.weights import SCRATCH
from trainer.results.bom import SPDX
from trainer.results.intervals import wilson_interval
from trainer.results.text import percent

# The hub's own names of licences that pretrained weights come under; others have to be described.
LICENCES = {*map(str.lower, SPDX), "openrail"}
LISTED = 50  # classes by name
FEW = 10  # pictures of a class in the test, with which its own figure says little
SHARES = {"top1": "top-1 accuracy", "top5": "top-5 accuracy"}


@dataclass(frozen=True)
class Card:
    """What a card says. Without a date: equal runs have equal cards.

    metrics: loss, top1, top5 and f1 on `split`. counts: pictures by split. labels: the class of
    each picture of `split`, by its place in `classes`. weights: source and licence of the first
    weights. findings: lines of what was noticed about the pictures. notes: further lines to the
    figures.
    """

    name: str
    network: str
    data: str
    classes: Sequence[str]
    split: str
    metrics: Mapping[str, float]
    counts: Mapping[str, int]
    labels: Sequence[int]
    weights: Mapping[str, str | None]
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Return the card, Markdown behind YAML."""
        head = yaml.safe_dump(self._fields(), sort_keys=False, allow_unicode=True)
        parts = [f"---\n{head}---", f"# {_plain(self.name)}", self._about()]
        sections = {
            "Classes": self._classes(),
            "How good it is": self._figures(),
            "Data": self._data(),
            "First weights": self._first_weights(),
            "Problems found in the pictures": self._noticed(),
            "What it is not for": self._not_for(),
            "Use": USE,
        }
        parts += [f"## {title}\n\n{text}" for title, text in sections.items()]
        return "\n\n".join(parts) + "\n"

    def _fields(self) -> dict[str, Any]:
        metrics = [
            {"type": "accuracy", "name": "Top-1 accuracy", "value": self.metrics["top1"]},
            {"type": "f1", "name": "Macro F1", "value": self.metrics["f1"]},
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"name": self.data, "type": "imagefolder", "split": self.split},
            "metrics": metrics,
        }
        return {
            **self._licence(),
            "library_name": "onnx",
            "pipeline_tag": "image-classification",
            "tags": ["image-classification", "packhorse", self.network],
            "metrics": ["accuracy", "f1"],
            "model-index": [{"name": self.name, "results": [result]}],
        }

    def _licence(self) -> dict[str, str]:
        licence = self.weights.get("licence")
        if licence is None:
            return {"license": "unknown"}
        if licence.lower() in LICENCES:
            return {"license": licence.lower()}
        return {"license": "other", "license_name": licence}

    def _about(self) -> str:
        return (
            f"An image classifier: {_plain(self.network)}, trained by Packhorse to tell "
            f"{len(self.classes)} classes. package.json has its settings, preprocessing and "
            "versions, and the digest of each file."
        )

    def _classes(self) -> str:
        names = ", ".join(f"`{name.replace('`', '')}`" for name in self.classes[:LISTED])
        more = len(self.classes) - LISTED
        if more > 0:
            names += f" and {more} more (package.json)"
        return names

    def _figures(self) -> str:
        pictures = len(self.labels)
        rows = ["| figure | value | 95% interval |", "| --- | --- | --- |"]
        for name, title in SHARES.items():
            if name == "top5" and len(self.classes) <= 5:
                continue
            share = self.metrics[name]
            low, high = wilson_interval(round(share * pictures), pictures)
            rows.append(f"| {title} | {percent(share)} | {percent(low)} to {percent(high)} |")
        rows.append(f"| macro F1 | {percent(self.metrics['f1'])} | |")
        rows.append(f"| loss | {self.metrics['loss']:.3f} | |")
        said = f"On the {pictures:,} pictures of {self.split}:"
        if self.split != "test":
            said += (
                " there is no test; these pictures chose the best epoch too, so the figures "
                "are optimistic."
            )
        return "\n\n".join([said, "\n".join(rows), *self.notes])

    def _data(self) -> str:
        counts = ", ".join(f"{count:,} {split}" for split, count in self.counts.items())
        return f"{_plain(self.data)}: {counts} pictures."

    def _first_weights(self) -> str:
        licence = self.weights.get("licence") or "nobody says; ask before you publish"
        if self.weights.get("source") == SCRATCH:
            return "None: trained from scratch."
        return f"{_plain(str(self.weights.get('source')))}. Licence: {_plain(licence)}."

    def _noticed(self) -> str:
        if not self.findings:
            return "None."
        return "\n".join(f"- {_plain(line)}" for line in self.findings)

    def _not_for(self) -> str:
        lines = [
            f"Pictures of anything else: it answers with one of its {len(self.classes)} classes, "
            "whatever it is shown. `unlike` marks pictures unlike those it was trained on, but not "
            "each of them.",
            "Other cameras, places or seasons than those of its pictures: its figures were "
            "measured on pictures of the same collection. Measure it on yours first: "
            "`python -m serving evaluate`.",
            "Decisions about people's health, safety or rights, unless a person reviews them.",
        ]
        counts = dict.fromkeys(self.classes, 0)
        for label in self.labels:
            counts[self.classes[label]] += 1
        few = sum(count < FEW for count in counts.values())
        if few:
            lines.append(
                f"Promises about single classes: {few} of {len(counts)} have fewer than {FEW} "
                f"pictures in {self.split}."
            )
        return "\n".join(f"- {line}" for line in lines)


USE = """```
python -m serving predict model.tar.gz PICTURES
```

or in Python: `packhorse.Model.load("model.tar.gz").predict(["picture.jpg"])`."""


def _plain(text: str) -> str:
    """Return text as Markdown shows it as it is."""
    for character in "\\`*_[]<>|":
        text = text.replace(character, f"\\{character}")
    return text
