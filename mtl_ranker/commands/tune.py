"""`mtl-ranker tune`: search a model's settings and print the best as TOML."""

from __future__ import annotations

from datetime import date

from rich.progress import TaskID

from mtl_ranker.context import Context
from mtl_ranker.nightly.tuning import Budget, Callbacks, Trial
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import connection
from mtl_ranker.tracking.search import RecordedSearch, run_search


def tune_command(context: Context, day: date, name: str, budget: Budget) -> RecordedSearch:
    """Search one model's settings, or resume the search, and print the best as TOML."""
    best = float("-inf")
    with progress_bar() as progress:
        bar = progress.add_task(f"tuning {name}", total=budget.trials)

        def on_start(trials: int) -> None:
            progress.update(bar, completed=trials)
            if trials:
                console.print(f"resuming after {trials} trials", highlight=False)

        def on_trial(trial: Trial) -> None:
            nonlocal best
            if trial.quality > best:
                best = trial.quality
                console.print(
                    f"trial {trial.number}: validation quality {trial.quality:.3f} standard errors",
                    highlight=False,
                )
            progress.advance(bar)

        def on_finalists(count: int) -> None:
            console.print(
                f"comparing {count} of the trials with the project file: up to {budget.folds} "
                f"validation days, {budget.seeds} seeds",
                highlight=False,
            )
            comparing.append(
                progress.add_task("comparing", total=(count + 1) * budget.folds * budget.seeds)
            )

        def on_training() -> None:
            progress.advance(comparing[-1])

        comparing: list[TaskID] = []
        callbacks = Callbacks(on_trial, on_finalists, on_training)
        recorded = run_search(context, day, name, budget, callbacks, on_start)
    search = recorded.search
    for each in search.confirmed:
        console.print(str(each), highlight=False, markup=False)
    console.print(
        f"{search.trials} trials ({search.pruned} pruned): {search.decision}\n", highlight=False
    )
    console.print(recorded.toml, highlight=False, markup=False)
    link = connection.where_to_look(recorded.link, context.workspace)
    console.print(f"mlflow   {link}", highlight=False)
    return recorded
