"""`mtl-ranker tune`: search a model's settings and print the best as TOML."""

from __future__ import annotations

from datetime import date

from mtl_ranker.context import Context
from mtl_ranker.evaluation.intervals import ONE_SEED
from mtl_ranker.nightly.tuning import Budget, Trial
from mtl_ranker.reports.console import console, progress_bar
from mtl_ranker.tracking import connection
from mtl_ranker.tracking.search import RecordedSearch, SearchCallbacks, run_search


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

        recorded = run_search(context, day, name, budget, SearchCallbacks(on_start, on_trial))
    search = recorded.search
    console.print(
        f"best of {search.trials} trials ({search.pruned} pruned): validation quality "
        f"{search.quality:.3f} standard errors. Every trial is one training ({ONE_SEED}): train "
        "the chosen settings and your own with several training.seeds to compare them\n",
        highlight=False,
    )
    console.print(recorded.toml, highlight=False, markup=False)
    link = connection.where_to_look(recorded.link, context.workspace)
    console.print(f"mlflow   {link}", highlight=False)
    return recorded
