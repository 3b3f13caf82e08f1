"""The default ranker against what a practitioner would use instead, on real logs.

One run, the same rows, features and tuning budget: base rate, item popularity, logistic regression
(scikit-learn), LightGBM per objective, and our rankers: the preset as shipped, and tuned. Training
days, then one validation day (early stopping, tuning, calibration), then the test days, which are
read once. `refit` models were trained again on the validation day too, ours and LightGBM alike.

Intervals and differences: users of the test days drawn anew, and seeds, paired.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightgbm
import numpy as np
import optuna
import torch
from prepared import examples_of, parse, parser
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import OneHotEncoder

from mtl_ranker.config import Project, load_project, parse_project, read_project_text
from mtl_ranker.evaluation.intervals import (
    Interval,
    gauc_draws,
    interval,
    quality_draws,
    user_draws,
)
from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.evaluation.sharing import over_seeds
from mtl_ranker.models.embedding import PiecewiseLinear
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender
from mtl_ranker.nightly.results import baselines
from mtl_ranker.nightly.suite import refit, train_model, with_trees
from mtl_ranker.nightly.tuning import tune
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.workspace import write_json

FOURTH = """
[[objectives]]
name = "{name}"
group = "satisfaction"
label = "{name}"

[features]
"""
SHOWN = ("auc", "gauc", "ndcg_10", "log_loss", "ece")
CONSOLE = Console(width=150)


@dataclass
class Contender:
    """A model's predictions on the test rows, [N, T] for each seed."""

    name: str
    predictions: list[np.ndarray]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)


def project_of(test_days: int, train_days: int, fourth: str | None) -> Project:
    """The shipped preset with these days, and one of its signals as a fourth objective."""
    text, name = read_project_text("kuairand")
    if fourth is not None:
        text = text.replace(f'\n{fourth} = "{fourth}"', "")
        text = text.replace("\n[features]\n", FOURTH.format(name=fourth), 1)
    project = parse_project(text, name)
    split = project.split.model_copy(update={"test_days": test_days, "train_days": train_days})
    return project.model_copy(update={"split": split})


def logistic(parts: Dataset, trials: int, tick: Callable[[str], None]) -> Contender:
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
    return Contender("logistic regression", [found], time.perf_counter() - began, settings)


LIGHTGBM_START = {
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "lambda_l2": 5.0,
    "categorical": "ordinal",
}


def trees(
    parts: Dataset, trials: int, seeds: int, tick: Callable[[str], None]
) -> tuple[Contender, Contender]:
    """LightGBM per objective, tuned by validation AUC, early stopping; and refit on both parts."""
    began = time.perf_counter()
    columns = parts.examples["train"].categorical.shape[1]
    threads = torch.get_num_threads()
    x = {
        part: np.concatenate([rows.categorical.numpy(), rows.numeric.numpy()], 1)
        for part, rows in parts.examples.items()
    }
    shape = parts.examples["test"].labels.shape
    stopped = [np.zeros(shape, np.float32) for _ in range(seeds)]
    again = [np.zeros(shape, np.float32) for _ in range(seeds)]
    settings: dict[str, Any] = {}

    def dataset(t: int, chosen: Mapping[str, Any], *names: str) -> lightgbm.Dataset:
        treat = list(range(columns)) if chosen["categorical"] == "categorical" else "auto"
        return lightgbm.Dataset(
            np.concatenate([x[n] for n in names]),
            np.concatenate([parts.examples[n].labels[:, t].numpy() for n in names]),
            categorical_feature=treat,
            free_raw_data=False,
        )

    def fit(t: int, chosen: dict[str, Any], seed: int, rounds: int = 0) -> Any:
        common = {"objective": "binary", "metric": "auc", "verbosity": -1, "seed": seed}
        common |= {"num_threads": threads, "bagging_freq": 1, "deterministic": True}
        params = common | {k: v for k, v in chosen.items() if k != "categorical"}
        if rounds:
            both = dataset(t, chosen, "train", "validate")
            return lightgbm.train(params, both, num_boost_round=rounds)
        return lightgbm.train(
            params,
            dataset(t, chosen, "train"),
            num_boost_round=2_000,
            valid_sets=[dataset(t, chosen, "validate")],
            callbacks=[lightgbm.early_stopping(60, verbose=False)],
        )

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuned = 0.0
    for t, task in enumerate(parts.tasks):

        def objective(trial: optuna.Trial, t: int = t, name: str = task.name) -> float:
            found = fit(
                t,
                {
                    "learning_rate": trial.suggest_float("learning_rate", 0.02, 0.2, log=True),
                    "num_leaves": trial.suggest_int("num_leaves", 7, 127, log=True),
                    "min_data_in_leaf": trial.suggest_int("min_data_in_leaf", 10, 500, log=True),
                    "feature_fraction": trial.suggest_float("feature_fraction", 0.2, 1.0),
                    "bagging_fraction": trial.suggest_float("bagging_fraction", 0.5, 1.0),
                    "lambda_l2": trial.suggest_float("lambda_l2", 1e-2, 100.0, log=True),
                    "categorical": trial.suggest_categorical(
                        "categorical", ["ordinal", "categorical"]
                    ),
                },
                1_000,
            )
            tick(f"LightGBM, {name}")
            return float(found.best_score["valid_0"]["auc"])

        search = optuna.create_study(
            direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=4)
        )
        search.enqueue_trial(LIGHTGBM_START)
        search.optimize(objective, n_trials=trials)
        settings[task.name] = search.best_params
        for seed in range(seeds):
            found = fit(t, search.best_params, seed)
            stopped[seed][:, t] = found.predict(x["test"])
            tuned = time.perf_counter() - began
            whole = fit(t, search.best_params, seed, max(found.best_iteration, 1))
            again[seed][:, t] = whole.predict(x["test"])
            tick(f"LightGBM, {task.name}, seed {seed}")
    spent = time.perf_counter() - began
    return (
        Contender("LightGBM", stopped, tuned, settings),
        Contender("LightGBM, refit", again, spent, settings),
    )


def ranker(
    name: str,
    project: Project,
    parts: Dataset,
    model: str,
    seeds: int,
    tick: Callable[[str], None],
) -> list[Contender]:
    """One of our models with every seed: the network, with trees, and both after their refit.

    Where the project has trees, the last one is what a night registers.
    """
    began = time.perf_counter()
    spec = make(model, project.models[model], len(parts.tasks), project.features.groups)
    found: dict[str, list[np.ndarray]] = {}
    for seed in range(seeds):
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
    settings = {"model": dict(project.models[model]), "training": project.training.model_dump()}
    return [Contender(n, predictions, seconds, settings) for n, predictions in found.items()]


def tuned_ranker(
    project: Project, parts: Dataset, model: str, trials: int, tick: Callable[[str], None]
) -> Project:
    found = tune(
        project, parts, model, trials, on_trial=lambda trial: tick(f"tuning {model}"), seed=0
    )
    training = project.training.model_copy(update=found.training)
    return project.model_copy(update={"models": {model: found.model}, "training": training})


@dataclass(frozen=True)
class Compared:
    """A contender's mean metrics and its differences from a reference, by objective."""

    metrics: dict[str, dict[str, float]]
    auc: dict[str, Interval]
    gains: dict[str, dict[str, Interval]]  # objective → auc, gauc → difference


def compare(
    parts: Dataset, contenders: list[Contender], reference: str, resamples: int
) -> dict[str, Compared]:
    """Means over seeds, intervals and paired differences from the reference."""
    user, labels = parts.held_out.user, parts.held_out.labels
    weights = user_draws(user, resamples)
    draws: dict[tuple[str, str, str], np.ndarray] = {}
    means: dict[str, dict[str, dict[str, float]]] = {}
    for each in contenders:
        metrics = [evaluate_all(parts.tasks, labels, p, user) for p in each.predictions]
        means[each.name] = {
            task.name: {k: float(np.mean([m[task.name][k] for m in metrics])) for k in SHOWN}
            for task in parts.tasks
        }
        for t, task in enumerate(parts.tasks):
            y = labels[:, t].astype(np.float64)
            auc = [quality_draws("binary", y, p[:, t], weights) for p in each.predictions]
            within = [gauc_draws(y, p[:, t], user, weights) for p in each.predictions]
            draws[each.name, task.name, "auc"] = over_seeds(np.stack(auc))
            draws[each.name, task.name, "gauc"] = over_seeds(np.stack(within))
    found = {}
    for each in contenders:
        auc, gains = {}, {}
        for task in parts.tasks:
            mine, base = means[each.name][task.name], means[reference][task.name]
            auc[task.name] = interval(mine["auc"], draws[each.name, task.name, "auc"])
            gains[task.name] = {
                k: interval(
                    mine[k] - base[k],
                    draws[each.name, task.name, k] - draws[reference, task.name, k],
                )
                for k in ("auc", "gauc")
            }
        found[each.name] = Compared(means[each.name], auc, gains)
    return found


def show(parts: Dataset, found: dict[str, Compared], reference: str, seconds: dict[str, float]):
    for task in parts.tasks:
        positives = int(np.nansum(parts.held_out.labels[:, parts.tasks.index(task)]))
        table = Table(
            title=f"{task.name}: {len(parts.held_out.user):,} test rows, {positives:,} positive",
            title_justify="left",
        )
        table.add_column("model", no_wrap=True)
        for heading in ("AUC", "GAUC", "NDCG@10", "log loss", "ECE"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in (f"AUC over {reference}", f"GAUC over {reference}"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, each in found.items():
            values = [f"{each.metrics[task.name][k]:.4f}" for k in SHOWN]
            gains = [
                "" if name == reference else gain_text(each.gains[task.name][k])
                for k in ("auc", "gauc")
            ]
            table.add_row(name, *values, *gains)
        CONSOLE.print(table)
    CONSOLE.print("seconds  " + "; ".join(f"{n}: {s:,.0f}" for n, s in seconds.items()))


def gain_text(gain: Interval) -> str:
    star = "*" if gain.low > 0 or gain.high < 0 else " "
    return f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]{star}"


def verdict(found: dict[str, Compared], ours: str, reference: str) -> str:
    gains = [
        (f"{objective} {k.upper()}", gain)
        for objective, each in found[ours].gains.items()
        for k, gain in each.items()
    ]
    ahead = sum(g.value > 0 for _, g in gains)
    sure = sum(g.low > 0 for _, g in gains)
    behind = ", ".join(f"{name} {g.value:+.4f}" for name, g in gains if g.value <= 0) or "none"
    return (
        f"{ours} against {reference}: ahead on {ahead} of {len(gains)} AUC and GAUC figures, "
        f"{sure} beyond doubt; behind on: {behind}"
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--trials", type=int, default=8, help="of tuning, each model")
    options.add_argument("--test-days", type=int, default=3)
    options.add_argument("--train-days", type=int, default=28, help="at most")
    options.add_argument("--model", default="mmoe", help="of the preset, the default ranker")
    options.add_argument("--resamples", type=int, default=300)
    options.add_argument("--no-tuned", action="store_true", help="only the preset as shipped")
    options.add_argument(
        "--fourth",
        default="is_comment",
        choices=["is_comment", "is_follow", "is_forward", "is_hate", "none"],
        help="a second satisfaction objective",
    )
    chosen: argparse.Namespace = parse(options)
    fourth = None if chosen.fourth == "none" else chosen.fourth
    project = project_of(chosen.test_days, chosen.train_days, fourth)
    if chosen.model not in load_project("kuairand").models:
        raise SystemExit(f"--model {chosen.model}: allowed: {', '.join(project.models)}")
    parts = examples_of(project, chosen.data)
    days = parts.days
    CONSOLE.print(
        f"train {days.train[0]}..{days.train[-1]}: {parts.frames['train'].height:,} rows, "
        f"{len(parts.encoder.columns)} features; validate {days.validate[0]}; "
        f"test {days.test[0]}..{days.test[-1]}; {chosen.trials} trials, {chosen.seeds} seeds, "
        f"{torch.get_num_threads()} threads"
    )
    tasks = len(parts.tasks)
    with Progress(console=CONSOLE) as progress:
        trees_total = tasks * (chosen.trials + chosen.seeds)
        ours_total = 2 * chosen.seeds + (0 if chosen.no_tuned else chosen.trials + 2 * chosen.seeds)
        total = tasks * max(2, chosen.trials) + trees_total + ours_total
        bar = progress.add_task("training", total=total)

        def tick(words: str) -> None:
            progress.update(bar, advance=1, description=words)

        mine = ranker(f"ours ({chosen.model})", project, parts, chosen.model, chosen.seeds, tick)
        if not chosen.no_tuned:
            better = tuned_ranker(project, parts, chosen.model, chosen.trials, tick)
            mine += ranker("ours, tuned", better, parts, chosen.model, chosen.seeds, tick)
        contenders = [*trees(parts, chosen.trials, chosen.seeds, tick), *mine]
        contenders.insert(0, logistic(parts, chosen.trials, tick))
    constant = baselines(parts.tasks, parts.frames["train"], parts.held_out)
    found = compare(parts, contenders, "LightGBM", chosen.resamples)
    again = compare(parts, contenders, "LightGBM, refit", chosen.resamples)
    trivial = {
        name: {objective: {k: values[k] for k in SHOWN} for objective, values in each.items()}
        for name, each in constant.items()
    }
    for name, each in trivial.items():
        line = "; ".join(f"{o} AUC {v['auc']:.4f}, GAUC {v['gauc']:.4f}" for o, v in each.items())
        CONSOLE.print(f"{name}: {line}")
    show(parts, found, "LightGBM", {c.name: c.seconds for c in contenders})
    ours = [c.name for c in mine]
    lines = [verdict(found, name, "LightGBM") for name in ours]
    lines += [verdict(again, name, "LightGBM, refit") for name in ours if name.endswith("refit")]
    for line in lines:
        CONSOLE.print(line)

    def plain(each: Compared) -> dict[str, Any]:
        return {
            objective: {
                **each.metrics[objective],
                "auc_interval": [each.auc[objective].low, each.auc[objective].high],
                "gain": {
                    k: [gain.value, gain.low, gain.high]
                    for k, gain in each.gains[objective].items()
                },
            }
            for objective in each.metrics
        }

    figures = {
        "train_days": [str(d) for d in days.train],
        "test_days": [str(d) for d in days.test],
        "trivial": trivial,
        "models": {name: plain(each) for name, each in found.items()},
        "over_lightgbm_refit": {name: plain(again[name]) for name in ours},
        "settings": {c.name: c.settings for c in contenders},
        "seconds": {c.name: c.seconds for c in contenders},
        "verdicts": lines,
    }
    write_json(chosen.json, json.loads(json.dumps(figures, default=str)))


if __name__ == "__main__":
    main()
