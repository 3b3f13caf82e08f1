"""The latency of a request: one user's candidates with features, by each form of a model.

An MMoE with trees and calibration is trained on a simulated feed. Its predictions are measured as
`RankerArtifact.predict`, as a `torch.export` program and as an ONNX model in onnxruntime, each with
as many threads as torch. The programs read encoded rows; the times with feature rows include the
encoder. Needs the extra `onnx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import polars as pl

from benchmarks import markdown, results
from benchmarks.prepared import examples_of
from mtl_ranker.config import load_project
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, train_model, with_trees
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.onnx_model import check_installed, export_onnx, load_onnx
from mtl_ranker.ranking.program import export_program, latencies, load_program

TREES = 200
HEADINGS = ["model", "input", "p50, ms", "p99, ms"]
FORMS = {"torch.export": (export_program, load_program), "ONNX": (export_onnx, load_onnx)}


def trained(folder: Path, impressions: int) -> tuple[RankerArtifact, pl.DataFrame]:
    """An MMoE averaged with boosted trees, trained on a simulated feed, and its test rows."""
    feed = simulate(Feed(impressions=impressions, days=11), folder / "feed")
    project = load_project("simulated")
    training = project.training.model_copy(update={"trees": TREES})
    project = project.model_copy(update={"training": training})
    parts = examples_of(project, feed)
    spec = make("mmoe", project.models["mmoe"], len(parts.tasks), project.features.groups)
    run = with_trees(project, parts, train_model(project, parts, Contender("mmoe", spec, seed=0)))
    return run.artifact, parts.held_out.frame.select(run.artifact.columns)


def main() -> None:
    """Print the table, and write the figures where the options say."""
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=60_000)
    options.add_argument("--items", type=int, default=500, help="of one request")
    options.add_argument("--times", type=int, default=1_000, help="requests of each form")
    chosen = results.parse(options)
    check_installed()
    folder = Path(mkdtemp(prefix="benchmark-latency-"))
    artifact, frame = trained(folder, chosen.impressions)
    request = frame.head(chosen.items)
    forms: dict[str, Any] = {}
    differences: dict[str, float] = {}
    for name, (export, load) in FORMS.items():
        target = folder / name
        target.mkdir()
        differences[name] = export(artifact, frame.head(2_000), target)
        measured = latencies(artifact, request, load(target), chosen.times)
        forms[f"{name}, encoded rows"] = asdict(measured["program, encoded rows"])
        forms[f"{name}, feature rows"] = asdict(measured["program, feature rows"])
        forms["mtl_ranker, feature rows"] = asdict(measured["model, feature rows"])
    figures = {
        "items": request.height,
        "objectives": len(artifact.tasks),
        "features": len(artifact.columns),
        "trees": 0 if artifact.trees is None else sum(artifact.trees.trees),
        "forms": forms,
        "differences": differences,
    }
    print(tables(figures)["latency"])
    print(summary(figures))
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Median and 99th percentile of each form."""
    rows = [
        [*name.split(", "), f"{found['p50']:.2f}", f"{found['p99']:.2f}"]
        for name, found in sorted(figures["forms"].items(), key=lambda form: form[1]["p50"])
    ]
    return {"latency": markdown.table(HEADINGS, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """For the table of the scripts."""
    forms = figures["forms"]
    words = [
        f"{name} {found['p50']:.1f} ms (p99 {found['p99']:.1f})" for name, found in forms.items()
    ]
    return f"{figures['items']} items, {figures['trees']} trees: {'; '.join(words)}"


if __name__ == "__main__":
    main()
