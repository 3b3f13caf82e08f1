"""A whole night by the library's functions, without Prefect and MLflow's registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from mtl_ranker.context import Context
from mtl_ranker.logs.sources import open_context
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.promotion import Decision, compare_artifacts
from mtl_ranker.nightly.results import Suite
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.scoring import Ranked, score_day
from mtl_ranker.reports.page import training_report, with_decision
from mtl_ranker.tracking.pyfunc import store_and_load


@dataclass(frozen=True)
class Night:
    """What a night made.

    Attributes:
        decision: on the winner as a challenger of itself.
        page: the HTML report.
    """

    context: Context
    suite: Suite
    decision: Decision
    page: str
    ranked: Ranked


def run_night(
    folder: Path, data: str | Path | None = None, workspace: str | Path | None = None
) -> Night:
    """The night of the log's last day, of the folder's `project.toml` and its log.

    Args:
        data: folder or address of the log; default: the folder.
        workspace: folder or address; default: `ws` in the folder.

    Trains, stores the winner as MLflow does, compares it as it was saved, writes the report and
    ranks the candidates of the next day. Whatever fails raises its own error.
    """
    context = open_context(str(folder / "project.toml"), data or folder, workspace or folder / "ws")
    project, day = context.project, context.last_day()
    build_split(context, day)
    suite = train_suite(context, day)
    winner, frame = suite.winner.artifact, suite.held_out.frame
    saved = folder / "winner"
    store_and_load(winner, frame.head(5).select(winner.columns), saved)
    loaded = RankerArtifact.load(saved / "ranker")
    decision = compare_artifacts(context, day, loaded, winner)
    page = training_report(project, suite)
    page = with_decision(page, decision, "2", "1", project.promotion.confidence)
    ranked = score_day(context, RegisteredRanker(loaded, "1"), day + timedelta(days=1))
    return Night(context, suite, decision, page, ranked)
