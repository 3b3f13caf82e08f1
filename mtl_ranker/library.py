"""Training on one's own rows: no project file, no workspace, no nightly pipeline.

`import mtl_ranker as mr` offers these names; see docs/library.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mtl_ranker.config import Categorical, Features, ListColumn, Training
from mtl_ranker.errors import ProjectError
from mtl_ranker.evaluation.diagnostics import Diagnosis, diagnose
from mtl_ranker.evaluation.metrics import Metrics, evaluate_all
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.features.lists import list_ids
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.reports import plots
from mtl_ranker.training.batches import Examples, encode_examples, encoded_tensors, label_matrix
from mtl_ranker.training.loop import Design, Epoch, Execution, Rows, train_ranker
from mtl_ranker.training.network import predict

KINDS = ("binary", "regression", "watch_time", "ordinal")
# Labels by kind.
ALLOWED = {"binary": (0.0, 1.0), "regression": (-math.inf, math.inf)}
ALLOWED |= {"watch_time": (0.0, math.inf), "ordinal": (0.0, math.inf)}
WORDS = {"binary": "0 to 1", "regression": "numbers"}
WORDS |= {"watch_time": "0 or more", "ordinal": "whole numbers from 0"}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows to train on, and what their columns are.

    Attributes:
        train: training rows.
        validate: rows on which early stopping is decided; None trains all epochs.
        objectives: label column → kind (binary, regression, watch_time or ordinal), or a `Task`
            whose name is the column. A null or NaN label is missing.
        categoricals: feature columns. A value that is not in the training rows is unknown.
        numerics: feature columns. A value may be missing.
        lists: feature columns that hold lists of categories.
        user: the column that groups rows for GAUC and NDCG; None where every row is one group.

    Raises ProjectError for a column that is missing or of a type that it cannot have, for a label
    that its kind cannot have, for a label among the features, and for a kind that does not exist.
    """

    train: pl.DataFrame
    validate: pl.DataFrame | None = None
    objectives: Mapping[str, str | Task]
    categoricals: Sequence[str] = ()
    numerics: Sequence[str] = ()
    lists: Sequence[str] = ()
    user: str | None = None

    def __post_init__(self) -> None:
        features = [*self.categoricals, *self.numerics, *self.lists]
        if not self.objectives or not features:
            raise ProjectError("data: needs one objective or more, and one feature column or more")
        for name, kind in self.objectives.items():
            own = kind if isinstance(kind, str) else kind.kind
            if own not in KINDS:
                raise ProjectError(f"objectives[{name!r}]: {own!r}; allowed: {', '.join(KINDS)}")
        both = [name for name in self.objectives if name in features]
        if both:
            raise ProjectError(f"data: {', '.join(both)}: both a label and a feature")
        user = [] if self.user is None else [self.user]
        for part, frame in (("train", self.train), ("validate", self.validate)):
            if frame is not None:
                self._check(part, frame, [*self.objectives, *features, *user])

    def _check(self, part: str, frame: pl.DataFrame, columns: Sequence[str]) -> None:
        if not isinstance(frame, pl.DataFrame):
            found = f"{type(frame).__module__.split('.')[0]}.{type(frame).__name__}"
            raise ProjectError(f"data.{part}: {found}; allowed: a polars DataFrame")
        if frame.is_empty():
            raise ProjectError(f"data.{part}: no rows")
        missing = [column for column in columns if column not in frame.columns]
        if missing:
            raise ProjectError(f"data.{part}: columns are missing: {', '.join(missing)}")
        for name in (*self.numerics, *self.objectives):
            dtype = frame.schema[name]
            if not (dtype.is_numeric() or dtype.is_temporal() or dtype in (pl.Boolean, pl.Null)):
                raise ProjectError(f"data.{part}: {name!r} is {dtype}; allowed: numbers, Booleans")
        for name, kind in self.objectives.items():
            own = kind if isinstance(kind, str) else kind.kind
            low, high = ALLOWED[own]
            label = frame[name].cast(pl.Float64).fill_nan(None).drop_nulls()
            wrong = label.filter((label < low) | (label > high))
            if own == "ordinal":
                wrong = wrong.append(label.filter(label != label.round()))
            if len(wrong):
                raise ProjectError(
                    f"data.{part}: {name!r} ({own}): {wrong[0]:g}; allowed: {WORDS[own]}"
                )

    @classmethod
    def of_tensors(
        cls,
        numeric: Tensor,
        labels: Mapping[str, Tensor],
        kinds: Mapping[str, str] | None = None,
        categorical: Tensor | None = None,
        validate_share: float = 0.2,
    ) -> Data:
        """Rows from tensors; the last `validate_share` of them are the validation rows.

        Features are named `n1`, `n2`, … and `c1`, `c2`, ….

        Args:
            numeric: [N, F], NaN where missing.
            labels: name → [N], NaN where missing.
            kinds: name → kind; binary where absent.
            categorical: [N, C] integers.
        """
        columns = {f"n{f + 1}": numeric[:, f].numpy() for f in range(numeric.shape[1])}
        numerics = list(columns)
        if categorical is not None:
            columns |= {f"c{c + 1}": categorical[:, c].numpy() for c in range(categorical.shape[1])}
        categoricals = [name for name in columns if name not in numerics]
        frame = pl.DataFrame(columns | {name: label.numpy() for name, label in labels.items()})
        first = frame.height - round(validate_share * frame.height)
        return cls(
            train=frame[:first],
            validate=frame[first:] if first < frame.height else None,
            objectives={name: (kinds or {}).get(name, "binary") for name in labels},
            categoricals=categoricals,
            numerics=numerics,
        )

    @property
    def tasks(self) -> list[Task]:
        """The objectives' settings; an ordinal label has its highest training value plus 1."""
        found = []
        for name, kind in self.objectives.items():
            task = Task(name, kind) if isinstance(kind, str) else replace(kind, name=name)
            if task.kind == "ordinal" and not task.levels:
                task = replace(task, levels=int(np.nanmax(_label(self.train, name))) + 1)
            found.append(task)
        return found


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A trained ranker with its encoder.

    Attributes:
        ranker: the network, in evaluation mode.
        epochs: losses by epoch.
        user: the column that groups rows for GAUC and NDCG.
    """

    ranker: Ranker
    encoder: Encoder
    tasks: list[Task]
    epochs: list[Epoch]
    best_epochs: list[int]
    user: str | None = None

    def predict(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Predictions of N rows, a column per objective; not calibrated.

        Raises ProjectError for a feature column that is missing.
        """
        names = [task.name for task in self.tasks]
        inputs = encoded_tensors(self.encoder.transform(rows))
        unlabelled = Examples(*inputs, labels=torch.empty(rows.height, 0))
        values = predict(self.ranker, unlabelled, self.tasks)
        return pl.DataFrame({name: values[:, t] for t, name in enumerate(names)})

    def evaluate(self, rows: pl.DataFrame) -> Metrics:
        """Objective → metric → value on N labelled rows."""
        examples = self._examples(rows)
        lists = np.zeros(rows.height) if self.user is None else list_ids(rows, [self.user])
        prediction = predict(self.ranker, examples, self.tasks)
        return evaluate_all(self.tasks, examples.labels.numpy(), prediction, lists)

    def diagnose(self, rows: pl.DataFrame) -> Diagnosis:
        """Gates and experts of each layer, on N labelled rows."""
        examples = self._examples(rows)
        return diagnose(self.ranker, examples.inputs, examples.labels.numpy(), self.tasks)

    def gates(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Mean weight of each expert of the last layer for each objective, on N labelled rows.

        Raises ProjectError for a model without experts.
        """
        layers = self.diagnose(rows).layers
        if not layers:
            raise ProjectError("gates: the model has no layer of experts")
        weights = layers[-1].expert_weights
        experts = {f"expert {e + 1}": weights[:, e] for e in range(weights.shape[1])}
        return pl.DataFrame({"objective": layers[-1].outputs} | experts)

    def plot_gates(self, rows: pl.DataFrame) -> Figure:
        """The picture of `gates`, as in the report."""
        table = self.gates(rows)
        return plots.gate_heatmap(
            table["objective"].to_list(), table.drop("objective").to_numpy(), "gates"
        )

    def plot_learning_curves(self) -> Figure:
        """Training and validation loss of each objective by epoch, as in the report."""
        names = [task.name for task in self.tasks]
        train = np.array([epoch.train_loss for epoch in self.epochs])
        validate = np.array([epoch.validate_loss for epoch in self.epochs])
        return plots.learning_curves(names, train, validate, self.best_epochs, "losses")

    def _examples(self, rows: pl.DataFrame) -> Examples:
        return encode_examples(self.encoder, rows, [task.name for task in self.tasks])


def train(
    data: Data,
    model: Mapping[str, Any] | str = "mmoe",
    training: Training = Training(),
    seed: int = 0,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> TrainedModel:
    """Train one model; the same seed gives the same weights on the same machine and threads.

    Raises ProjectError for settings that do not exist, for an infinite numeric, and where no
    training row has a label.

    Args:
        model: a preset's name, or its settings as in `[models.NAME]` of a project file, such as
            `{"preset": "mmoe", "experts": 8}`.
        training: settings as in `[training]` of a project file.
        on_epoch: called after each epoch.
    """
    unlabelled = [name for name in data.objectives if np.isnan(_label(data.train, name)).all()]
    if unlabelled:
        raise ProjectError(f"data.train: no labels of {', '.join(unlabelled)}")
    if training.distill:
        raise ProjectError(f"training.distill: {training.distill}; allowed: 0 outside of a night")
    tasks = [_with_pairs(task, training) for task in data.tasks]
    ranked = [task.name for task in tasks if task.list_loss is not None]
    if ranked and data.user is None:
        raise ProjectError(
            f"data.user: not set, but the losses of {', '.join(ranked)} compare a user's rows "
            "(list_loss or training.pairwise)"
        )
    list_keys = [] if data.user is None else [data.user]
    features = Features(
        categoricals=[Categorical(column=name) for name in data.categoricals],
        lists=[ListColumn(column=name) for name in data.lists],
        numerics=list(data.numerics),
    )
    settings = {"preset": model} if isinstance(model, str) else model
    encoder = Encoder.fit(features, data.numerics, data.train)
    try:
        design = Design(make("model", settings, len(tasks)), encoder, tasks)
    except ValueError as error:
        raise ProjectError(str(error)) from error
    labels = [task.name for task in tasks]
    parts = [
        None if frame is None else encode_examples(encoder, frame, labels, list_keys)
        for frame in (data.train, data.validate)
    ]
    assert parts[0] is not None
    execution = Execution(on_epoch)
    if parts[1] is None:
        execution = Execution(on_epoch, until=[training.epochs] * len(tasks))
    with torch.random.fork_rng():
        trained = train_ranker(design, Rows(parts[0], parts[1]), training, seed, execution)
    return TrainedModel(
        ranker=trained.model,
        encoder=encoder,
        tasks=tasks,
        epochs=trained.epochs,
        best_epochs=trained.best_epochs,
        user=data.user,
    )


def _with_pairs(task: Task, training: Training) -> Task:
    """A binary task without a list loss has pairs with `training.pairwise`."""
    if task.kind != "binary" or task.list_loss is not None or training.pairwise <= 0:
        return task
    return replace(task, list_loss="pairs", list_weight=training.pairwise)


def _label(rows: pl.DataFrame, name: str) -> np.ndarray:
    """A label column as [N], NaN where missing."""
    return label_matrix(rows, [name])[:, 0]
