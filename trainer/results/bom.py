"""The bill of materials: bom.json of a package, as CycloneDX 1.6.

https://cyclonedx.org/docs/1.6/json/ (the fields), and https://cyclonedx.org/capabilities/mlbom/
(what a model's holds). It has neither date nor serial number, so equal packages have equal ones.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.network.weights import SCRATCH

BOM = "bom.json"  # the name that CycloneDX's tools look for
# SPDX's names of weights' licences. Other licences keep their own names.
SPDX = (
    "Apache-2.0", "MIT", "BSD-3-Clause", "BSD-2-Clause", "CC-BY-4.0", "CC-BY-SA-4.0",
    "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC0-1.0", "GPL-3.0", "AGPL-3.0",
)  # fmt: skip
OF_TENSORS = "the names, types, shapes and bytes of its tensors"
OF_PICTURES = "each picture's SHA-256, split and class"

Component = dict[str, Any]


@dataclass(frozen=True)
class Materials:
    """The parts of a package.

    files: SHA-256 of the network's files, by name. identity: of the pictures and the initial
    weights (`trainer/images/identity.py`). weights: their source and licence. libraries: versions
    of those that serving needs, by name. metrics: by split and name, as in the package.
    """

    network: str
    data: str
    classes: Sequence[str]
    files: Mapping[str, str]
    identity: Mapping[str, str]
    weights: Mapping[str, str | None]
    libraries: Mapping[str, str]
    metrics: Mapping[str, float]

    def text(self) -> str:
        """Return the bill, as JSON."""
        components = [
            *self._files(),
            *self._first_weights(),
            self._pictures(),
            *self._libraries(),
        ]
        bill = {
            "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.6",
            "version": 1,
            "metadata": {"component": self._model()},
            "components": components,
            "dependencies": [
                {"ref": "model", "dependsOn": [each["bom-ref"] for each in components]}
            ],
        }
        return json.dumps(bill, indent=1) + "\n"

    def _model(self) -> Component:
        measured = [
            {"type": name, "value": f"{value:g}"}
            for name, value in self.metrics.items()
            if name != "epoch"
        ]
        return {
            "type": "machine-learning-model",
            "bom-ref": "model",
            "name": self.network,
            "description": f"An image classifier of {len(self.classes)} classes.",
            "modelCard": {
                "modelParameters": {
                    "task": "image-classification",
                    "modelArchitecture": self.network,
                    "datasets": [{"ref": "pictures"}],
                    "inputs": [{"format": "image"}],
                    "outputs": [{"format": "logits"}],
                },
                "quantitativeAnalysis": {"performanceMetrics": measured},
            },
        }

    def _files(self) -> list[Component]:
        return [
            {"type": "file", "bom-ref": name, "name": name, "hashes": _sha256(digest)}
            for name, digest in sorted(self.files.items())
        ]

    def _first_weights(self) -> list[Component]:
        """Return the weights that training began with, if any."""
        source = self.weights.get("source")
        if source is None or source == SCRATCH:
            return []
        component = {
            "type": "machine-learning-model",
            "bom-ref": "weights",
            "name": source,
            "description": "the weights that training began with",
            **_hashed(self.identity.get("weights.tensors"), OF_TENSORS),
        }
        if source.startswith(("https://", "http://")):
            component["externalReferences"] = [{"type": "distribution", "url": source}]
        licence = self.weights.get("licence")
        if licence is not None:
            component["licenses"] = [{"license": _licence(licence)}]
        return [component]

    def _pictures(self) -> Component:
        return {
            "type": "data",
            "bom-ref": "pictures",
            "name": self.data,
            "description": "the pictures that it was trained and measured on",
            "data": [{"type": "dataset"}],
            **_hashed(self.identity.get("pictures"), OF_PICTURES),
        }

    def _libraries(self) -> list[Component]:
        return [
            {
                "type": "library",
                "bom-ref": f"pkg:pypi/{name}@{version}",
                "name": name,
                "version": version,
                "purl": f"pkg:pypi/{name}@{version}",
            }
            for name, version in sorted(self.libraries.items())
        ]


def _sha256(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _hashed(digest: str | None, of: str) -> Component:
    """Return the fields for a digest that is not a file's, with what it covers."""
    if digest is None:
        return {}
    properties = [{"name": "packhorse:sha256-of", "value": of}]
    return {"hashes": _sha256(digest), "properties": properties}


def _licence(licence: str) -> dict[str, str]:
    for identifier in SPDX:
        if identifier.lower() == licence.lower():
            return {"id": identifier}
    return {"name": licence}
