"""Tuned settings beside the shipped preset's, on different last days of KuaiRand.

For each last day the preset's network is searched as `mtl-ranker tune` does, on the split that ends
there, and trained with the settings that the search returns. Both are compared on the test days,
which the search does not read. Where the search keeps the preset's settings there is nothing to
compare. The network alone, without trees and refit; GAUC is by list.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from typing import Any

from rich.progress import Progress

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import CONSOLE, Predictions, show_networks
from mtl_ranker.config import Project, load_project
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.nightly.tuning import Budget, Callbacks, Search, Study, tune
from mtl_ranker.training.dataset import Dataset

MODEL = "mmoe"
SHIPPED, TUNED = "preset", "tuned"


def searched(project: Project, parts: Dataset, budget: Budget) -> tuple[Search, float]:
    """The search's result, and its seconds."""
    began = time.perf_counter()
    with Progress(console=CONSOLE) as progress:
        bar = progress.add_task("trials", total=budget.trials)
        comparing = progress.add_task("comparing", total=budget.confirming)
        found = tune(
            project,
            parts,
            Study(MODEL),
            budget,
            Callbacks(
                on_trial=lambda trial: progress.advance(bar),
                on_training=lambda: progress.advance(comparing),
            ),
        )
    return found, time.perf_counter() - began


def trained(name: str, project: Project, parts: Dataset, seeds: int) -> Predictions:
    """Test predictions of the network with the project's settings."""
    spec = make(MODEL, project.models[MODEL], len(parts.tasks), project.features.groups)
    began = time.perf_counter()
    runs = [train_model(project, parts, Contender(MODEL, spec, seed)) for seed in range(seeds)]
    stopped = {"best_epochs": [run.trained.best_epoch for run in runs]}
    seconds = time.perf_counter() - began
    return Predictions(name, [run.test_prediction for run in runs], seconds, stopped)


def on_day(project: Project, parts: Dataset, budget: Budget, seeds: int) -> dict[str, Any]:
    """The search on one split, and the comparison on its test days."""
    search, seconds = searched(project, parts, budget)
    for each in search.confirmed:
        CONSOLE.print(str(each), highlight=False)
    days = parts.days
    CONSOLE.print(f"{days.validate[0]}: {search.trials} trials; {search.decision}")
    figures: dict[str, Any] = {
        "validate_day": str(days.validate[0]),
        "test_days": [str(day) for day in days.test],
        "trials": search.trials,
        "decision": search.decision,
        "chosen": search.chosen,
        "confirmed": [asdict(each) for each in search.confirmed],
        "seconds": seconds,
    }
    if search.chosen is not None:
        training = project.training.model_copy(update=search.training)
        other = {"models": {MODEL: search.model}, "training": training}
        models = [
            trained(SHIPPED, project, parts, seeds),
            trained(TUNED, project.model_copy(update=other), parts, seeds),
        ]
        figures["models"] = show_networks(parts, models, SHIPPED, "settings")
    return figures


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--dates", type=date.fromisoformat, nargs="+", required=True)
    options.add_argument("--trials", type=int, default=10)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--test-days", type=int, default=2)
    chosen = results.parse(options)
    project = load_project("kuairand")
    split = project.split.model_copy(update={"test_days": chosen.test_days})
    alone = {MODEL: project.models[MODEL]}
    project = project.model_copy(update={"split": split, "models": alone})
    budget = Budget(chosen.trials, seeds=chosen.seeds)
    figures = {
        "seeds": chosen.seeds,
        "days": {
            str(day): on_day(project, examples_of(project, chosen.data, day), budget, chosen.seeds)
            for day in chosen.dates
        },
    }
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """What the search chose for each last day, and its gain in AUC and list GAUC on test days."""
    rows = []
    for day, each in figures["days"].items():
        if "models" not in each:
            rows.append([day, "the preset's", "", "", ""])
            continue
        for objective, own in each["models"][TUNED]["objectives"].items():
            gains = [markdown.gain(*own["gain"][measure]) for measure in ("gauc", "auc")]
            rows.append([day, f"trial {each['chosen']}", objective, *gains])
    headings = ["last day", "settings", "objective", "GAUC over the preset", "AUC over the preset"]
    return {"tuning": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """On how many days the search changed the settings, and how often that was worse."""
    days = figures["days"].values()
    changed = [each["models"][TUNED]["objectives"] for each in days if "models" in each]
    verdicts = [
        own["gain"][measure][3]
        for objectives in changed
        for own in objectives.values()
        for measure in ("gauc", "auc")
    ]
    return (
        f"changed the preset on {len(changed)} of {len(days)} days; of {len(verdicts)} comparisons "
        f"{verdicts.count(-1)} significantly worse, {verdicts.count(1)} better"
    )


if __name__ == "__main__":
    main()
