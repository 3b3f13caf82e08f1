"""Why an order is judged within lists: one feature that no ranking can use, judged by user.

The score is minus the user's own past rate of the label, the same for all of the user's rows of a
day. It orders nothing that is served together. But grouped by user over several days it has a GAUC
far above 0.5: the rate of a later day contains the labels of the earlier days, so of two days of
one user, the one with more positives has the lower rate. By list its GAUC is 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import CONSOLE
from mtl_ranker.config import load_project
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import model_quality
from mtl_ranker.evaluation.metrics import count_lists
from mtl_ranker.features.lists import list_ids
from mtl_ranker.nightly.popularity import NAME as POPULARITY
from mtl_ranker.nightly.results import baselines

RATE = "minus the user's past rate"
GROUPS = {"user": "user, days mixed", "day": "user × day", "list": "list"}
HEADINGS = ["objective", "score", "AUC over rows", *(f"GAUC by {name}" for name in GROUPS.values())]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--test-days", type=int, default=3)
    chosen = results.parse(options)
    project = load_project("kuairand")
    split = project.split.model_copy(update={"test_days": chosen.test_days})
    project = project.model_copy(update={"split": split})
    parts = examples_of(project, chosen.data)
    held_out, frame = parts.held_out, parts.held_out.frame
    popularity = baselines(parts.tasks, parts.frames["train"], held_out)[POPULARITY]
    groups = {
        "user": held_out.user,
        "day": list_ids(frame, ["date", "user_id"]),
        "list": held_out.lists,
    }
    window = project.features.windows[-1]
    figures: dict[str, Any] = {
        "test_days": [str(day) for day in parts.days.test],
        "test_rows": frame.height,
        "objectives": {},
    }
    for t, task in enumerate(parts.tasks):
        label = held_out.labels[:, t]
        scores = {
            RATE: -frame[f"user_{task.name}_rate_{window}d"].fill_null(0.0).to_numpy(),
            POPULARITY: popularity[:, t],
        }
        figures["objectives"][task.name] = {
            "lists": str(count_lists(label, held_out.lists)),
            "scores": {
                name: {
                    "auc": _quality(label, score, held_out.user, held_out.user, "auc"),
                    **{
                        by: _quality(label, score, held_out.user, group, "gauc")
                        for by, group in groups.items()
                    },
                }
                for name, score in scores.items()
            },
        }
    title = f"{', '.join(figures['test_days'])}: {frame.height:,} rows"
    results.show(CONSOLE, HEADINGS, _rows(figures), title)
    for name, each in figures["objectives"].items():
        CONSOLE.print(f"{name}: {each['lists']}")
    results.write(chosen, figures)


def _quality(
    label: np.ndarray, score: np.ndarray, user: np.ndarray, group: np.ndarray, measure: str
) -> list[float]:
    """Value and ends of its interval over users, of rows [N] grouped by `group`."""
    rows = LabelledRows.of("binary", label, Clusters.of(user, group))
    found = model_quality(rows, [score], measure, fixed=True).interval()
    return [found.value, found.low, found.high]


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    def cell(value: float, low: float, high: float) -> str:
        return f"{value:.4f} [{low:.4f}, {high:.4f}]"

    return [
        [objective, name, *(cell(*own[measure]) for measure in ("auc", *GROUPS))]
        for objective, each in figures["objectives"].items()
        for name, own in each["scores"].items()
    ]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The score and item popularity on every objective, in each grouping."""
    return {"list_artefact": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    """The score's GAUC by user and by list on every objective."""
    words = [
        f"{objective} {each['scores'][RATE]['user'][0]:.3f} by user, "
        f"{each['scores'][RATE]['list'][0]:.3f} by list"
        for objective, each in figures["objectives"].items()
    ]
    return f"{RATE}: {'; '.join(words)}"


if __name__ == "__main__":
    main()
