"""Packhorse in Python: `import packhorse` in a script or a notebook.

    run = packhorse.fit("dogs", train={"epochs": 20})
    run.metrics["top1"], run.directory
    model = packhorse.Model.load(run.directory)
    model.predict(["rex.jpg"])[0].label

These names are the whole of it; everything else may change. It does what `python -m trainer` and
`python -m serving predict` do, by the same code. A mistake, or a fault of the machine, is one
exception, `UserError`, with the one line that the commands print.
"""

from packhorse.fitting import Run, fit
from packhorse.model import Image, Model
from trainer import __version__
from trainer.common.errors import UserError
from trainer.results.prediction import Prediction

__all__ = ["Image", "Model", "Prediction", "Run", "UserError", "__version__", "fit"]
