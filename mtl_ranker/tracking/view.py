"""A view of an experiment's page: which columns it shows, and by what it is sorted.

MLflow's pages store a view that somebody shares as a tag of the experiment, and open it by the key
in the address. The content is that of MLflow's page state (`experimentPageUIState`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from urllib.parse import urlencode

import mlflow

KEY = "nights"
TAG = f"mlflow.sharedViewState.{KEY}"
KIND_TAG, TRAINING, MODEL = "kind", "training", "model"  # of a parent run and its child runs
SORTED_BY = "metrics.`validate/quality`"


def share_view(experiment_id: str, metrics: Sequence[str]) -> None:
    """Store the view of an experiment's trainings, best first, which `view_query` opens.

    Args:
        metrics: shown as columns, beside the run's duration and what was decided.
    """
    columns = [
        "attributes.`Created`",
        "attributes.`Duration`",
        *(f"tags.`{name}`" for name in ("winner", "registered_version", "champion")),
        SORTED_BY,
        *(f"metrics.`{name}`" for name in metrics),
    ]
    state = {
        "selectedColumns": columns,
        "orderByKey": SORTED_BY,
        "orderByAsc": False,
        "searchFilter": f"tags.{KIND_TAG} = '{TRAINING}'",
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsHiddenMode": "FIRST_10_RUNS",
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": False,
    }
    mlflow.MlflowClient().set_experiment_tag(experiment_id, TAG, json.dumps(state))


def view_query() -> str:
    """The part of the page's address after `?`; a sort order in it would replace the view."""
    return urlencode({"workflowType": "machine_learning", "viewStateShareKey": KEY})
