"""Nights that continue from the champion beside nights that train from scratch.

A simulated feed with drifting tastes and new items every day, and with `--data` KuaiRand-Pure. All
arms have the same first night, a full training, and replay the same nights after it: a night trains
on the split that ends with its day, its refit model ranks the next day, and the next night
continues from it (every model becomes champion, so that an arm is a chain of trainings). Qualities
are those of all next days together, against training from scratch on the same rows, with intervals
over users and, with two seeds or more, over chains.
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
import torch

from benchmarks import markdown, results
from mtl_ranker.config import Project, Training, load_project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import compare, model_quality
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import last_final_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import refit
from mtl_ranker.nightly.plan import (
    FROM_SCRATCH,
    Origin,
    PastNight,
    TrainingPlan,
    plan_training,
)
from mtl_ranker.nightly.results import ModelRun
from mtl_ranker.nightly.suite import train_all
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.specs import LINEAR
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
class Trained:
    """A night's refit model, and seconds: of the trainings, and with reading and encoding."""

    run: ModelRun
    training: float
    night: float


def train_night(context: Context, plan: TrainingPlan, night: date) -> Trained:
    """Train the model of a night and refit it, without the comparison of models."""
    project, began = context.project, time.perf_counter()
    continuing = None if plan.start is None else plan.start.continuing
    dataset = load_dataset(context, night, continuing=continuing)
    alone = replace(plan, left_out={LINEAR: "not measured", **plan.left_out})
    (run,) = train_all(project, dataset, plan=alone)
    again = refit(project, dataset, run)
    seconds = time.perf_counter() - began
    return Trained(again, run.trained.seconds + again.trained.seconds, seconds)


@dataclass(frozen=True)
class Replay:
    """What an arm did after the first night.

    Attributes:
        predictions: [N, T] of the rows of all next days.
        training, night: medians over nights, in seconds (see `Trained`).
    """

    predictions: np.ndarray
    training: float
    night: float
    continued: int


def replay(context: Context, nights: list[date], first: Trained) -> Replay:
    """Train the nights after the first one, and rank the day after each with its model."""
    champion = Origin(str(nights[0]), False, first.run.artifact.start)
    history = [PastNight(last_final_day(context.project, nights[0]), True, {})]
    names = [objective.name for objective in context.project.objectives]
    predictions, done, continued = [], [], 0
    for night in nights[1:]:
        plan = plan_training(context, night, champion, history)
        done.append(train_night(context, plan, night))
        artifact = done[-1].run.artifact
        champion = Origin(str(night), False, artifact.start)
        history.append(PastNight(last_final_day(context.project, night), plan.start is None, {}))
        continued += plan.start is not None
        rows = context.workspace.scan("examples", [night + timedelta(days=1)]).collect()
        predictions.append(artifact.predict(rows).select(names).to_numpy())
    return Replay(
        np.concatenate(predictions),
        float(np.median([each.training for each in done])),
        float(np.median([each.night for each in done])),
        continued,
    )


@dataclass(frozen=True)
class Arms:
    """The arms to compare: by name, each with these seeds; a chain of trainings has one seed."""

    names: list[str]
    seeds: int


def with_training(context: Context, changes: Mapping[str, Any]) -> Context:
    """The context with other settings of `[training]`."""
    project = context.project
    training = project.training.model_copy(update=dict(changes))
    return replace(context, project=project.model_copy(update={"training": training}))


def simulated_project(epochs: int) -> Project:
    """The simulated preset with one model, as a continued night trains one."""
    preset = load_project("simulated")
    training = Training(epochs=epochs, spread_seeds=0, threads=torch.get_num_threads())
    return preset.model_copy(update={"models": {"mmoe": {"preset": "mmoe"}}, "training": training})


def real_project() -> Project:
    """The network alone of KuaiRand's preset, with three training days, so that nights remain."""
    preset = load_project("kuairand")
    changes = {"trees": 0, "spread_seeds": 0, "threads": torch.get_num_threads()}
    split = preset.split.model_copy(update={"train_days": 3, "validate_days": 1, "test_days": 1})
    return preset.model_copy(
        update={
            "models": {"mmoe": preset.models["mmoe"]},
            "training": preset.training.model_copy(update=changes),
            "split": split,
        }
    )


def measure(project: Project, data: Path, arms: Arms) -> dict[str, Any]:
    """Every arm on the same nights."""
    workspace = Workspace(Path(mkdtemp(prefix="incremental-")) / "ws")
    context = Context(project, open_source(project, data), workspace)
    days = context.source.days()
    split = project.split
    first = split.warmup_days + split.train_days + split.validate_days + split.test_days - 1
    nights = days[first:-1]
    for night in nights:
        build_split(context, night)
    ingest_day(context, days[-1])
    aggregate_day(context, days[-1])
    build_examples(context, days[-1])
    frame = context.workspace.scan("examples", days[first + 2 :]).collect()
    tasks = [objective.name for objective in project.objectives]
    labels = label_matrix(frame, [LABEL + name for name in tasks])
    clusters = Clusters.of(frame["user_id"].to_numpy())
    replays: dict[str, list[Replay]] = {name: [] for name in arms.names}
    for seed in range(arms.seeds):
        of_seed = with_training(context, {"seeds": [seed]})
        first_night = with_training(of_seed, {"start": "champion"})
        started = train_night(first_night, FROM_SCRATCH, nights[0])
        for name in arms.names:
            done = replay(with_training(of_seed, ARMS[name]), nights, started)
            replays[name].append(done)
            print(f"seed {seed}, {name}: {done.training:.2f} s a training", flush=True)
    found: dict[str, Any] = {}
    for name, chains in replays.items():
        quality = {}
        for t, objective in enumerate(project.objectives):
            rows = LabelledRows.of(objective.kind, labels[:, t], clusters)
            own_quality, reference = (
                model_quality(rows, [each.predictions[:, t] for each in of_arm])
                for of_arm in (chains, replays[SCRATCH])
            )
            interval = compare(own_quality, reference).interval(project.promotion.confidence)
            quality[objective.name] = {
                "quality": own_quality.value,
                "gain": interval.value,
                "low": interval.low,
                "high": interval.high,
            }
        found[name] = {
            "continued": chains[0].continued,
            "training_seconds": float(np.median([each.training for each in chains])),
            "night_seconds": float(np.median([each.night for each in chains])),
            "quality": quality,
        }
    return {
        "arms": found,
        "nights": len(nights) - 1,
        "seeds": arms.seeds,
        "rows": frame.height,
        "rows_a_day": frame.height / (len(nights) - 1),
    }


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The tables of docs/performance.md, one for each log."""
    return {
        "incremental" if log == "simulated" else f"incremental {log}": _table(figures[log]["arms"])
        for log in figures
    }


def _table(arms: Mapping[str, Any]) -> str:
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
    return markdown.table(["arm", *objectives, "training, s", "night, s"], rows)


def summary(figures: Mapping[str, Any]) -> str:
    """For the table of the scripts."""
    return "; ".join(f"{log}, {_summary(found)}" for log, found in figures.items())


def _summary(figures: Mapping[str, Any]) -> str:
    arms = figures["arms"]
    fastest = min(arms, key=lambda name: arms[name]["training_seconds"])
    ratio = arms[SCRATCH]["training_seconds"] / arms[fastest]["training_seconds"]
    worse = [
        f"{name} on {objective}"
        for name, arm in arms.items()
        for objective, q in arm["quality"].items()
        if q["high"] < 0
    ]
    return (
        f"{figures['nights']} nights of {figures['rows_a_day']:,.0f} rows a day: {fastest} "
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
    options.add_argument("--seeds", type=int, default=1, help="chains of each arm")
    options.add_argument("--arms", nargs="+", help="these, and from scratch", choices=list(ARMS))
    options.add_argument("--data", type=Path, help="KuaiRand-Pure too: the folder")
    chosen = results.parse(options)
    names = [name for name in ARMS if name == SCRATCH or not chosen.arms or name in chosen.arms]
    arms = Arms(names, chosen.seeds)
    feed = Feed(impressions=chosen.rows * chosen.days, days=chosen.days, drift=chosen.drift)
    folder = simulate(feed, Path(mkdtemp(prefix="incremental-")))
    figures = {"simulated": measure(simulated_project(chosen.epochs), folder, arms)}
    if chosen.data:
        figures["KuaiRand"] = measure(real_project(), chosen.data, arms)
    for name, table in tables(figures).items():
        print(f"{name}\n{table}")
    print(summary(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
