"""Descriptions of trainings and models in Markdown, for MLflow's pages."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_ranker.errors import counted
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.features.days import span
from mtl_ranker.nightly.promotion import Decision
from mtl_ranker.nightly.results import ModelRun, Suite
from mtl_ranker.reports.tables import comparison_rows

TRAINING = "### Training"  # begins the part of a description that a decision does not replace


def training_text(suite: Suite, report: str) -> str:
    """A training: its winner, the table of objectives × models, its days, and the report.

    Args:
        report: address of the HTML report.
    """
    days, winner = suite.days, suite.winner
    lines = [
        TRAINING,
        "",
        f"**{winner.label}** wins on the validation days. [Report]({report})",
        "",
        *_comparison(suite),
        "",
        f"Test {span(days.test)} ({len(suite.held_out.user):,} rows), trained on "
        f"{suite.train_rows:,} rows of {span(days.train)}, validated on {span(days.validate)}.",
    ]
    if winner.refitted:
        lines.append("The winner was then trained again on training and validation days together.")
    return "\n".join(lines)


def run_text(run: ModelRun) -> str:
    """One training of a model: its epochs, and its metrics on the test days."""
    epochs, trained = len(run.trained.epochs), run.trained
    measures = list(dict.fromkeys(m for metrics in run.metrics.values() for m in metrics))
    rows = [
        [name, *(_number(metrics.get(measure)) for measure in measures)]
        for name, metrics in run.metrics.items()
    ]
    return "\n".join(
        [
            f"{run.label}: {counted(epochs, 'epoch')} in {trained.seconds:,.1f} s, best epoch "
            f"{trained.best_epoch}. On the test days:",
            "",
            *_table(["objective", *measures], rows),
        ]
    )


def with_decision(text: str, decision: Decision, version: str) -> str:
    """A description whose first line is the decision on a version; it replaces an earlier one."""
    outcome = "is champion" if decision.promoted else "is not champion"
    # MLflow's lists of versions show the first line as plain text.
    reason = decision.reason[:1].upper() + decision.reason[1:]
    lines = [f"Version {version} {outcome}. {reason}."]
    if decision.differences:
        rows = [[name, value.signed] for name, value in decision.differences.items()]
        lines += ["", *_table(["objective", f"challenger minus {decision.against}"], rows)]
    _, found, training = text.partition(TRAINING)
    return "\n".join([*lines, "", found + training])


def as_champion(text: str, version: str, now: bool) -> str:
    """A description whose first line says whether a version is champion, or was.

    >>> as_champion("Version 3 is champion. Accepted by hand.", "3", now=False)
    'Version 3 was champion. Accepted by hand.'
    """
    verbs = ("was", "is") if now else ("is", "was")
    before, after = (f"Version {version} {verb} champion." for verb in verbs)
    return after + text.removeprefix(before) if text.startswith(before) else text


def shortened(text: str, most: int) -> str:
    """Text of at most `most` characters: its first lines, then three dots."""
    if len(text) <= most:
        return text
    kept = text[: most - 4]
    return kept[: max(kept.rfind("\n"), 0)] + "\n..."


def _comparison(suite: Suite) -> list[str]:
    rows = comparison_rows(suite)
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(row["objective"], row["model"]): row["quality"] for row in rows}
    measures = {row["objective"]: row["measure"] for row in rows}
    winner = suite.winner.name
    table = []
    for objective, measure in measures.items():
        values = [cells[objective, model] for model in models]
        values = [f"**{v}**" if m == winner else v for m, v in zip(models, values, strict=True)]
        table.append([f"{objective} ({MEASURE_NAMES[measure]})", *values])
    return _table(["objective", *models], table)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[*_escaped(headings)], ["---", *["---:"] * (len(headings) - 1)], *map(_escaped, rows)]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _escaped(cells: Sequence[str]) -> list[str]:
    """Cells with space on their left, as MLflow's pages draw tables without any."""
    first, *others = (cell.replace("|", "\\|") for cell in cells)
    return [first, *(f"&nbsp;&nbsp;{cell}" for cell in others)]


def _number(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.4f}"
