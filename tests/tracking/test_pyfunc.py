"""The ranker as MLflow stores it: with its code, its requirements and the types of its input."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import date, timedelta
from importlib.metadata import version
from pathlib import Path

import mlflow
import pandas as pd
import polars as pl
import pytest
from mlflow.exceptions import MlflowException
from polars.testing import assert_frame_equal

from mtl_ranker.errors import ProjectError
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.tracking.pyfunc import model_arguments
from mtl_ranker.training.network import build_ranker, tasks_of
from mtl_ranker.training.specs import model_specs
from tests import projects
from tests.integration.commands import free_port
from tests.isolated import run_isolated, serve_isolated

DAY = date(2026, 3, 2)
ROWS = pl.DataFrame(
    {
        "tab": ["home", "search", None, "home"],
        "item_id": pl.Series([1, 2, None, 4], dtype=pl.Int64),
        "live": [True, False, None, True],
        "since": [DAY, DAY, None, DAY + timedelta(days=1)],
        "price": pl.Series([1.5, None, 2.5, 0.0], dtype=pl.Float32),
        "age": pl.Series([3, 4, 5, 6], dtype=pl.Int32),
        "born": [DAY, None, DAY - timedelta(days=900), DAY],
        "tags": [["a", "b"], ["a"], None, []],
    }
)


@pytest.fixture(scope="module")
def ranker() -> RankerArtifact:
    """An untrained ranker whose features have every type."""
    numerics = ["price", "age", "born"]
    categoricals = [{"column": c, "min_count": 1} for c in ("tab", "item_id", "live", "since")]
    lists = [{"column": "tags", "min_count": 1}]
    project = projects.project(
        features={"numerics": numerics, "categoricals": categoricals, "lists": lists}
    )
    encoder, tasks = Encoder.fit(project.features, numerics, ROWS), tasks_of(project)
    model = build_ranker(model_specs(project)["mmoe"], encoder, tasks)
    return RankerArtifact(project, encoder, tasks, model.eval())


@pytest.fixture(scope="module")
def stored(ranker, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    mlflow.pyfunc.save_model(folder / "model", **model_arguments(ranker, ROWS, folder))
    return folder / "model"


@pytest.fixture(scope="module")
def served(stored):
    return mlflow.pyfunc.load_model(str(stored))


@pytest.mark.parametrize(
    "shape",
    [
        pl.DataFrame.to_pandas,
        lambda rows: pd.DataFrame(rows.to_dicts()),
        lambda rows: rows.head(1).to_pandas(),
        lambda rows: rows.to_pandas()[rows.columns[::-1]].set_index([[9, 9, 3, 1]]),
    ],
    ids=["pandas", "objects", "one row", "other order and index"],
)
def test_missing_whole_numbers_booleans_and_dates_are_served(ranker, served, shape):
    frame = shape(ROWS)
    predicted = pl.from_pandas(served.predict(frame))
    assert_frame_equal(predicted, ranker.predict(ROWS.head(len(frame))), check_exact=True)


def test_a_date_has_the_same_value_as_in_training(ranker, served):
    """Days, not the milliseconds of the timestamp that a date is in pandas."""
    earlier = ROWS.with_columns(pl.col("born") - pl.duration(days=400))
    assert ranker.predict(earlier)["click"][0] != ranker.predict(ROWS)["click"][0]
    predicted = pl.from_pandas(served.predict(earlier.to_pandas()))
    assert_frame_equal(predicted, ranker.predict(earlier), check_exact=True)


def test_the_signature_says_what_is_required_and_what_a_missing_value_means(ranker, served):
    schema = served.metadata.get_input_schema()
    assert schema.required_input_names() == ["tab", "item_id", "live", "since", "age"]
    assert schema.optional_input_names() == ["tags", "price", "born"]
    types = {spec.name: str(spec.type) for spec in schema.inputs}
    assert types["tab"] == "DataType.string"
    assert types["price"] == "DataType.double"
    assert types["since"] == "DataType.datetime"
    described = served.metadata.metadata["input_columns"]
    assert described["item_id"]["type"] == "Int64"
    assert described["price"]["missing value"] == "missing, as in some rows of training"
    assert described["age"]["missing value"].startswith("missing; training has seen no missing")
    nulls = [pl.lit(None, ROWS.schema[name]).alias(name) for name in ("tags", "price", "born")]
    without = served.predict(ROWS.drop("tags", "price", "born").to_pandas())
    expected = ranker.predict(ROWS.with_columns(nulls))
    assert_frame_equal(pl.from_pandas(without), expected, check_exact=True)
    with pytest.raises(MlflowException, match="missing inputs \\['age'\\]"):
        served.predict(ROWS.drop("age").to_pandas())


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        (
            "item_id",
            [1.5, 2.0, 3.0, 4.0],
            r"'item_id' is Float64 and holds \[1.5\]; allowed: I",
        ),
        ("item_id", [1.0, None, 2.0, 2.0**53 + 2], r"holds \[9007199254740994.0\]; allowed"),
        ("age", ["3", "x", "4", "5"], r"'age' is String and holds \['x'\]; allowed: Int32"),
        ("live", ["true", None, "x", "no"], r"'live' is String and holds \['true', 'x', 'no'\]"),
        ("age", [1, "x", True, 2], r"'age' holds values of several types: bool, int, str"),
    ],
)
def test_a_value_of_another_type_is_refused(served, column, values, words):
    frame = ROWS.to_pandas()
    frame[column] = values
    with pytest.raises(ProjectError, match=words):
        served.predict(frame)


def test_requirements_are_pinned_and_cover_what_the_code_imports(stored):
    lines = (stored / "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in lines)
    names = {line.split("==")[0] for line in lines}
    assert names >= {"mlflow", "numpy", "pandas", "polars", "pyarrow", "safetensors", "torch"}
    assert not names & {"mtl_ranker", "prefect", "scikit-learn", "matplotlib", "typer"}
    assert f"polars=={version('polars')}" in lines


def test_a_model_that_was_stored_without_code_and_types_is_served(ranker, tmp_path):
    """As version 0.1.0 stored it before models carried their code."""
    script = tmp_path / "served_model.py"
    script.write_text("from mtl_ranker.tracking.pyfunc import serve\n\nserve()\n")
    artifacts = {"ranker": str(ranker.save(tmp_path / "ranker"))}
    options = {"artifacts": artifacts, "pip_requirements": ["mtl_ranker==0.1.0"]}
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=str(script), **options)
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    rows = ROWS.drop("since", "born").with_columns(ROWS["since"].cast(pl.String), born=None)
    assert_frame_equal(pl.from_pandas(served.predict(rows.to_pandas())), ranker.predict(rows))


PREDICT = """
import importlib.util, json
import mlflow.pyfunc, polars as pl
assert importlib.util.find_spec("mtl_ranker") is None
model = mlflow.pyfunc.load_model(sys.argv[1])
frame = pl.read_parquet(sys.argv[2]).to_pandas()
pl.from_pandas(model.predict(frame)).write_parquet("predicted.parquet")

from fastapi.testclient import TestClient
from mlflow.pyfunc.scoring_server import init
body = {"dataframe_split": json.loads(sys.argv[3])}
print(json.dumps(TestClient(init(model)).post("/invocations", json=body).json()))
import mtl_ranker
print(mtl_ranker.__file__)
"""


@pytest.mark.slow
def test_the_model_is_loaded_and_served_where_this_package_is_not_installed(
    ranker, stored, tmp_path
):
    rows = tmp_path / "rows.parquet"
    ROWS.write_parquet(rows)
    body = ROWS.to_pandas().to_json(orient="split", date_format="iso", index=False)
    output = run_isolated(PREDICT, tmp_path, stored, rows, body).splitlines()
    expected = ranker.predict(ROWS)
    assert_frame_equal(pl.read_parquet(tmp_path / "predicted.parquet"), expected)
    assert output[-1] == str(stored / "code" / "mtl_ranker" / "__init__.py")
    served = pl.DataFrame(json.loads(output[-2])["predictions"])
    assert_frame_equal(served, expected, check_dtypes=False)


def posted(address: str, rows: pl.DataFrame) -> tuple[int, str]:
    """The status and the answer of the model server for rows as a browser would send them."""
    content = {"columns": rows.columns, "data": [list(row) for row in rows.rows()]}
    body = json.dumps({"dataframe_split": content}, default=str).encode()
    request = urllib.request.Request(
        f"{address}/invocations", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_registered_version_is_served_by_mlflow_alone(ranker, tmp_path):
    """With nulls in every column, an absent optional column, and a mistake that is named."""
    tracking = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking)
    try:
        experiment = mlflow.create_experiment("served", str(tmp_path / "artifacts"))
        with mlflow.start_run(experiment_id=experiment):
            arguments = model_arguments(ranker, ROWS, tmp_path)
            mlflow.pyfunc.log_model(name="model", registered_model_name="served", **arguments)
    finally:
        mlflow.set_tracking_uri(before)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with serve_isolated("models:/served/1", folder, free_port(), tracking) as address:
        status, answer = posted(address, ROWS)
        assert status == 200, answer
        predicted = pl.DataFrame(json.loads(answer)["predictions"])
        assert_frame_equal(predicted, ranker.predict(ROWS), check_dtypes=False)
        optional = ["tags", "price", "born"]
        status, answer = posted(address, ROWS.drop(optional))
        nulls = [pl.lit(None, ROWS.schema[name]).alias(name) for name in optional]
        expected = ranker.predict(ROWS.with_columns(nulls))
        assert_frame_equal(
            pl.DataFrame(json.loads(answer)["predictions"]), expected, check_dtypes=False
        )
        status, answer = posted(address, ROWS.drop("age"))
        assert status == 400
        assert "missing inputs ['age']" in answer
