"""The ranker as an `mlflow.pyfunc` model."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array

from mtl_ranker import __version__
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.ranking.artifact import RankerArtifact

SERVED = Path(__file__).with_name("served_model.py")

# The schema comes from the logged signature. MLflow warns about missing type hints and overrides
# ignore filters, so the warning is recorded instead.
with warnings.catch_warnings(record=True):

    class ServedRanker(PythonModel):
        """A ranker as a pyfunc model: from a pandas frame of raw feature rows to predictions."""

        def load_context(self, context: Any) -> None:
            self.ranker = RankerArtifact.load(Path(context.artifacts["ranker"]))

        def predict(self, context, model_input, params=None):
            frame = pl.from_pandas(model_input, nan_to_null=True)
            return self.ranker.predict(frame).to_pandas()


def serve() -> None:
    """Hand the model to MLflow, from `served_model.py`."""
    set_model(ServedRanker())


def signature_of(artifact: RankerArtifact, example: pl.DataFrame) -> ModelSignature:
    """Inputs by the columns of `example`, outputs per objective and `score`.

    Whole numbers and Booleans have no type in the signature: in pandas they become other types
    where a value is missing, and MLflow would refuse such rows.
    """
    columns: list[Any] = []
    for name, dtype in example.schema.items():
        kind: Any = _kind(dtype)
        if isinstance(dtype, pl.List):
            kind = Array(_kind(dtype.inner))
        columns.append(ColSpec(kind, name, required=False))
    outputs: list[Any] = [ColSpec(DataType.float, task.name) for task in artifact.tasks]
    return ModelSignature(Schema(columns), Schema([*outputs, ColSpec(DataType.double, "score")]))


def model_arguments(artifact: RankerArtifact, saved: Path, example: pl.DataFrame) -> dict[str, Any]:
    """What MLflow is given to store a ranker.

    Args:
        saved: folder of `artifact.save`.
        example: some raw feature rows.
    """
    return {
        "python_model": str(SERVED),
        "artifacts": {"ranker": str(saved)},
        "signature": signature_of(artifact, example),
        "input_example": example.to_pandas(),
        "pip_requirements": [f"mtl_ranker=={__version__}"],
    }


def store_and_load(artifact: RankerArtifact, example: pl.DataFrame, folder: Path) -> None:
    """Store a ranker as MLflow does when it is registered, load it and predict the example.

    Raises ProjectError with MLflow's reason if the example does not fit the signature.

    Args:
        folder: an empty one.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    saved = artifact.save(folder / "ranker")
    arguments = model_arguments(artifact, saved, example)
    try:
        mlflow.pyfunc.save_model(folder / "model", **arguments)
        mlflow.pyfunc.load_model(str(folder / "model")).predict(arguments["input_example"])
    except MlflowException as error:
        types = ", ".join(f"{name} {dtype}" for name, dtype in example.schema.items())
        raise ProjectError(
            f"MLflow cannot store a model with these features: {first_line(error)}; they are: "
            f"{types}"
        ) from error


def _kind(dtype: Any) -> Any:
    if dtype == pl.String:
        return DataType.string
    if dtype == pl.Boolean or dtype == pl.Null or dtype.is_integer():
        return AnyType()
    return DataType.float if dtype == pl.Float32 else DataType.double
