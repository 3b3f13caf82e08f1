"""The data of a training as MLflow's dataset inputs."""

from __future__ import annotations

import json

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]

from mtl_ranker.context import Context
from mtl_ranker.features.days import SplitDays, span
from mtl_ranker.features.view import examples_dataset
from mtl_ranker.workspace import fingerprint


def log_datasets(context: Context, days: SplitDays) -> None:
    """Log the examples of each part to the active run: days, and a digest of their provenance.

    Two trainings have the same digest of a part if its examples were built from the same events,
    earlier days, settings and SQL. The tag `digests` has the digest of each day.
    """
    workspace, dataset = context.workspace, examples_dataset(context)
    source = LocalArtifactDatasetSource(str((workspace.root / dataset).resolve()))
    for part, dates in (("train", days.train), ("validate", days.validate), ("test", days.test)):
        marks = {str(d): workspace.published_fingerprint(dataset, d) or "" for d in dates}
        name, digest = f"examples {span(dates)}", fingerprint(*marks.values())
        mlflow.log_input(
            MetaDataset(source, name, digest),  # type: ignore[abstract]
            context=part,
            tags={
                "days": span(dates),
                "digests": json.dumps({day: mark[:12] for day, mark in marks.items()}),
            },
        )
