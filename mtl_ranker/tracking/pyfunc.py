"""The ranker as an `mlflow.pyfunc` model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import polars as pl
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

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
    """Inputs by the columns of `example`, outputs per objective and `score`."""
    columns: list[Any] = []
    for name, dtype in example.schema.items():
        kind: Any = _kind(dtype)
        if isinstance(dtype, pl.List):
            kind = Array(_kind(dtype.inner))
        columns.append(ColSpec(kind, name, required=False))
    outputs: list[Any] = [ColSpec(DataType.float, task.name) for task in artifact.tasks]
    return ModelSignature(Schema(columns), Schema([*outputs, ColSpec(DataType.double, "score")]))


def _kind(dtype: Any) -> DataType:
    if dtype == pl.String:
        return DataType.string
    if dtype.is_integer():
        return DataType.long
    return DataType.float if dtype == pl.Float32 else DataType.double
