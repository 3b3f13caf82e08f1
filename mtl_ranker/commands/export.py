"""`mtl-ranker export`: the champion as files for use elsewhere."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import polars as pl

from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.view import examples_dataset
from mtl_ranker.ranking.artifact import RegisteredRanker
from mtl_ranker.ranking.onnx_model import check_installed, export_onnx, load_onnx
from mtl_ranker.ranking.program import export_program, latencies, load_program
from mtl_ranker.reports.console import console
from mtl_ranker.tracking import connection, pyfunc, registry

REQUEST_ROWS = 500  # of the latency: the candidates of one user
CHECKED_ROWS = 2_000


@dataclass(frozen=True)
class Export:
    """What is exported, and where to.

    Attributes:
        target: a path that does not exist.
        form: `mlflow`, a pyfunc model; `torch`, a `torch.export` program of encoded rows; `onnx`,
            the same program as an ONNX model.
        snapshot: with the features as of `day`; reads user, item and context instead of features.
    """

    target: Path
    form: Literal["mlflow", "torch", "onnx"]
    snapshot: bool
    day: date


def export_command(context: Context, export: Export) -> dict[str, Any]:
    """Export the champion; prints and returns what was written.

    Raises ProjectError if the target exists, for a snapshot in another form than `mlflow`, for
    `onnx` without its packages, and without a champion or published examples of its features.
    """
    if export.target.exists():
        raise ProjectError(f"--out {export.target}: it exists; allowed: a path that does not")
    if export.snapshot and export.form != "mlflow":
        raise ProjectError(f"--snapshot --format {export.form}: allowed: --format mlflow")
    if export.form == "onnx":
        check_installed()
    connection.connect(context.workspace)
    champion = registry.load_artifact(context.project, "champion")
    version = champion.version
    console.print(f"{context.project.name} version {version} → {export.target}")
    # Complete or absent: an interrupted export leaves no folder.
    export.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=export.target.parent) as scratch:
        folder = Path(scratch) / "export"
        written = _write(context, champion, export, folder)
        folder.rename(export.target)
    return {"path": str(export.target), "version": version} | written


def _write(
    context: Context, champion: RegisteredRanker, export: Export, folder: Path
) -> dict[str, Any]:
    """Write the files into a new folder; prints and returns what is known of them."""
    scoring = context.project.scoring
    steps = [f"scoring.rules.{name}" for name in scoring.rules.names]
    steps += ["scoring.exploration"] if scoring.exploration is not None else []
    if export.snapshot:
        pyfunc.export_ranking(context, champion, export.day, folder)
        console.print(f"ranks candidates with the features as of {export.day}")
        if steps:
            console.print(f"lists are made under {', '.join(steps)}, as of that day too")
        return {"day": str(export.day), "rules": steps}
    if steps:
        console.print(
            f"predicts and blends rows; {', '.join(steps)} are about whole lists, which only "
            "`--snapshot` makes"
        )
    rows = _example_rows(context, champion)
    if export.form == "mlflow":
        pyfunc.export_model(champion, rows.head(5), folder)
        return {}
    folder.mkdir()
    write, load = (
        (export_onnx, load_onnx) if export.form == "onnx" else (export_program, load_program)
    )
    worst = write(champion.artifact, rows, folder)
    request = pl.concat([rows] * -(-REQUEST_ROWS // rows.height)).head(REQUEST_ROWS)
    measured = latencies(champion.artifact, request, load(folder))
    console.print(f"largest difference from the model's predictions: {worst:.2g}")
    console.print(f"milliseconds for one user's {REQUEST_ROWS} items, median and 99th percentile:")
    for name, latency in measured.items():
        console.print(f"  {name:<22} {latency.p50:8.2f} {latency.p99:8.2f}")
    times = {name: asdict(latency) for name, latency in measured.items()}
    return {"largest_difference": worst, "milliseconds": times}


def _example_rows(context: Context, champion: RegisteredRanker) -> pl.DataFrame:
    """Published examples with the champion's feature columns."""
    own = champion.context(context)
    dataset = examples_dataset(own)
    days = own.workspace.days(dataset)
    if not days:
        raise ProjectError(f"{own.workspace.where(dataset)}: no examples; run `mtl-ranker promote`")
    rows = own.workspace.scan(dataset, days[-1:]).head(CHECKED_ROWS).collect()
    known = champion.artifact.with_vectors(own.workspace, rows).encoder
    return known.with_vectors(rows.select(champion.artifact.columns))
