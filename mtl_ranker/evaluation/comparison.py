"""Two saved rankers on the same test rows."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from mtl_ranker.artifact import RankerArtifact
from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.features.queries import LABEL
from mtl_ranker.promotion import Decision, decide, unfit
from mtl_ranker.serving import MEASURED_ROWS, try_serving
from mtl_ranker.training.batches import label_matrix
from mtl_ranker.training.suite import split_days
from mtl_ranker.workspace import Workspace


def compare_artifacts(
    project: Project,
    workspace: Workspace,
    day: date,
    challenger: RankerArtifact,
    champion: RankerArtifact | None,
    folder: Path | None = None,
) -> Decision:
    """Predict the test days that end with D with both models, and decide.

    A champion of other objectives or features cannot be compared; the challenger then replaces it,
    as it does where there is none, if by itself it is calibrated and serves.

    Args:
        folder: the challenger as saved; it is then loaded and timed in a fresh process.
    """
    days = split_days(project, workspace.days("events"), day).test
    frame = workspace.scan("examples", days).collect(engine="streaming")
    if frame.is_empty():
        raise ProjectError(f"split.test_days: no examples on {days[0]}..{days[-1]}")
    tasks = list(challenger.tasks)
    names = [task.name for task in tasks]
    labels = label_matrix(frame, [LABEL + n for n in names])
    new = challenger.predict(frame)
    serving = None
    if folder is not None:
        some = frame.select(challenger.columns).head(MEASURED_ROWS)
        serving = try_serving(folder, some, new.head(MEASURED_ROWS))
    other = None
    if champion is None:
        other = "the first model becomes champion"
    elif [t.name for t in champion.tasks] != names:
        other = "the project's objectives changed since the champion"
    elif [c for c in champion.columns if c not in frame.columns]:
        other = "the project's features changed since the champion"
    if champion is None or other is not None:
        against = unfit(project, tasks, labels, new.select(names).to_numpy(), serving)
        if against:
            return Decision(False, "not promoted: " + "; ".join(against), serving=serving)
        return Decision(True, f"promoted: {other}", serving=serving)
    old = champion.predict(frame).select(names).to_numpy()
    user = frame["user_id"].to_numpy()
    return decide(project, tasks, labels, user, new.select(names).to_numpy(), old, serving)
