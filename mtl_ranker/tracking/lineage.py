"""The data of a training as MLflow's dataset inputs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import mlflow
import polars as pl
from mlflow.data.dataset import Dataset
from mlflow.data.sources import LocalArtifactDatasetSource  # type: ignore[attr-defined]

from mtl_ranker.context import Context
from mtl_ranker.features.columns import LABEL
from mtl_ranker.features.days import SplitDays, span
from mtl_ranker.features.view import examples_dataset
from mtl_ranker.logs.actions import actions_dataset
from mtl_ranker.workspace import fingerprint


class ExamplesDataset(Dataset):
    """The examples of some days.

    Two trainings have the same digest of a part if its examples were built from the same events,
    earlier days, settings and SQL. The profile has rows, users, the mean of each label, the
    digest of each day and, for a log of Delta or Iceberg tables, the version of each that a day was
    read at.
    """

    def __init__(self, context: Context, dates: Sequence[date]) -> None:
        workspace, dataset = context.workspace, examples_dataset(context)
        marks = {str(d): workspace.published_fingerprint(dataset, d) or "" for d in dates}
        rows = workspace.scan(dataset, list(dates))
        self._types = rows.collect_schema()
        labels = [name for name in self._types if name.startswith(LABEL)]
        found = rows.select(
            pl.len().alias("rows"),
            pl.col("user_id").n_unique().alias("users"),
            pl.col(labels).cast(pl.Float64).mean(),
        )
        counts = found.collect(engine="streaming").row(0, named=True)
        means = {name.removeprefix(LABEL): counts[name] for name in labels}
        self._profile = {
            "num_rows": counts["rows"],
            "users": counts["users"],
            "label_means": {k: v if v is None else round(v, 6) for k, v in means.items()},
            "digests": {day: mark[:12] for day, mark in marks.items()},
        }
        versions = self._versions_of(context, list(dates))
        if versions:
            self._profile["versions"] = versions
        place = workspace.where(dataset)
        place = place.resolve() if isinstance(place, Path) else place
        source = LocalArtifactDatasetSource(str(place))
        super().__init__(source, f"examples {span(dates)}", fingerprint(*marks.values())[:12])

    @staticmethod
    def _versions_of(context: Context, days: list[date]) -> dict[str, dict[str, str]]:
        """Day → setting → version of the Delta or Iceberg table it was read from."""
        datasets = ["events", examples_dataset(context)]
        datasets += [actions_dataset(action) for action in context.project.log.actions]
        found: dict[str, dict[str, str]] = {}
        for dataset in datasets:
            for day, versions in context.workspace.versions(dataset, days).items():
                of_stream = dataset.startswith("actions/")  # whose log is the stream
                own = {dataset: versions["log"]} if of_stream else versions
                found[day] = found.get(day, {}) | own
        return found

    def _compute_digest(self) -> str:
        raise NotImplementedError("the digest is given")

    @property
    def profile(self) -> dict[str, Any]:
        return self._profile

    @property
    def schema(self) -> dict[str, Any]:
        """In the form of MLflow's own datasets."""
        columns = [
            {"type": str(dtype), "name": name, "required": True}
            for name, dtype in self._types.items()
        ]
        return {"mlflow_colspec": columns}

    def to_dict(self) -> dict[str, str]:
        content = {"schema": json.dumps(self.schema), "profile": json.dumps(self.profile)}
        return super().to_dict() | content


def split_datasets(context: Context, days: SplitDays) -> dict[str, ExamplesDataset]:
    """The examples of each part of a split."""
    parts = {"train": days.train, "validate": days.validate, "test": days.test}
    return {part: ExamplesDataset(context, dates) for part, dates in parts.items()}


def log_datasets(datasets: dict[str, ExamplesDataset]) -> None:
    """Log the examples of each part to the active run."""
    mlflow.log_inputs([*datasets.values()], [*datasets], [{} for _ in datasets])
