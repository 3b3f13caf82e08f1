"""mtl_ranker: nightly multi-task ranking from Parquet logs to a registered champion.

The library works without Prefect; `flows/` defines what runs when. `import mtl_ranker as mr` offers
the names in `__all__`, which are imported when they are used (docs/library.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_ranker.config import Training, load_project
    from mtl_ranker.errors import ProjectError
    from mtl_ranker.library import Data, TrainedModel, train
    from mtl_ranker.logs.simulate import Feed, simulate
    from mtl_ranker.logs.sources import open_context
    from mtl_ranker.models.objectives import Task
    from mtl_ranker.nightly.build import build_split
    from mtl_ranker.nightly.promotion import compare_artifacts
    from mtl_ranker.nightly.suite import train_suite
    from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
    from mtl_ranker.ranking.scoring import score_day
    from mtl_ranker.reports.page import training_report
    from mtl_ranker.reports.tables import comparison_table

__version__ = "0.1.0"

# Name → the module that has it.
EXPORTS = {
    "Data": "library",
    "Feed": "logs.simulate",
    "ProjectError": "errors",
    "RankerArtifact": "ranking.artifact",
    "RegisteredRanker": "ranking.artifact",
    "Task": "models.objectives",
    "TrainedModel": "library",
    "Training": "config",
    "build_split": "nightly.build",
    "compare_artifacts": "nightly.promotion",
    "comparison_table": "reports.tables",
    "load_project": "config",
    "open_context": "logs.sources",
    "score_day": "ranking.scoring",
    "simulate": "logs.simulate",
    "train": "library",
    "train_suite": "nightly.suite",
    "training_report": "reports.page",
}

__all__ = [
    "Data",
    "Feed",
    "ProjectError",
    "RankerArtifact",
    "RegisteredRanker",
    "Task",
    "TrainedModel",
    "Training",
    "__version__",
    "build_split",
    "compare_artifacts",
    "comparison_table",
    "load_project",
    "open_context",
    "score_day",
    "simulate",
    "train",
    "train_suite",
    "training_report",
]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
