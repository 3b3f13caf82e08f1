"""`mtl-ranker study …`: run a study, print its tables, log it to MLflow, write its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.sharing import SharingGain
from mtl_ranker.studies.census import MODELS as CENSUS_MODELS
from mtl_ranker.studies.census import (
    PAPER_CORRELATION,
    Candidate,
    Row,
    Split,
    Tuned,
    averaged,
    compare,
    equal_size,
    read_split,
    tune_ranker,
    tune_trees,
    with_trees,
)
from mtl_ranker.studies.search import Budget
from mtl_ranker.studies.synthetic import MODELS, Found, Starts, run_starts
from mtl_ranker.studies.trainability import (
    BAD,
    contrasts,
    distributions,
    mean_loss,
    spreads,
)
from mtl_ranker.tracking import connection, runs
from mtl_ranker.workspace import Workspace, write_json

PAPER = {"starts": 200, "steps": 10_000}

SHORT = {
    "synthetic": {"starts": 40, "steps": 1_500},
    "trainability": {"starts": 100, "steps": 1_500},
}

CORRELATIONS = {
    "synthetic": [0.0, 0.25, 0.5, 0.75, 0.9, 1.0],
    "trainability": [0.5, 0.9, 1.0],
}


def random_starts(
    name: str,
    workspace: Workspace,
    full: bool = False,
    starts: int | None = None,
    steps: int | None = None,
    learning_rate: float = 3e-3,
    write: Path | None = None,
) -> Found:
    """The study `synthetic` or `trainability`, at the paper's size with `full`."""
    size = PAPER if full else SHORT[name]
    count, length = starts or size["starts"], steps or size["steps"]
    correlations = CORRELATIONS[name]
    console = Console(width=130)
    cut = [
        f"{have:,} {what} instead of {PAPER[what]:,}"
        for what, have in (("starts", count), ("steps", length))
        if have < PAPER[what]
    ]
    if cut:
        console.print(f"cut for time: {'; '.join(cut)} (--full runs all)")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = len(correlations) * len(MODELS) * count * length
        bar = progress.add_task("training", total=total)

        def tell(what: str, done: int) -> None:
            progress.update(bar, advance=done, description=what)

        setup = Starts(count, length, learning_rate=learning_rate)
        found = run_starts(correlations, setup, on_progress=tell)
    spread, contrast = spreads(found), contrasts(found)
    console.print(_spread_table(found, spread))
    console.print(_contrast_table(contrast))
    for row in contrast:
        console.print(_in_words(row))
    params = {
        "starts": count,
        "steps": length,
        "batch": 64,
        "learning_rate": learning_rate,
        "models": ", ".join(f"{m} {n:,} parameters" for m, n in found.parameters.items()),
    }
    content = {
        "study": name,
        **params,
        "parameters": found.parameters,
        "label_correlation": {f"{p:g}": v for p, v in found.label_correlation.items()},
        "spreads": [asdict(row) for row in spread],
        "contrasts": [asdict(row) for row in contrast],
        "final_losses": {f"{m} {p:g}": v.tolist() for (m, p), v in found.losses.items()},
    }
    child_runs = {
        f"{row.model}, correlation {row.correlation:g}": {
            "mean_loss": row.mean.value,
            "loss_deviation": row.deviation,
            "bad_starts": row.bad,
            "loss_median": row.quantiles[1],
            "correlation": row.correlation,
        }
        for row in spread
    }
    connection.connect(workspace)
    figures = {"mean_loss.png": mean_loss(found, spread), "distributions.png": distributions(found)}
    record = runs.StudyRecord(
        name=name, params=params, runs=child_runs, figures=figures, content=content
    )
    logged = runs.log_study(workspace, record)
    pictures = workspace.root / "studies" / name
    pictures.mkdir(parents=True, exist_ok=True)
    for file, figure in figures.items():
        figure.savefig(pictures / file, dpi=110)
    link = connection.where_to_look(logged.link, workspace)
    console.print(f"pictures  {pictures}\nmlflow    {link}", highlight=False)
    write_json(write, content)
    return found


CENSUS = {"trials": 4, "seeds": 3, "epochs": 12}

CENSUS_FULL = {"trials": 30, "seeds": 20, "epochs": 15}

PARAMETERS = 48_000  # beyond the embeddings, of every model


def census(
    data: Path,
    workspace: Workspace,
    pairs: Sequence[int] = (1, 2),
    full: bool = False,
    trials: int | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    write: Path | None = None,
) -> dict[str, Any]:
    """The study `census`: the paper's tables, then the strongest ranker against LightGBM."""
    size = CENSUS_FULL if full else CENSUS
    tries, starts = trials or size["trials"], seeds or size["seeds"]
    length = epochs or size["epochs"]
    console = Console(width=190)
    if not full:
        console.print(
            f"cut for time: {tries} trials and {starts} seeds a model instead of "
            f"{CENSUS_FULL['trials']} and {CENSUS_FULL['seeds']} (--full runs all)"
        )
    connection.connect(workspace)
    content: dict[str, Any] = {"trials": tries, "seeds": starts, "epochs": length, "pairs": {}}
    for pair in pairs:
        split = read_split(data, pair)
        names = [task.name for task in split.tasks]
        parts = ", ".join(f"{len(e):,} {part}" for part, e in split.examples.items())
        console.print(
            f"\npair {pair}: {' and '.join(names)}; {split.protocol}: {parts}; "
            f"absolute correlation {split.correlation:.4f} (paper: {PAPER_CORRELATION[pair]:.4f})"
        )
        budget = Budget(tries, range(starts), length)
        family, strongest = _census_models(console, split, budget)
        rows, gains = compare(split, family, "shared_bottom")
        top, lead = compare(split, strongest, "LightGBM")
        title = f"pair {pair}, equal size and budget: {tries} trials, {starts} seeds"
        console.print(_census_table(title, names, rows, gains))
        console.print(_census_table(f"pair {pair}, the strongest", names, top, lead))
        for gain in lead:
            console.print(_against(gain))
        figure = census_picture(split, rows, gains)
        found = {
            "tasks": names,
            "protocol": split.protocol,
            "correlation": split.correlation,
            "models": [asdict(row) for row in [*rows, *top]],
            "gains_over_shared_bottom": [asdict(g) for g in gains],
            "gains_over_lightgbm": [asdict(g) for g in lead],
            "settings": {m.name: dict(m.settings) for m in [*family, *strongest]},
        }
        content["pairs"][str(pair)] = found
        child_runs = {
            row.name: {
                f"{kind}_auc_{task}": value
                for t, task in enumerate(names)
                for kind, value in (("mean", row.mean[t].value), ("best", row.best[t]))
            }
            | {"validate_auc": row.validate_auc, "parameters": float(row.parameters)}
            for row in [*rows, *top]
        }
        params = {"pair": pair, "protocol": split.protocol, "trials": tries, "seeds": starts}
        pictures = {f"census_pair_{pair}.png": figure}
        record = runs.StudyRecord(
            name="census", params=params, runs=child_runs, figures=pictures, content=found
        )
        logged = runs.log_study(workspace, record)
        folder = workspace.root / "studies" / "census"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"census_pair_{pair}.png", dpi=110)
        link = connection.where_to_look(logged.link, workspace)
        console.print(f"pictures  {folder}\nmlflow    {link}", highlight=False)
        write_json(write, content)
    return content


def _census_models(
    console: Console, split: Split, budget: Budget
) -> tuple[list[Tuned], list[Tuned]]:
    each = budget.trials + len(budget.seeds)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        total = len(CENSUS_MODELS) * each + each + len(split.tasks) * each + 1
        bar = progress.add_task("training", total=total)

        def tell(what: str) -> None:
            progress.update(bar, advance=1, description=what)

        candidates = [
            Candidate(name, equal_size(split, name, PARAMETERS)) for name in CENSUS_MODELS
        ]
        family = [tune_ranker(split, candidate, budget, tell) for candidate in candidates]
        free = {"preset": "mmoe", "experts": 8, "expert_hidden": [64]}
        ours = tune_ranker(split, Candidate("mmoe, free size", free, (1, 4)), budget, tell)
        trees = tune_trees(split, budget, tell)
        joined = with_trees(split, ours, budget.seeds)
        tell("with trees")
    best = max(family, key=lambda model: model.validate_auc)
    mean = [averaged(model) for model in (ours, joined, best)]
    return family, [trees, averaged(trees), ours, joined, *mean]


def _census_table(
    title: str, names: Sequence[str], rows: Sequence[Row], gains: Sequence[SharingGain]
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    reference = gains[0].reference if gains else ""
    table.add_column("model", no_wrap=True)
    for name in names:
        for heading in (f"{name} best", "mean", f"over {reference}"):
            table.add_column(heading, justify="right")
    table.add_column("parameters", justify="right")
    found = {(g.model, g.objective): g for g in gains}
    for row in rows:
        cells = []
        for t, name in enumerate(names):
            gain = found.get((row.name, name))
            cells += [f"{row.best[t]:.4f}", interval_text(row.mean[t])]
            cells.append("" if gain is None else interval_text(gain.gain, sign=True))
        table.add_row(row.name, *cells, f"{row.parameters:,}" if row.parameters else "")
    return table


def _against(gain: SharingGain) -> str:
    words = {"helped": "ahead of", "hurt": "behind", "undecided": "not told apart from"}
    return (
        f"{gain.model} is {words[gain.verdict]} {gain.reference} on {gain.objective}: "
        f"{interval_text(gain.gain, sign=True)}{f' ({gain.note})' if gain.note else ''}"
    )


def census_picture(split: Split, rows: Sequence[Row], gains: Sequence[SharingGain]) -> Figure:
    """Mean AUC gain of each model over the shared bottom with its interval, a panel per task."""
    names = [row.name for row in rows if row.name != gains[0].reference]
    figure = Figure(figsize=(9.0, 0.4 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(split.tasks), sharey=True)
    colours = {"helped": "tab:green", "hurt": "tab:red", "undecided": "0.45"}
    for axis, task in zip(axes, split.tasks, strict=True):
        for gain in gains:
            if gain.objective == task.name:
                at, colour = names.index(gain.model), colours[gain.verdict]
                axis.plot([gain.gain.low, gain.gain.high], [at, at], color=colour)
                axis.plot(gain.gain.value, at, "o", color=colour)
        axis.axvline(0.0, color="0.7", linestyle=":")
        axis.set(title=task.name, xlabel=f"AUC over {gains[0].reference}")
        axis.locator_params(axis="x", nbins=4)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure


def interval_text(found: Interval, digits: int = 4, sign: bool = False) -> str:
    form = f"{'+' if sign else ''}.{digits}f"
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _spread_table(found: Found, rows: Sequence[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Final loss on new rows, mean of both tasks")
    for heading in ("correlation", "labels'", "model", "parameters"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for heading in ("mean loss", "deviation", "5 %", "median", "95 %", f"over {BAD:g} x best"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.correlation:g}",
            f"{found.label_correlation[row.correlation]:.3f}",
            row.model,
            f"{found.parameters[row.model]:,}",
            interval_text(row.mean),
            f"{row.deviation:.4f}",
            *(f"{q:.4f}" for q in row.quantiles),
            f"{row.bad:.1%}",
        )
    return table


def _contrast_table(rows: Sequence[Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Against shared_bottom, start by start")
    for heading in ("correlation", "model", "lower loss by", "Wilcoxon p", "spread ratio", "B-F p"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for row in rows:
        gain = Interval(100 * row.gain.value, 100 * row.gain.low, 100 * row.gain.high)
        table.add_row(
            f"{row.correlation:g}",
            row.model,
            f"{interval_text(gain, 1, sign=True)} %",
            f"{row.better:.2g}",
            f"{row.spread_ratio:.2f}",
            f"{row.steadier:.2g}",
        )
    return table


def _in_words(row: Any) -> str:
    where = f"correlation {row.correlation:g}: {row.model}"
    if row.gain.low > 0:
        verdict = "ends lower than shared_bottom"
    elif row.gain.high < 0:
        verdict = "ends higher than shared_bottom"
    else:
        verdict = "does not differ significantly from shared_bottom"
    steady = "no significant difference in spread"
    if row.steadier < 0.05:
        steady = "steadier" if row.spread_ratio < 1 else "less steady"
    return f"{where} {verdict}; {steady}"
