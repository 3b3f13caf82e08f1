"""Two saved rankers on the same test rows."""

from __future__ import annotations

from datetime import date

import numpy as np
import polars as pl

from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.queries import LABEL
from mtl_ranker.promotion import Decision, decide
from mtl_ranker.training.suite import split_days
from mtl_ranker.workspace import Workspace


def compare_artifacts(
    project: Project,
    workspace: Workspace,
    day: date,
    challenger: RankerArtifact,
    champion: RankerArtifact,
) -> Decision:
    """Predict the test days that end with D with both models, and decide.

    A champion of other objectives or features cannot be compared; the challenger then replaces it.
    """
    if [t.name for t in champion.tasks] != [t.name for t in challenger.tasks]:
        return Decision(True, "promoted: the project's objectives changed since the champion")
    days = split_days(project, workspace.days("events"), day).test
    frame = workspace.scan("examples", days).collect(engine="streaming")
    missing = [c for c in champion.encoder.columns if c not in frame.columns]
    if missing:
        return Decision(True, "promoted: the project's features changed since the champion")
    tasks = list(challenger.tasks)
    names = [task.name for task in tasks]
    if frame.is_empty():
        raise ProjectError(f"split.test_days: no examples on {days[0]}..{days[-1]}")
    labels = frame.select(
        pl.col(LABEL + n).cast(pl.Float32).fill_null(np.nan) for n in names
    ).to_numpy()
    new, old = (m.predict(frame).select(names).to_numpy() for m in (challenger, champion))
    return decide(project, tasks, labels, frame["user_id"].to_numpy(), new, old)
