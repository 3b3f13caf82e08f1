"""The ranker as an `mlflow.pyfunc` model; imports only what inference needs.

A registered model carries this module and those that it imports (`carried_code`), so that MLflow
loads it where this package is not installed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import polars as pl
from mlflow.pyfunc import PythonModel

from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.inputs import InputColumn, feature_inputs, frame_of, prepared
from mtl_ranker.ranking.snapshot import load_snapshot, rank

# The schema comes from the logged signature. MLflow warns about missing type hints and overrides
# ignore filters, so the warning is recorded instead.
with warnings.catch_warnings(record=True):

    class ServedRanker(PythonModel):
        """From a pandas frame of feature rows to predictions and the score.

        Its artifacts are `ranker`, the folder of `RankerArtifact.save`, and `types`, a Parquet file
        without rows that has the types of the input columns.
        """

        def load_context(self, context: Any) -> None:
            self.ranker = RankerArtifact.load(Path(context.artifacts["ranker"]))
            types = context.artifacts.get("types")  # earlier versions stored none
            self.columns: list[InputColumn] | None = None
            if types is not None:
                encoder, by = self.ranker.encoder, self.ranker.calibration.by
                self.columns = feature_inputs(encoder, by, pl.read_parquet(types).schema)

        def predict(self, context, model_input, params=None):
            frame = frame_of(model_input)
            if self.columns is not None:
                frame = prepared(frame, self.columns)
            return self.ranker.predict(frame).to_pandas()

    class ServedRanking(PythonModel):
        """From a pandas frame of users, items and context to each user's ranking.

        Its artifacts are `ranker` and `snapshot`, the folder of `save_snapshot`.
        """

        def load_context(self, context: Any) -> None:
            self.ranker = RankerArtifact.load(Path(context.artifacts["ranker"]))
            self.snapshot = load_snapshot(Path(context.artifacts["snapshot"]))

        def predict(self, context, model_input, params=None):
            frame = frame_of(model_input)
            candidates = prepared(frame, self.snapshot.columns)
            return rank(self.ranker, self.snapshot, candidates).to_pandas()
