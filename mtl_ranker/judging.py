"""The commands that look at models rather than make a night: blend, tune, backtest, explain."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mtl_ranker import registry
from mtl_ranker.blending import Blend, check_weights, find_blend, write_blend
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation import plots
from mtl_ranker.evaluation.blend import Point
from mtl_ranker.explain import Explanation, explain
from mtl_ranker.logs.sources import Source
from mtl_ranker.training.backtest import POLICIES, Backtest, backtest, measures
from mtl_ranker.training.suite import prepare
from mtl_ranker.training.tuning import Search, Trial, open_study, tune
from mtl_ranker.workspace import Workspace, fingerprint, write_json


def blend_command(
    project: Project,
    workspace: Workspace,
    day: date,
    satisfaction_share: float,
    how: str | None,
    tries: int,
    given: dict[str, float],
    store: bool,
    alias: str,
    write: Path | None,
) -> None:
    """Draw the front, propose weights; with `store`, let the model blend so from now on."""
    console = _console()
    registry.connect(workspace)
    artifact, version = registry.load_artifact(project, alias)
    if given:
        chosen = check_weights(project, given)
        method = how or artifact.project.scoring.blend
    else:
        with Progress(*_columns(), console=console) as progress:
            bar = progress.add_task("trying weights", total=tries)
            found = find_blend(
                project,
                workspace,
                day,
                artifact,
                satisfaction_share,
                how,
                tries,
                lambda: progress.advance(bar),
            )
        console.print(_blend_table(found, satisfaction_share))
        picture = write_blend(found, workspace, version, day)
        console.print(f"picture  {picture}", highlight=False)
        write_json(write, asdict(found) | {"version": version, "day": str(day)})
        chosen, method = found.proposed.weights, found.how
    words = ", ".join(f"{name} {weight:g}" for name, weight in chosen.items())
    if store:
        registry.store_blend(project, version, method, chosen)
        console.print(f"stored   {project.name} version {version} blends {method}: {words}")
    else:
        console.print(f"not stored: add --store to let version {version} blend {method}: {words}")


def _blend_table(found: Blend, share: float) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{found.how}: {sum(p.best for p in found.points)} of {len(found.points)} choices "
        "on the front; chosen on half of the test days' users, then looked at on the others",
        title_justify="left",
    )
    table.add_column("weights", no_wrap=True)
    for heading in ("", "engagement", "satisfaction", "others': engagement", "satisfaction"):
        table.add_column(heading, justify="right" if heading else "left")

    def row(name: str, point: Point, test: Point | None = None) -> None:
        words = ", ".join(f"{n} {w:g}" for n, w in point.weights.items())
        values = [point.engagement, point.satisfaction]
        values += [] if test is None else [test.engagement, test.satisfaction]
        table.add_row(words, name, *(f"{v:.4f}" for v in values))

    row(
        "now" + (" (on the front)" if found.current.best else ""),
        found.current,
        found.current_on_test,
    )
    row(f"proposed, {share:.0%} satisfaction", found.proposed, found.proposed_on_test)
    front = sorted((p for p in found.points if p.best), key=lambda p: -p.engagement)
    for point in front[:: max(1, len(front) // 8)]:
        row("front", point)
    return table


def tune_command(
    project: Project,
    workspace: Workspace,
    day: date,
    name: str,
    trials: int,
    minutes: float | None,
    write: Path | None,
) -> Search:
    """Search one model's settings; print the best as TOML. Run again, it goes on."""
    if name not in project.models:
        raise ProjectError(
            f"--model {name}: no [models.{name}]; allowed: {', '.join(project.models)}"
        )
    console = _console()
    registry.connect(workspace)
    parts = prepare(project, workspace, day)
    rows = [*parts.days.train, *parts.days.validate]
    marks = [workspace.published_fingerprint("examples", d) for d in rows]
    digest = fingerprint(
        project.digest("objectives", "features", "training"), project.models[name], *marks
    )[:12]
    study = f"{project.name} {name} {day} {digest}"
    storage = f"sqlite:///{workspace.root.resolve() / 'optuna.db'}"
    # The study knows its MLflow run before the first trial, so that a killed search finds it again.
    record = open_study(project, name, storage, study)
    parent = record.user_attrs.get("mlflow_run")
    before = sum(t.state.is_finished() for t in record.get_trials(deepcopy=False))
    params = {
        "model": name,
        "train_days": f"{parts.days.train[0]}..{parts.days.train[-1]}",
        "validate_days": f"{parts.days.validate[0]}..{parts.days.validate[-1]}",
    }
    with (
        registry.tuning_run(project, name, workspace, params, parent) as (logged, log_trial),
        Progress(*_columns(), console=console) as progress,
    ):
        record.set_user_attr("mlflow_run", logged.run_id)
        if before:
            console.print(f"going on with {before} trials made before", highlight=False)
        bar = progress.add_task(f"tuning {name}", total=trials, completed=before)
        best = {"quality": float("-inf")}

        def on_trial(trial: Trial) -> None:
            log_trial(trial)
            if trial.quality > best["quality"]:
                best["quality"] = trial.quality
                console.print(
                    f"trial {trial.number}: validation quality {trial.quality:.4f}", highlight=False
                )
            progress.advance(bar)

        search = tune(
            project,
            parts,
            name,
            trials,
            None if minutes is None else 60 * minutes,
            storage,
            study,
            on_trial,
        )
        text = as_toml(project, name, search)
        registry.log_search(search, text)
    console.print(
        f"best of {search.trials} trials ({search.pruned} pruned): validation quality "
        f"{search.quality:.4f}\n",
        highlight=False,
    )
    console.print(text, highlight=False, markup=False)
    console.print(f"mlflow   {logged.link}", highlight=False)
    write_json(write, asdict(search) | {"study": study, "toml": text})
    return search


def as_toml(project: Project, name: str, search: Search) -> str:
    """The found settings as lines of a project file."""

    def lines(settings: dict[str, Any]) -> str:
        return "\n".join(f"{key} = {_toml(value)}" for key, value in settings.items())

    return f"[models.{name}]\n{lines(search.model)}\n\n[training]\n{lines(search.training)}\n"


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}" if "." in f"{value:.6g}" or "e" in f"{value:.6g}" else f"{value:.1f}"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def backtest_command(
    project: Project,
    source: Source,
    workspace: Workspace,
    first: date,
    last: date,
    only: Sequence[str],
    write: Path | None,
) -> Backtest:
    """Live the nights, print and draw the curve."""
    console = _console()
    for name in only:
        if name not in project.models:
            raise ProjectError(
                f"--model {name}: no [models.{name}]; allowed: {', '.join(project.models)}"
            )
    if only:
        project = project.model_copy(
            update={"models": {name: project.models[name] for name in only}}
        )
    registry.connect(workspace)
    days = sum(first <= d <= last for d in source.days())
    with Progress(*_columns(), console=console) as progress:
        bar = progress.add_task("first night", total=max(days, 1))

        def tell(words: str) -> None:
            progress.update(bar, advance=1, description=words)

        found = backtest(project, source, workspace, first, last, tell)
    for table in _backtest_tables(project, found):
        console.print(table)
    for day, words in found.promotions.items():
        console.print(f"{day}  {words}", highlight=False)
    curves = {
        f"{objective}, {metric.upper()}": {
            policy: found.curve(policy, objective, metric) for policy in POLICIES
        }
        for objective, metrics in measures(project).items()
        for metric in metrics
    }
    title = f"{project.name}: kept since the night of {found.lived[0].night}, or trained again"
    figure = plots.curves_over_days(found.days, curves, title)
    place = f"backtests/{first}_{last}"
    picture = workspace.publish_file(f"{place}.png", plots.png(figure))
    content = {
        "days": [str(d) for d in found.days],
        "lived": [asdict(r) | {"day": str(r.day), "night": str(r.night)} for r in found.lived],
        "promotions": {str(d): w for d, w in found.promotions.items()},
        "gains_over_kept": {f"{p} {o}": asdict(g) for (p, o), g in found.gains.items()},
    }
    workspace.publish_file(f"{place}.json", json.dumps(content, indent=1))
    write_json(write, content)
    runs = {
        policy: {
            f"{objective}_{metric}": sum(values[policy]) / len(values[policy])
            for (objective, metric), values in (
                (key.split(", "), value) for key, value in curves.items()
            )
        }
        for policy in POLICIES
    }
    params = {"from": str(first), "to": str(last), "models": ", ".join(project.models)}
    logged = registry.log_study(
        workspace, f"{project.name}-backtest", params, runs, {"curves.png": figure}, content
    )
    console.print(f"picture  {picture}\nmlflow   {logged.link}", highlight=False)
    return found


def _backtest_tables(project: Project, found: Backtest) -> list[Table]:
    made = []
    for objective, metrics in measures(project).items():
        table = Table(box=box.SIMPLE_HEAD, title=objective, title_justify="left")
        table.add_column("day", no_wrap=True)
        for metric in metrics:
            for policy in POLICIES:
                table.add_column(f"{policy} {metric.upper()}", justify="right", no_wrap=True)
        for number, day in enumerate(found.days):
            values = [found.curve(p, objective, m)[number] for m in metrics for p in POLICIES]
            table.add_row(str(day), *(f"{v:.4f}" for v in values))
        for policy in POLICIES[1:]:
            gain = found.gains[policy, objective]
            table.caption = (table.caption or "") + (
                f"{policy} over kept, all days' rows: {gain.value:+.4f} "
                f"[{gain.low:+.4f}, {gain.high:+.4f}]\n"
            )
        table.caption_justify = "left"
        made.append(table)
    return made


def explain_command(
    project: Project,
    source: Source,
    workspace: Workspace,
    user: str,
    item: str,
    day: date,
    context: dict[str, str],
    write: Path | None,
) -> Explanation:
    """Print how the champion scores one pair."""
    console = _console()
    registry.connect(workspace)
    artifact, version = registry.load_artifact(project, "champion")
    found = explain(project, source, workspace, artifact, version, user, item, day, context)
    seen = [w for w, known in (("user", found.known_user), ("item", found.known_item)) if not known]
    unknown = f"; never seen in the log: {', '.join(seen)}" if seen else ""
    console.print(
        f"user {found.user}, item {found.item}, {day}, {project.name} version {version}{unknown}",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("objective", "network", "calibrated", "weight", "adds to score", "experts"):
        table.add_column(
            heading, justify="left" if heading in ("objective", "experts") else "right"
        )
    for name, value in found.predictions.items():
        table.add_row(
            name,
            f"{found.raw[name]:.4f}",
            f"{value:.4f}",
            f"{artifact.project.blend_weights[name]:g}",
            f"{found.parts[name]:+.4f}",
            " ".join(f"{w:.2f}" for w in found.experts[name]),
        )
    console.print(table)
    rank = "not in the published top" if found.rank is None else f"rank {found.rank}"
    how = artifact.project.scoring.blend
    console.print(f"score {found.score:.4f} ({how}); {rank} of {day}\n", highlight=False)
    table = Table(
        box=box.SIMPLE_HEAD,
        title="what each feature does to the score",
        caption="change when this one is made missing; the ten largest",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("feature", "value", "effect"):
        table.add_column(heading, justify="left" if heading == "feature" else "right")
    for name, effect in list(found.effects.items())[:10]:
        value = found.features[name]
        table.add_row(
            name, f"{value:.4g}" if isinstance(value, float) else str(value), f"{effect:+.4f}"
        )
    console.print(table)
    write_json(write, asdict(found) | {"day": str(day)})
    return found


def _console() -> Console:
    found = Console()
    return found if found.is_terminal else Console(width=140)


def _columns() -> tuple[Any, ...]:
    return (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
