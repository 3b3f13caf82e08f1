"""How MLflow stores a ranker: its code, requirements, signature and types (`served` loads it)."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import polars as pl
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import AnyType, Array

from mtl_ranker import __version__
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError, first_line
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker, save_blend
from mtl_ranker.ranking.blend import chosen_blend
from mtl_ranker.ranking.inputs import InputColumn, feature_inputs
from mtl_ranker.ranking.rules import PROPENSITY, SEED
from mtl_ranker.ranking.snapshot import load_snapshot, save_snapshot
from mtl_ranker.tracking.carried_code import copy_code, requirements
from mtl_ranker.tracking.served import ServedRanker


def serve() -> None:
    """Hand the model to MLflow; models that version 0.1.0 registered without code call this."""
    set_model(ServedRanker())


def model_arguments(
    artifact: RankerArtifact, example: pl.DataFrame, folder: Path
) -> dict[str, Any]:
    """What MLflow is given to store a ranker: feature rows in, predictions and `score` out.

    Args:
        example: some raw feature rows, in the types of the training examples; the model reads
            vectors themselves where these have keys.
        folder: where the ranker's files and code are written; needed until MLflow has copied them.
    """
    example = artifact.encoder.with_vectors(example)
    columns = feature_inputs(artifact.encoder, artifact.calibration.by, example.schema)
    files = {"ranker": artifact.save(folder / "ranker"), "types": folder / "types.parquet"}
    example.clear().write_parquet(files["types"])
    return _arguments("served_model.py", files, columns, folder) | {
        "signature": ModelSignature(_inputs(columns), Schema(_outputs(artifact))),
        "input_example": example.to_pandas(),
    }


def export_model(ranker: RegisteredRanker, example: pl.DataFrame, target: Path) -> None:
    """Write a model as an MLflow model folder; it blends as the pipeline does.

    Args:
        example: as in `model_arguments`.
        target: a path that does not exist.
    """
    with tempfile.TemporaryDirectory() as scratch:
        arguments = model_arguments(ranker.artifact, example, Path(scratch))
        save_blend(Path(scratch) / "ranker", chosen_blend(ranker.artifact.project))
        mlflow.pyfunc.save_model(target, **arguments)


def export_ranking(context: Context, ranker: RegisteredRanker, day: date, target: Path) -> None:
    """Write a model with the features as of day D as an MLflow model folder.

    It ranks candidates, given by user, item and context, as `score_day` does. Raises ProjectError
    as `save_snapshot` does.

    Args:
        target: a path that does not exist.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {
            "ranker": ranker.artifact.save(folder / "ranker"),
            "snapshot": save_snapshot(context, ranker, day, folder / "snapshot"),
        }
        save_blend(files["ranker"], chosen_blend(ranker.artifact.project))
        snapshot = load_snapshot(files["snapshot"])
        columns = snapshot.columns
        keys = [ColSpec(_kind(c.dtype), c.name) for c in columns]
        made = [ColSpec(DataType.integer, "rank")]
        if snapshot.lists is not None and snapshot.lists.explores:
            made += [ColSpec(DataType.double, PROPENSITY), ColSpec(DataType.long, SEED)]
        made.append(ColSpec(DataType.string, "model_version"))
        outputs = Schema([*keys, *_outputs(ranker.artifact), *made])
        arguments = _arguments("served_ranking.py", files, columns, folder)
        arguments["metadata"] |= {"day": str(day), "version": ranker.version}
        arguments["input_example"] = snapshot.example.to_pandas()
        signature = ModelSignature(_inputs(columns), outputs)
        mlflow.pyfunc.save_model(target, signature=signature, **arguments)


def _arguments(
    script: str, files: Mapping[str, Path], columns: list[InputColumn], folder: Path
) -> dict[str, Any]:
    """What every stored model has: its script, files, code, requirements and input columns."""
    return {
        "python_model": str(Path(__file__).with_name(script)),
        "artifacts": {name: str(path) for name, path in files.items()},
        "metadata": {
            "mtl_ranker": __version__,
            "input_columns": {c.name: c.description for c in columns},
        },
        "code_paths": [str(copy_code(folder / "code"))],
        "pip_requirements": requirements(),
    }


def _inputs(columns: list[InputColumn]) -> Schema:
    return Schema([ColSpec(_kind(c.dtype), c.name, required=c.required) for c in columns])


def _outputs(artifact: RankerArtifact) -> list[Any]:
    predictions = [ColSpec(DataType.float, task.name) for task in artifact.tasks]
    return [*predictions, ColSpec(DataType.double, "score")]


def store_and_load(artifact: RankerArtifact, example: pl.DataFrame, folder: Path) -> None:
    """Store a ranker as MLflow does when it is registered, load it and predict the example.

    Raises ProjectError with MLflow's reason if the example does not fit the signature.

    Args:
        folder: an empty one.
    """
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    arguments = model_arguments(artifact, example, folder)
    try:
        mlflow.pyfunc.save_model(folder / "model", **arguments)
        with _same_search_path():
            mlflow.pyfunc.load_model(str(folder / "model")).predict(arguments["input_example"])
    except MlflowException as error:
        types = ", ".join(f"{name} {dtype}" for name, dtype in example.schema.items())
        raise ProjectError(
            f"MLflow cannot store a model with these features: {first_line(error)}; they are: "
            f"{types}"
        ) from error


@contextmanager
def _same_search_path() -> Iterator[None]:
    """MLflow puts a model's code first in the search path, also for processes started later."""
    before = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = before


def _kind(dtype: pl.DataType) -> Any:
    """MLflow's type of a column.

    Whole numbers and Booleans have none: with a missing value, whole numbers are floats in pandas,
    which MLflow refuses for its integer types, and MLflow's server makes a missing Boolean false.
    `prepared` checks both.
    """
    if isinstance(dtype, pl.List):
        inner = _kind(dtype.inner)  # type: ignore[arg-type]
        return Array(inner)
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return DataType.string
    if dtype == pl.Date or (isinstance(dtype, pl.Datetime) and dtype.time_zone is None):
        return DataType.datetime
    return DataType.double if dtype.is_float() or dtype.is_decimal() else AnyType()
