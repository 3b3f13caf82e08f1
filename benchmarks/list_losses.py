"""Losses on the order of a list beside cross-entropy, by kind and weight, on KuaiRand.

The preset's network alone, without trees and refit, with one list loss for all of its objectives;
GAUC is by list. Differences are paired with the network without a list loss.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import date
from typing import Any

from rich.progress import track

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import COMPARED, CONSOLE, Predictions, show_networks
from mtl_ranker.config import Project, load_project
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.training.dataset import Dataset

PLAIN = "cross-entropy alone"
TRIED = {"pairs": (0.1, 1.0), "rcr": (0.3, 1.0), "jrc": (0.1, 0.5), "combined_pair": (0.1, 1.0)}


def with_list_loss(project: Project, name: str, weight: float) -> Project:
    """The project with this list loss on every binary objective."""
    changed = {"list_loss": name, "list_weight": weight}
    objectives = [
        o.model_copy(update=changed) if o.kind == "binary" else o for o in project.objectives
    ]
    return project.model_copy(update={"objectives": objectives})


def train(name: str, project: Project, parts: Dataset, seeds: int) -> Predictions:
    spec = make("mmoe", project.models["mmoe"], len(parts.tasks), project.features.groups)
    began = time.perf_counter()
    runs = [train_model(project, parts, Contender("mmoe", spec, seed)) for seed in range(seeds)]
    predictions = [run.test_prediction for run in runs]
    stopped = {"best_epochs": [run.trained.best_epoch for run in runs]}
    return Predictions(name, predictions, time.perf_counter() - began, stopped)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--test-days", type=int, default=2)
    options.add_argument("--date", type=date.fromisoformat, help="last test day; default the last")
    options.add_argument("--only", nargs="*", choices=list(TRIED), help="these losses")
    chosen = results.parse(options)
    project = load_project("kuairand")
    split = project.split.model_copy(update={"test_days": chosen.test_days, "train_days": 28})
    project = project.model_copy(update={"split": split})
    parts = examples_of(project, chosen.data, chosen.date)
    variants = {PLAIN: project} | {
        f"{name}, weight {weight:g}": with_list_loss(project, name, weight)
        for name in chosen.only or TRIED
        for weight in TRIED[name]
    }
    trained = [
        train(name, own, parts, chosen.seeds)
        for name, own in track(variants.items(), description="list losses", console=CONSOLE)
    ]
    figures = {
        "train_rows": parts.frames["train"].height,
        "days": {part: [str(d) for d in getattr(parts.days, part)] for part in parts.files},
        "seeds": chosen.seeds,
        "variants": show_networks(parts, trained, PLAIN, "list loss"),
    }
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """List GAUC / AUC without a list loss, and each loss's differences from them."""
    variants = figures["variants"]
    rows = []
    for name, each in variants.items():
        cells = [
            f"{own['gauc']:.4f} / {own['auc']:.4f}"
            if name == PLAIN
            else " / ".join(markdown.gain(*own["gain"][k]) for k in COMPARED)
            for own in each["objectives"].values()
        ]
        rows.append([name, *cells])
    objectives = variants[PLAIN]["objectives"]
    return {"list_losses": markdown.table(["list loss", *objectives], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """The losses that differ significantly from cross-entropy alone in any figure."""
    words = [
        f"{name} {value:+.4f} {COMPARED[k]} on {objective}"
        for name, each in figures["variants"].items()
        for objective, own in each["objectives"].items()
        for k, (value, _, _, verdict) in own["gain"].items()
        if verdict
    ]
    return f"over {PLAIN}, significant: {'; '.join(words) or 'none'}"


if __name__ == "__main__":
    main()
