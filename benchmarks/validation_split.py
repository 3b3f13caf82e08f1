"""Validation on the last day beside validation on a share of the latest lists, on KuaiRand.

With the last day, the newest rows before the test days are not trained on until the refit. With a
random share of the lists of the latest days, most of them are, and the network may need no refit.
Both ways choose the epoch and fit the calibration on the rows that validate. The preset's network
alone, without trees; GAUC is by list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from typing import Any

import polars as pl
from rich.progress import track

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import CONSOLE, Predictions, show_networks
from mtl_ranker.config import Project, load_project
from mtl_ranker.errors import counted
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.lists import list_ids
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, refit, train_model
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.dataset import Dataset, fit_encoder
from mtl_ranker.workspace import fingerprint

LAST_DAY = "last day"


def by_lists(project: Project, parts: Dataset, days: int, share: float) -> Dataset:
    """The same rows with a random share of the latest days' lists as validation rows."""
    known = pl.concat([parts.frames["train"], parts.frames["validate"]], how="vertical_relaxed")
    latest = [*parts.days.train, *parts.days.validate][-days:]
    hashes = pl.Series(list_ids(known, parts.list_keys)).hash(1) / 2.0**64
    chosen = known["date"].is_in(latest) & (hashes < share)
    frames = {
        "train": known.filter(~chosen),
        "validate": known.filter(chosen),
        "test": parts.frames["test"],
    }
    encoder = fit_encoder(project, frames["train"], tables=parts.encoder.tables)
    labels = [LABEL + task.name for task in parts.tasks]
    examples = {
        part: encode_examples(encoder, frame, labels, parts.list_keys)
        for part, frame in frames.items()
    }
    digest = fingerprint(parts.digest, days, share)
    return replace(parts, encoder=encoder, frames=frames, examples=examples, digest=digest)


def train(name: str, project: Project, parts: Dataset, seeds: int) -> list[Predictions]:
    """Predictions without and with the refit."""
    spec = make("mmoe", project.models["mmoe"], len(parts.tasks), project.features.groups)
    began = time.perf_counter()
    runs = [train_model(project, parts, Contender("mmoe", spec, seed)) for seed in range(seeds)]
    trained = time.perf_counter() - began
    again = [refit(project, parts, run) for run in runs]
    both = time.perf_counter() - began
    stopped = {"best_epochs": [run.trained.best_epoch for run in runs]}
    return [
        Predictions(name, [run.test_prediction for run in runs], trained, stopped),
        Predictions(f"{name}, refit", [run.test_prediction for run in again], both, stopped),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--test-days", type=int, default=2)
    options.add_argument("--date", type=date.fromisoformat, help="last test day; default the last")
    chosen = results.parse(options)
    project = load_project("kuairand")
    split = project.split.model_copy(update={"test_days": chosen.test_days, "train_days": 28})
    project = project.model_copy(update={"split": split})
    parts = examples_of(project, chosen.data, chosen.date)
    ways = {LAST_DAY: parts} | {
        f"{share:.0%} of the lists of {counted(days, 'day')}": by_lists(project, parts, days, share)
        for days, share in ((1, 0.3), (2, 0.2), (3, 0.2))
    }
    trained = [
        predictions
        for name, rows in track(ways.items(), description="validation", console=CONSOLE)
        for predictions in train(name, project, rows, chosen.seeds)
    ]
    figures = {
        "days": {part: [str(d) for d in getattr(parts.days, part)] for part in parts.files},
        "seeds": chosen.seeds,
        "ways": show_networks(parts, trained, LAST_DAY, "validation"),
    }
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """List GAUC / AUC / ECE of each way, with significant differences of AUC in brackets."""
    rows = []
    for name, each in figures["ways"].items():
        cells = []
        for own in each["objectives"].values():
            value, _, _, verdict = own["gain"]["auc"]
            sure = f" ({value:+.4f})" if verdict else ""
            cells.append(f"{own['gauc']:.4f} / {own['auc']:.4f}{sure} / {own['ece']:.4f}")
        rows.append([name, *cells, f"{each['seconds']:.0f}"])
    objectives = next(iter(figures["ways"].values()))["objectives"]
    return {"validation_split": markdown.table(["validation", *objectives, "seconds"], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """AUC of each way's network over that of the last day, by objective."""
    words = [
        f"{name} "
        + " / ".join(f"{own['gain']['auc'][0]:+.4f}" for own in each["objectives"].values())
        for name, each in figures["ways"].items()
        if name != LAST_DAY
    ]
    return f"AUC over validation on the last day: {'; '.join(words)}"


if __name__ == "__main__":
    main()
