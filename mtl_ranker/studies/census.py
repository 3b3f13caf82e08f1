"""Census-Income (Ma et al., KDD 2018, section 6.3): two pairs of tasks, every model tuned with an
equal budget at an equal size, and the strongest ranker against LightGBM per task.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from mtl_ranker.config import Categorical, Features, Training
from mtl_ranker.evaluation.influence import Clusters, LabelledRows
from mtl_ranker.evaluation.intervals import Interval, model_quality
from mtl_ranker.evaluation.metrics import auc
from mtl_ranker.evaluation.sharing import SharingGain, sharing_gains
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.objectives import Task
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.trees import averaged as average
from mtl_ranker.models.trees import tree_numbers
from mtl_ranker.studies.census_data import CENSUS_NUMBERS, find_files, read_census
from mtl_ranker.studies.lightgbm_baseline import Boosting, tune_lightgbm
from mtl_ranker.studies.search import SEED, Budget, Space, Uniform, search
from mtl_ranker.training.batches import Examples, encode_examples
from mtl_ranker.training.boosting import fit_forest
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import build_ranker, predict

# Section 6.3's models with the sizes that `equal_size` makes alike.
MODELS = (
    "single_task",
    "shared_bottom",
    "l2_constrained",
    "cross_stitch",
    "tensor_factorisation",
    "omoe",
    "mmoe",
    "ple",
)
COLLEGE = ("Associates", "Bachelors", "Masters", "Prof school", "Doctorate")
PAIRS = {
    1: ("income_50k", "never_married"),
    2: ("college", "never_married"),
}
SOURCES = {
    "income_50k": ("income", "income_50k"),
    "never_married": ("marital_status", "never_married"),
    "college": ("education", "college"),
}
PAPER_CORRELATION = {1: 0.1768, 2: 0.2373}
DROPPED = ("instance_weight",)


@dataclass(frozen=True, kw_only=True)
class Split:
    """One pair's rows by part (train, validate, test), raw and encoded.

    Attributes:
        protocol: how the parts came about, in words.
        correlation: absolute Pearson correlation of the two labels over all rows.
    """

    pair: int
    protocol: str
    correlation: float
    tasks: list[Task]
    encoder: Encoder
    frames: dict[str, pl.DataFrame]
    examples: dict[str, Examples]


def read_split(data: Path, pair: int, seed: int = 0) -> Split:
    """The paper's protocol with both files (train on one, the other halved into validation and
    test), or a random 70/15/15 split of one. The tasks' own columns leave the inputs.
    """
    train_file, test_file = find_files(data)
    rng = np.random.default_rng(seed)
    train = _with_tasks(read_census(train_file))
    if test_file is not None:
        other = _with_tasks(read_census(test_file))
        order = rng.permutation(other.height)
        half = other.height // 2
        parts = {"train": train, "validate": other[order[:half]], "test": other[order[half:]]}
        protocol = f"trained on {train_file.name}, {test_file.name} halved"
        everything = pl.concat([train, other])
    else:
        order = rng.permutation(train.height)
        first, second = int(0.70 * train.height), int(0.85 * train.height)
        everything = train
        parts = {
            "train": train[order[:first]],
            "validate": train[order[first:second]],
            "test": train[order[second:]],
        }
        protocol = f"random 70/15/15 split of {train_file.name}"
    names = PAIRS[pair]
    hidden = {column for name in names for column in SOURCES[name]} | set(DROPPED)
    inputs = [
        c for c in train.columns if c not in hidden and c not in ("income_50k", "never_married")
    ]
    inputs = [c for c in inputs if c != "college"]
    numbers = [c for c in inputs if c in CENSUS_NUMBERS]
    features = Features(
        entities=[],
        numerics=numbers,
        categoricals=[Categorical(column=c) for c in inputs if c not in numbers],
    )
    encoder = Encoder.fit(features, numbers, parts["train"])
    both = everything.select(names).to_numpy().astype(np.float64)
    return Split(
        pair=pair,
        protocol=protocol,
        correlation=abs(float(np.corrcoef(both.T)[0, 1])),
        tasks=[Task(name, "binary") for name in names],
        encoder=encoder,
        frames=parts,
        examples={
            part: encode_examples(encoder, frame, list(names)) for part, frame in parts.items()
        },
    )


def _with_tasks(frame: pl.DataFrame) -> pl.DataFrame:
    college = pl.any_horizontal(pl.col("education").str.starts_with(degree) for degree in COLLEGE)
    return frame.with_columns(college.cast(pl.Int8).alias("college"))


def equal_size(split: Split, preset: str, parameters: int) -> dict[str, Any]:
    """The preset's settings whose number of parameters beyond the embeddings is nearest.

    Embeddings are left out, as all models have the same inputs; `single_task` has embeddings for
    each task, and so more in total. Tensor factorisation, whose rank is bounded, stays smaller.
    """
    sizes: dict[int, int] = {}
    settings: dict[int, dict[str, Any]] = {}
    for units in range(4, 200):
        hidden = [units, max(2, units // 2)] if preset == "cross_stitch" else [units]
        chosen: dict[str, Any] = {"preset": preset, "expert_hidden": hidden, "tower_hidden": [8]}
        if preset in ("omoe", "mmoe"):
            chosen["experts"] = 8
        model = build_ranker(make(preset, chosen, len(split.tasks)), split.encoder, split.tasks)
        sizes[units] = model.parameter_count() - model.embedding.table.weight.numel()
        settings[units] = chosen
    nearest = min(sizes, key=lambda units: abs(sizes[units] - parameters))
    return settings[nearest]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """One model after tuning: its settings, and the test predictions of each seed [N, T]."""

    name: str
    settings: dict[str, Any]
    training: Training
    parameters: int
    validate_auc: float
    predictions: list[np.ndarray]
    seconds: float

    def aucs(self, labels: np.ndarray) -> np.ndarray:
        """AUC of each seed and task: [S, T]."""
        tasks = range(labels.shape[1])
        return np.array([[auc(labels[:, t], p[:, t]) for t in tasks] for p in self.predictions])


@dataclass(frozen=True)
class Candidate:
    """A ranker before its search.

    Attributes:
        settings: of the model, that are not searched.
        members: numbers of members to choose from.
    """

    name: str
    settings: Mapping[str, Any]
    members: tuple[int, ...] = (1,)


RANKER_SPACE = Space(
    {
        "batch_size": (512, 1024, 2048),
        "learning_rate": Uniform(1e-3, 1e-2, log=True),
        "weight_decay": Uniform(1e-4, 0.3, log=True),
        "dropout": Uniform(0.0, 0.4),
        "embedding_dim": (4, 8, 16),
    },
    first={
        "batch_size": 2048,
        "learning_rate": 5e-3,
        "weight_decay": 1e-4,
        "dropout": 0.1,
        "embedding_dim": 8,
    },
)
OF_TRAINING = ("batch_size", "learning_rate", "weight_decay")

LIGHTGBM = Boosting(
    Space(
        {
            "learning_rate": Uniform(0.02, 0.2, log=True),
            "num_leaves": Uniform(7, 127, log=True),
            "min_data_in_leaf": Uniform(5, 200, log=True),
            "feature_fraction": Uniform(0.3, 1.0),
            "bagging_fraction": Uniform(0.5, 1.0),
            "lambda_l2": Uniform(1e-3, 30.0, log=True),
            "cat_smooth": Uniform(1.0, 100.0, log=True),
        },
        first={
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 20,
            "feature_fraction": 0.9,
            "bagging_fraction": 0.9,
            "lambda_l2": 1e-3,
            "cat_smooth": 10.0,
        },
    ),
    patience=50,
)


def tune_ranker(
    split: Split,
    candidate: Candidate,
    budget: Budget,
    on_training: Callable[[str], None] | None = None,
) -> Tuned:
    """Choose rates and sizes by mean validation AUC (the first trial is the default), then train
    the best again from every seed.
    """
    name, tell = candidate.name, on_training or (lambda words: None)
    train, validate = split.examples["train"], split.examples["validate"]
    began = time.perf_counter()

    def settings_of(found: Mapping[str, Any]) -> tuple[Training, dict[str, Any]]:
        training = Training(
            epochs=budget.epochs, patience=3, **{key: found[key] for key in OF_TRAINING}
        )
        own = {key: value for key, value in found.items() if key not in OF_TRAINING}
        return training, {**candidate.settings, **own}

    def fit(training: Training, settings: dict[str, Any], seed: int) -> Ranker:
        spec = make(name, settings, len(split.tasks))
        design = Design(spec, split.encoder, split.tasks)
        return train_ranker(design, Rows(train, validate), training, seed).model

    def mean_auc(found: dict[str, Any], number: int) -> float:
        predicted = predict(fit(*settings_of(found), seed=SEED), validate, split.tasks)
        tell(f"{name}, trial {number + 1} of {budget.trials}")
        labels = validate.labels.numpy()
        return float(np.mean([auc(labels[:, t], predicted[:, t]) for t in range(labels.shape[1])]))

    more = {"members": candidate.members} if len(candidate.members) > 1 else {}
    space = replace(RANKER_SPACE, parameters={**RANKER_SPACE.parameters, **more})
    best = search(space, mean_auc, budget.trials)
    training, settings = settings_of(best.parameters)
    predictions, parameters = [], 0
    for seed in budget.seeds:
        model = fit(training, settings, seed)
        parameters = model.parameter_count()
        predictions.append(predict(model, split.examples["test"], split.tasks))
        tell(f"{name}, seed {seed}")
    return Tuned(
        name=name,
        settings=settings,
        training=training,
        parameters=parameters,
        validate_auc=best.value,
        predictions=predictions,
        seconds=time.perf_counter() - began,
    )


def tune_trees(
    split: Split, budget: Budget, on_training: Callable[[str], None] | None = None
) -> Tuned:
    """LightGBM, one model per task, each with the same number of trials and early stopping."""
    found = tune_lightgbm(split.tasks, split.examples, LIGHTGBM, budget, on_training)
    return Tuned(
        name="LightGBM",
        settings=found.settings,
        training=Training(),
        parameters=0,
        validate_auc=float(np.mean(found.validate_quality)),
        predictions=found.predictions,
        seconds=found.seconds,
    )


def with_trees(split: Split, tuned: Tuned, seeds: Sequence[int], most: int = 600) -> Tuned:
    """The ranker averaged with boosted trees, as a night does it (training/boosting.py)."""
    began = time.perf_counter()
    parts = split.examples
    test = tree_numbers(parts["test"].categorical, parts["test"].numeric)
    predictions = []
    for seed, prediction in zip(seeds, tuned.predictions, strict=True):
        trees = [most] * len(split.tasks)
        forest = fit_forest(split.tasks, parts["train"], trees, seed, parts["validate"])
        predictions.append(average(torch.from_numpy(prediction), forest(test)).numpy())
    seconds = tuned.seconds + time.perf_counter() - began
    return replace(tuned, name=f"{tuned.name}, trees", predictions=predictions, seconds=seconds)


def averaged(tuned: Tuned) -> Tuned:
    """The mean of all seeds' predictions as one model."""
    mean = np.mean(tuned.predictions, 0)
    name = f"{tuned.name}, mean of {len(tuned.predictions)}"
    parameters = tuned.parameters * len(tuned.predictions)
    return replace(tuned, name=name, predictions=[mean], parameters=parameters)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model in a table: best and mean AUC per task over seeds, with intervals of the mean."""

    name: str
    best: list[float]
    mean: list[Interval]
    parameters: int
    validate_auc: float
    seconds: float


def compare(
    split: Split, models: Sequence[Tuned], reference: str
) -> tuple[list[Row], list[SharingGain]]:
    """Rows of the table, and each model's gain over `reference`."""
    labels = split.examples["test"].labels.numpy()
    each_row = Clusters.of(np.arange(len(labels)))
    of_task = [LabelledRows.of("binary", column, each_row) for column in labels.T]
    rows, qualities = [], {}
    for model in models:
        for t, task in enumerate(split.tasks):
            predictions = [p[:, t] for p in model.predictions]
            qualities[model.name, task.name] = model_quality(of_task[t], predictions)
        means = [qualities[model.name, task.name].interval() for task in split.tasks]
        best = model.aucs(labels).max(0).tolist()
        rows.append(
            Row(
                name=model.name,
                best=best,
                mean=means,
                parameters=model.parameters,
                validate_auc=model.validate_auc,
                seconds=model.seconds,
            )
        )
    return rows, sharing_gains(qualities, reference, 0.95)
