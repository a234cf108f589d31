"""Which package the user means: a file, a run's, the newest run's, or the one from SageMaker."""

from pathlib import Path

from trainer.common.errors import UserError
from trainer.common.paths import ARCHIVE, expanded

MODEL = Path("/opt/ml/model")  # where SageMaker puts the package
RUNS = Path("runs")
NEWEST = "newest"


def package_of(model: str) -> Path:
    """Return the package that the user means. Raises UserError.

    model: a package, a run's directory, or "newest": SageMaker's package, or the newest run's.
    """
    if model == NEWEST:
        return _newest()
    path = Path(expanded(model))
    inside = path / ARCHIVE
    if inside.exists():
        return inside
    return path


def _newest() -> Path:
    """Return the package that SageMaker put here, or the newest run's. Raises UserError."""
    if (MODEL / "package.json").exists():
        return MODEL
    packages = RUNS.glob(f"*/{ARCHIVE}")
    newest = max(packages, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        raise UserError(
            f"{RUNS}/: there is no model package; train one (make train), "
            "or name one: python -m serving serve PACKAGE"
        )
    return newest
