"""Nights that continue from the champion beside nights that train from scratch.

A simulated feed with drifting tastes and new items every day. Each arm replays the same nights: a
night trains on the split that ends with its day, its winner ranks the next day, and the next night
may continue from it (every winner becomes champion, so that an arm is a chain of trainings).
Qualities are those of all next days together, against training from scratch on the same rows, with
intervals over users.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np

from benchmarks import markdown, results
from mtl_ranker.config import Project, Training, load_project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import compare, model_quality
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.plan import Champion, PastNight, plan_training
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.workspace import Workspace

SCRATCH = "scratch"
ARMS: dict[str, dict[str, Any]] = {
    SCRATCH: {},
    "replay 0": {"start": "champion", "replay": 0.0},
    "replay 0.25": {"start": "champion", "replay": 0.25},
    "replay 1": {"start": "champion", "replay": 1.0},
    "replay 0.25, optimiser dropped": {
        "start": "champion",
        "replay": 0.25,
        "keep_optimiser": False,
    },
    "replay 0.25, shrink 0.8, perturb 0.2": {
        "start": "champion",
        "replay": 0.25,
        "shrink": 0.8,
        "perturb": 0.2,
    },
}


@dataclass(frozen=True)
class Replay:
    """What an arm did.

    Attributes:
        predictions: [N, T] of the rows of all next days.
        training, night: seconds of each continued night, or of each night from scratch: of its
            trainings, and of reading, training and comparing together.
    """

    predictions: np.ndarray
    training: list[float]
    night: list[float]
    continued: int


def replay(context: Context, nights: list[date]) -> Replay:
    """Train the nights one after the other, and rank the day after each with its winner."""
    champion: Champion | None = None
    history: list[PastNight] = []
    predictions, training, seconds, continued = [], [], [], 0
    names = [objective.name for objective in context.project.objectives]
    incremental = context.project.training.start == "champion"
    for night in nights:
        plan = plan_training(context, night, champion, history)
        began = time.perf_counter()
        suite = train_suite(context, night, plan=plan)
        if (plan.start is not None) == incremental:
            seconds.append(time.perf_counter() - began)
            training.append(sum(run.trained.seconds for run in suite.runs))
            continued += incremental
        history.append(PastNight(night, plan.full, suite.behind))
        champion = Champion(str(night), False, suite.winner.artifact.start)
        following = [night + timedelta(days=1)]
        rows = context.workspace.scan("examples", following).collect()
        predictions.append(suite.winner.artifact.predict(rows).select(names).to_numpy())
    return Replay(np.concatenate(predictions), training, seconds, continued)


def project_of(epochs: int) -> Project:
    """The simulated preset with one model, as a continued night trains one."""
    preset = load_project("simulated")
    training = Training(epochs=epochs, spread_seeds=0)
    return preset.model_copy(update={"models": {"mmoe": {"preset": "mmoe"}}, "training": training})


def measure(feed: Feed, epochs: int) -> dict[str, Any]:
    """Every arm on the same nights."""
    folder = simulate(feed, Path(mkdtemp(prefix="incremental-")))
    project = project_of(epochs)
    context = Context(project, open_source(project, folder), Workspace(folder / "ws"))
    days = context.source.days()
    split = project.split
    first = split.warmup_days + split.train_days + split.validate_days + split.test_days - 1
    nights = days[first:-1]
    for night in nights:
        build_split(context, night)
    ingest_day(context, days[-1])
    aggregate_day(context, days[-1])
    build_examples(context, days[-1])
    frame = context.workspace.scan("examples", days[first + 1 :]).collect()
    tasks = [objective.name for objective in project.objectives]
    labels = label_matrix(frame, [LABEL + name for name in tasks])
    clusters = Clusters.of(frame["user_id"].to_numpy())
    found: dict[str, Any] = {}
    scratch: Replay | None = None
    for name, changes in ARMS.items():
        training = project.training.model_copy(update=changes)
        own = project.model_copy(update={"training": training})
        done = replay(replace(context, project=own), nights)
        scratch = scratch or done
        quality = {}
        for t, objective in enumerate(project.objectives):
            rows = LabelledRows.of(objective.kind, labels[:, t], clusters)
            own_quality, reference = (
                model_quality(rows, [each.predictions[:, t]]) for each in (done, scratch)
            )
            interval = compare(own_quality, reference).interval(project.promotion.confidence)
            quality[objective.name] = {
                "quality": own_quality.value,
                "gain": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
        found[name] = {
            "continued": done.continued,
            "training_seconds": float(np.median(done.training)),
            "night_seconds": float(np.median(done.night)),
            "quality": quality,
        }
        print(f"{name}: {found[name]}", flush=True)
    return {
        "arms": found,
        "nights": len(nights),
        "rows": frame.height,
        "rows_a_day": frame.height / len(nights),
        "drift": feed.drift,
    }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The table of docs/performance.md."""
    arms = figures["arms"]
    objectives = list(arms[SCRATCH]["quality"])
    rows = []
    for name, arm in arms.items():
        cells = []
        for objective in objectives:
            q = arm["quality"][objective]
            verdict = int(q["low"] > 0) - int(q["high"] < 0)
            difference = markdown.gain(q["gain"], q["low"], q["high"], verdict)
            cells.append(f"{q['quality']:.4f}" if name == SCRATCH else difference)
        seconds = [f"{arm[key]:.2f}" for key in ("training_seconds", "night_seconds")]
        rows.append([name, *cells, *seconds])
    return {"incremental": markdown.table(["arm", *objectives, "training, s", "night, s"], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """For the table of the scripts."""
    arms = figures["arms"]
    ratio = arms[SCRATCH]["training_seconds"] / arms["replay 0.25"]["training_seconds"]
    worse = [
        f"{name} on {objective}"
        for name, arm in arms.items()
        for objective, q in arm["quality"].items()
        if q["high"] < 0
    ]
    return (
        f"{figures['nights']} nights of {figures['rows_a_day']:,.0f} rows a day: replay 0.25 "
        f"trains {markdown.times(ratio)} times faster; significantly worse than scratch: "
        f"{', '.join(worse) or 'none'}"
    )


def main() -> None:
    """Print the table, and write the figures where the options say."""
    options = results.parser(__doc__)
    options.add_argument("--days", type=int, default=20, help="of the feed")
    options.add_argument("--rows", type=int, default=10_000, help="impressions a day")
    options.add_argument("--drift", type=float, default=0.1, help="see Feed")
    options.add_argument("--epochs", type=int, default=4, help="of a training from scratch")
    chosen = results.parse(options)
    size = Feed(impressions=chosen.rows * chosen.days, days=chosen.days, drift=chosen.drift)
    figures = measure(size, chosen.epochs)
    print(tables(figures)["incremental"])
    print(summary(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
