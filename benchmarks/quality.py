"""The default ranker against what a practitioner would use instead, on real logs.

One run, the same rows, features and tuning budget: base rate, item popularity, logistic regression
(scikit-learn), LightGBM per objective, pointwise and with its objectives that rank within lists
(lambdarank, rank_xendcg), and our rankers: the preset as shipped, and tuned. GAUC and NDCG are by
list (`log.list`). Training days, then one validation day (early stopping, tuning, calibration),
then the test days, which are read once. `refit` models were trained again on the validation day
too, of mtl_ranker and LightGBM alike.

Intervals and paired differences cover users of the test days and seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from mtl_ranker.config import Project, parse_project, read_project_text
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, Judged, Quality, judge, model_quality
from mtl_ranker.evaluation.intervals import compare as difference
from mtl_ranker.evaluation.metrics import count_lists, evaluate_all
from mtl_ranker.models.embedding import PiecewiseLinear
from mtl_ranker.models.presets import make
from mtl_ranker.nightly import tuning
from mtl_ranker.nightly.contenders import Contender, refit, train_model, with_trees
from mtl_ranker.nightly.results import baselines
from mtl_ranker.studies.lightgbm_baseline import RANKING, Boosting, tune_lightgbm
from mtl_ranker.studies.search import Budget, Space, Uniform
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.training.distillation import fit_teacher

Tick = Callable[[str], None]

FOURTH = """
[[objectives]]
name = "{name}"
group = "satisfaction"
label = "{name}"

[features]
"""
SHOWN = ("gauc", "ndcg_10", "auc", "log_loss", "ece")
HEADINGS = ("GAUC", "NDCG@10", "AUC", "log loss", "ECE")
COMPARED = {"gauc": "GAUC", "auc": "AUC"}  # measure → its name in tables
DISTILLED = ", distilled"  # in the name of a network that learns from trees
OF_PROBABILITIES = ("log_loss", "ece")
CONSOLE = Console(width=230)


@dataclass(frozen=True)
class Predictions:
    """What a model predicts for the test rows: [N, T] for each seed.

    Attributes:
        fixed: the model has no seed.
        scores: the predictions are no probabilities.
    """

    name: str
    by_seed: list[np.ndarray]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    fixed: bool = False
    scores: bool = False


def project_of(test_days: int, train_days: int, fourth: str | None) -> Project:
    """The shipped preset with these days, and one of its signals as a fourth objective."""
    text, name = read_project_text("kuairand")
    if fourth is not None:
        text = text.replace(f'\nsignals.{fourth} = "{fourth}"', "")
        text = text.replace("\n[features]\n", FOURTH.format(name=fourth), 1)
    project = parse_project(text, name)
    split = project.split.model_copy(update={"test_days": test_days, "train_days": train_days})
    return project.model_copy(update={"split": split})


def logistic(parts: Dataset, trials: int, tick: Tick) -> Predictions:
    """L2-regularised logistic regression on one-hot categories and piecewise-linear numbers."""
    began = time.perf_counter()
    encoder = parts.encoder
    one_hot = OneHotEncoder(handle_unknown="ignore").fit(parts.examples["train"].categorical)
    code = PiecewiseLinear(encoder.edges, encoder.missing)

    def inputs(rows: Examples) -> csr_matrix:
        numbers = code(rows.numeric).numpy()
        return hstack([one_hot.transform(rows.categorical.numpy()), csr_matrix(numbers)]).tocsr()

    x = {part: inputs(rows) for part, rows in parts.examples.items()}
    found, settings = np.zeros(parts.examples["test"].labels.shape, np.float32), {}
    for t, task in enumerate(parts.tasks):
        label = {part: rows.labels[:, t].numpy() for part, rows in parts.examples.items()}
        best: tuple[float, float, Any] | None = None
        for strength in np.geomspace(1e-4, 1.0, max(2, trials)):
            model = LogisticRegression(C=strength, solver="liblinear", tol=1e-3)
            model.fit(x["train"], label["train"])
            p = model.predict_proba(x["validate"])[:, 1]
            loss = float(-np.mean(np.where(label["validate"] > 0.5, np.log(p), np.log1p(-p))))
            if best is None or loss < best[0]:
                best = (loss, float(strength), model)
            tick(f"logistic regression, {task.name}")
        assert best is not None
        found[:, t], settings[task.name] = best[2].predict_proba(x["test"])[:, 1], best[1]
    return Predictions("logistic regression", [found], time.perf_counter() - began, settings, True)


LIGHTGBM = Boosting(
    Space(
        {
            "learning_rate": Uniform(0.02, 0.2, log=True),
            "num_leaves": Uniform(7, 127, log=True),
            "min_data_in_leaf": Uniform(10, 500, log=True),
            "feature_fraction": Uniform(0.2, 1.0),
            "bagging_fraction": Uniform(0.5, 1.0),
            "lambda_l2": Uniform(1e-2, 100.0, log=True),
            "categorical": ("ordinal", "categorical"),
        },
        first={
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 50,
            "feature_fraction": 0.5,
            "bagging_fraction": 0.8,
            "lambda_l2": 5.0,
            "categorical": "ordinal",
        },
    ),
    patience=60,
    refit=True,
)


def trees(
    parts: Dataset, budget: Budget, tick: Tick, objectives: Sequence[str] = ("binary", *RANKING)
) -> list[Predictions]:
    """LightGBM per objective with early stopping, and trained again on both parts.

    Args:
        objectives: pointwise, and those that rank within lists.
    """
    models = []
    for objective in objectives:
        boosting = replace(LIGHTGBM, objective=objective)
        found = tune_lightgbm(parts.tasks, parts.examples, boosting, budget, tick)
        name = f"LightGBM {objective}" if boosting.ranking else "LightGBM"
        for title, predictions, seconds in (
            (name, found.predictions, found.seconds),
            (f"{name}, refit", found.refit, found.seconds + found.refit_seconds),
        ):
            models.append(
                Predictions(title, predictions, seconds, found.settings, scores=boosting.ranking)
            )
    return models


def without_a_model(parts: Dataset) -> list[Predictions]:
    """The base rate and item popularity."""
    found = baselines(parts.tasks, parts.frames["train"], parts.held_out)
    return [Predictions(name, [p], 0.0, fixed=True) for name, p in found.items()]


def ranker(
    name: str, project: Project, parts: Dataset, seeds: Sequence[int], tick: Tick
) -> list[Predictions]:
    """The project's one model with every seed: the network, with trees, and both after their refit.

    Where the project has trees, the last one is what a night registers.
    """
    began = time.perf_counter()
    [(model, given)] = project.models.items()
    spec = make(model, given, len(parts.tasks), project.features.groups)
    found: dict[str, list[np.ndarray]] = {}
    for seed in seeds:
        run = train_model(project, parts, Contender(model, spec, seed))
        found.setdefault(name, []).append(run.test_prediction)
        tick(f"{name}, seed {seed}")
        joined = with_trees(project, parts, run) if project.training.trees else run
        again = refit(project, parts, joined)
        if project.training.trees:
            network = replace(again.artifact, trees=None, calibration=run.artifact.calibration)
            alone = network.predict(parts.held_out.frame).select(t.name for t in parts.tasks)
            found.setdefault(f"{name}, refit", []).append(alone.to_numpy())
            found.setdefault(f"{name}, trees", []).append(joined.test_prediction)
        last = f"{name}, trees, refit" if project.training.trees else f"{name}, refit"
        found.setdefault(last, []).append(again.test_prediction)
        tick(f"{name}, seed {seed}, refit")
    seconds = time.perf_counter() - began
    settings = {"model": dict(given), "training": project.training.model_dump()}
    return [Predictions(n, by_seed, seconds, settings) for n, by_seed in found.items()]


def distilled(parts: Dataset, share: float) -> Dataset:
    """The same rows for a network alone that learns from trees (`training.distill`)."""
    project = parts.reading.project
    training = project.training.model_copy(update={"distill": share, "trees": 0})
    project = project.model_copy(update={"training": training})
    rows, frame = parts.examples["train"], parts.frames["train"]
    return replace(
        parts,
        reading=replace(parts.reading, project=project),
        teacher=fit_teacher(parts.tasks, rows, frame, share),
    )


def tuned(project: Project, parts: Dataset, trials: int, tick: Tick) -> Project:
    """The project with the best settings of a search for its one model."""
    [model] = project.models
    found = tuning.tune(
        project,
        parts,
        tuning.Study(model),
        tuning.Budget(trials),
        tuning.Callbacks(on_trial=lambda trial: tick(f"tuning {model}")),
    )
    training = project.training.model_copy(update=found.training)
    return project.model_copy(update={"models": {model: found.model}, "training": training})


@dataclass(frozen=True)
class Compared:
    """A model's mean metrics and its differences from a reference, by objective.

    Attributes:
        intervals, gains: objective → measure of `COMPARED` → the model's, and its difference.
    """

    metrics: dict[str, dict[str, float]]
    intervals: dict[str, dict[str, Interval]]
    gains: dict[str, dict[str, Judged]]


def compare(parts: Dataset, models: Sequence[Predictions], reference: str) -> dict[str, Compared]:
    """Means over seeds, intervals and paired differences from the reference."""
    lists, labels = parts.held_out.lists, parts.held_out.labels
    clusters = Clusters.of(parts.held_out.user, lists)
    rows = [LabelledRows.of("binary", column, clusters) for column in labels.T]
    qualities: dict[tuple[str, str, str], Quality] = {
        (model.name, task.name, measure): model_quality(
            rows[t], [p[:, t] for p in model.by_seed], measure, model.fixed
        )
        for model in models
        for t, task in enumerate(parts.tasks)
        for measure in COMPARED
    }
    gains = judge(
        {key: difference(q, qualities[reference, *key[1:]]) for key, q in qualities.items()}
    )
    found = {}
    for model in models:
        metrics = [evaluate_all(parts.tasks, labels, p, lists) for p in model.by_seed]
        names = [task.name for task in parts.tasks]
        means = {n: {k: float(np.mean([m[n][k] for m in metrics])) for k in SHOWN} for n in names}
        if model.scores:
            for each in means.values():
                each.update(dict.fromkeys(OF_PROBABILITIES, float("nan")))
        found[model.name] = Compared(
            means,
            {n: {k: qualities[model.name, n, k].interval() for k in COMPARED} for n in names},
            {n: {k: gains[model.name, n, k] for k in COMPARED} for n in names},
        )
    return found


def show(
    parts: Dataset, found: dict[str, Compared], reference: str, seconds: dict[str, float]
) -> None:
    for task in parts.tasks:
        label = parts.held_out.labels[:, parts.tasks.index(task)]
        table = Table(
            title=f"{task.name}: {len(label):,} test rows, {int(np.nansum(label)):,} positive; "
            f"{count_lists(label, parts.held_out.lists)}",
            title_justify="left",
        )
        table.add_column("model", no_wrap=True)
        over = [f"{name} over {reference}" for name in COMPARED.values()]
        intervals = [f"{name} interval" for name in COMPARED.values()]
        for heading in (*HEADINGS, *intervals, *over):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, each in found.items():
            own = each.intervals[task.name]
            gains = [
                "" if name == reference else gain_text(each.gains[task.name][k]) for k in COMPARED
            ]
            table.add_row(
                name,
                *(number(each.metrics[task.name][k]) for k in SHOWN),
                *(interval_text(own[k].low, own[k].high) for k in COMPARED),
                *gains,
            )
        CONSOLE.print(table)
    CONSOLE.print("seconds  " + "; ".join(f"{n}: {s:,.0f}" for n, s in seconds.items()))


def number(value: float | None) -> str:
    """Of a table's cell; empty where the model has no such figure."""
    return "" if value is None or np.isnan(value) else f"{value:.4f}"


def interval_text(low: float | None, high: float | None) -> str:
    """The ends of an interval; empty without one."""
    return f"[{number(low)}, {number(high)}]" if number(low) else ""


def gain_text(gain: Judged) -> str:
    value, low, high, verdict = plain_gain(gain)
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]{'*' if verdict else ' '}"


def plain_gain(gain: Judged) -> tuple[float, float, float, int]:
    """The difference, the ends of its interval, and its verdict, as `markdown.gain` takes them."""
    found = gain.interval
    return found.value, found.low, found.high, gain.verdict


def plain(each: Compared) -> dict[str, Any]:
    """A model's metrics, intervals and differences by objective, as plain numbers."""
    return {
        objective: {
            **each.metrics[objective],
            "interval": {k: [own.low, own.high] for k, own in each.intervals[objective].items()},
            "gain": {k: plain_gain(gain) for k, gain in each.gains[objective].items()},
        }
        for objective in each.metrics
    }


def show_networks(
    parts: Dataset, trained: Sequence[Predictions], reference: str, title: str
) -> dict[str, Any]:
    """Print networks beside a reference, a table for each objective; return their figures.

    Args:
        trained: with `best_epochs` in their settings.
        title: of the column of names.
    """
    found = compare(parts, trained, reference)
    shown = ("gauc", "auc", "log_loss", "ece")
    for task in parts.tasks:
        over = [f"{measure} over {reference}" for measure in COMPARED.values()]
        table = Table(title, "GAUC", "AUC", "log loss", "ECE", *over, title=task.name)
        for name, each in found.items():
            gains = [gain_text(each.gains[task.name][k]) for k in COMPARED]
            table.add_row(name, *(number(each.metrics[task.name][k]) for k in shown), *gains)
        CONSOLE.print(table)
    CONSOLE.print("seconds  " + "; ".join(f"{p.name}: {p.seconds:,.0f}" for p in trained))
    epochs = [f"{p.name}: {p.settings['best_epochs']}" for p in trained]
    CONSOLE.print("best epochs  " + "; ".join(epochs))
    return {
        p.name: {"seconds": p.seconds, **p.settings, "objectives": plain(found[p.name])}
        for p in trained
    }


def verdict(found: dict[str, Compared], ours: str, reference: str) -> str:
    gains = [
        (f"{objective} {COMPARED[k]}", gain)
        for objective, each in found[ours].gains.items()
        for k, gain in each.items()
    ]
    values = {name: gain.interval.value for name, gain in gains}
    ahead = sum(value > 0 for value in values.values())
    sure = sum(g.verdict > 0 for _, g in gains)
    behind = ", ".join(f"{n} {value:+.4f}" for n, value in values.items() if value <= 0) or "none"
    notes = ", ".join(dict.fromkeys(g.note for _, g in gains if g.note))
    return (
        f"{ours} against {reference}: ahead on {ahead} of {len(gains)} list GAUC and AUC figures, "
        f"{sure} significantly; behind on: {behind}"
        f"{f' ({notes})' if notes else ''}"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--trials", type=int, default=8, help="of tuning, each model")
    options.add_argument("--test-days", type=int, default=3)
    options.add_argument("--train-days", type=int, default=28, help="at most")
    options.add_argument("--model", default="mmoe", help="of the preset, the default ranker")
    options.add_argument(
        "--distill", type=float, default=0.5, help="training.distill of the distilled network"
    )
    options.add_argument("--no-tuned", action="store_true", help="only the preset as shipped")
    options.add_argument(
        "--fourth",
        default="is_comment",
        choices=["is_comment", "is_follow", "is_forward", "is_hate", "none"],
        help="a second satisfaction objective",
    )
    chosen: argparse.Namespace = results.parse(options)
    fourth = None if chosen.fourth == "none" else chosen.fourth
    project = project_of(chosen.test_days, chosen.train_days, fourth)
    if chosen.model not in project.models:
        raise SystemExit(f"--model {chosen.model}: allowed: {', '.join(project.models)}")
    alone = {chosen.model: project.models[chosen.model]}
    project = project.model_copy(update={"models": alone})
    parts = examples_of(project, chosen.data)
    days = parts.days
    CONSOLE.print(
        f"train {days.train[0]}..{days.train[-1]}: {parts.frames['train'].height:,} rows, "
        f"{len(parts.encoder.columns)} features; validate {days.validate[0]}; "
        f"test {days.test[0]}..{days.test[-1]}; {chosen.trials} trials, {chosen.seeds} seeds, "
        f"{torch.get_num_threads()} threads"
    )
    budget, tasks = Budget(chosen.trials, range(chosen.seeds)), len(parts.tasks)
    with Progress(console=CONSOLE) as progress:
        trees_total = (1 + len(RANKING)) * tasks * (chosen.trials + chosen.seeds)
        ours_total = 4 * chosen.seeds + (0 if chosen.no_tuned else chosen.trials + 2 * chosen.seeds)
        total = tasks * max(2, chosen.trials) + trees_total + ours_total
        bar = progress.add_task("training", total=total)

        def tick(words: str) -> None:
            progress.update(bar, advance=1, description=words)

        name = f"mtl_ranker ({chosen.model})"
        mine = ranker(name, project, parts, budget.seeds, tick)
        taught = distilled(parts, chosen.distill)
        mine += ranker(f"{name}{DISTILLED}", taught.reading.project, taught, budget.seeds, tick)
        if not chosen.no_tuned:
            better = tuned(project, parts, chosen.trials, tick)
            mine += ranker("mtl_ranker, tuned", better, parts, budget.seeds, tick)
        models = [*without_a_model(parts), logistic(parts, chosen.trials, tick)]
        models += [*trees(parts, budget, tick), *mine]
    found = compare(parts, models, "LightGBM")
    again = compare(parts, models, "LightGBM, refit")
    show(parts, found, "LightGBM", {c.name: c.seconds for c in models})
    ours = [c.name for c in mine]
    lines = [verdict(found, name, "LightGBM") for name in ours]
    lines += [verdict(again, name, "LightGBM, refit") for name in ours if name.endswith("refit")]
    for line in lines:
        CONSOLE.print(line)

    figures = {
        "train_rows": parts.frames["train"].height,
        "test_rows": len(parts.held_out.user),
        "train_days": [str(d) for d in days.train],
        "test_days": [str(d) for d in days.test],
        "lists": {
            task.name: asdict(count_lists(parts.held_out.labels[:, t], parts.held_out.lists))
            for t, task in enumerate(parts.tasks)
        },
        "models": {name: plain(each) for name, each in found.items()},
        "over_lightgbm_refit": {name: plain(again[name]) for name in ours},
        "settings": {c.name: c.settings for c in models},
        "seconds": {c.name: c.seconds for c in models},
        "verdicts": lines,
    }
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """A table of all models for each objective, and mtl_ranker against LightGBM after its refit."""
    over = [f"{name} over LightGBM" for name in COMPARED.values()]
    headings = ["model", *HEADINGS, "GAUC interval", *over]
    last = registered(figures)
    found = {}
    for objective in figures["models"]["LightGBM"]:
        rows = []
        for name, each in figures["models"].items():
            own = each[objective]
            gains = ["" if name == "LightGBM" else markdown.gain(*own["gain"][k]) for k in COMPARED]
            title = f"**{name}**" if name == last else name
            interval = interval_text(*own["interval"]["gauc"])
            rows.append([title, *(number(own[k]) for k in SHOWN), interval, *gains])
        found[f"quality {objective}"] = markdown.table(headings, rows)
    rows = [
        [objective, *(markdown.gain(*own["gain"][k]) for k in COMPARED)]
        for objective, own in figures["over_lightgbm_refit"][last].items()
    ]
    found["quality over LightGBM refit"] = markdown.table(["objective", *COMPARED.values()], rows)
    return found


def registered(figures: Mapping[str, Any]) -> str:
    """The model that a night would register: the preset's, after its refit, with its trees."""
    return [
        name
        for name in figures["models"]
        if name.startswith("mtl_ranker (") and name.endswith(", refit") and DISTILLED not in name
    ][-1]


def summary(figures: Mapping[str, Any]) -> str:
    last = registered(figures)
    return "; ".join(line for line in figures["verdicts"] if line.startswith(f"{last} against"))


if __name__ == "__main__":
    main()
