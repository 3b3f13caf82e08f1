"""LightGBM as the baseline of a multi-task ranker: one model per binary objective, tuned by
validation AUC, or NDCG@10 by list, with early stopping.

lightgbm and optuna are optional: `pip install 'mtl_ranker[studies]'`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mtl_ranker.models.objectives import Task
from mtl_ranker.studies.search import SEED, Budget, Space, search
from mtl_ranker.training.batches import Examples

# A hyperparameter of the search that LightGBM does not have: how codes of categories are read.
CATEGORICAL = "categorical"
NATIVE, ORDINAL = "categorical", "ordinal"

# Burges et al., NIPS 2006 (LambdaRank), and Bruch, WSDM 2021 (cross-entropy NDCG).
RANKING = ("lambdarank", "rank_xendcg")
RANKS = 10  # of NDCG


@dataclass(frozen=True)
class Boosting:
    """How a LightGBM is searched and trained.

    Attributes:
        space: LightGBM's own parameters; `categorical`, if searched, is whether codes of
            categories are split as sets ("categorical", the default) or by order ("ordinal").
        patience: rounds without a better validation AUC after which a training stops.
        objective: binary, or one that ranks within lists (`RANKING`), whose scores are no
            probabilities.
        rounds: of boosting, at most.
        refit: whether to train again on training and validation rows, for the best number of
            rounds.
    """

    space: Space
    patience: int
    rounds: int = 2_000
    refit: bool = False
    objective: str = "binary"

    @property
    def ranking(self) -> bool:
        return self.objective in RANKING

    @property
    def metric(self) -> str:
        """LightGBM's name of what is monitored."""
        return f"ndcg@{RANKS}" if self.ranking else "auc"


@dataclass(frozen=True, kw_only=True)
class TunedTrees:
    """LightGBM after the search.

    Attributes:
        settings: the best hyperparameters, objective → parameter → value.
        validate_quality: the best of the search, for each objective: AUC or NDCG@10.
        predictions: of the test rows [N, T], for each seed.
        refit: the same of models trained on training and validation rows; empty without refit.
        seconds: of the search and of the trainings with early stopping.
        refit_seconds: of the trainings on both parts.
    """

    settings: dict[str, dict[str, Any]]
    validate_quality: list[float]
    predictions: list[np.ndarray]
    refit: list[np.ndarray]
    seconds: float
    refit_seconds: float


def tune_lightgbm(
    tasks: Sequence[Task],
    examples: Mapping[str, Examples],
    boosting: Boosting,
    budget: Budget,
    on_training: Callable[[str], None] | None = None,
) -> TunedTrees:
    """Search each objective's hyperparameters, then train the best with every seed.

    Args:
        examples: train, validate and test, with lists for a ranking objective. The test rows are
            only predicted.
        on_training: called with a description of each training but a refit, when it ends.
    """
    tell = on_training or (lambda words: None)
    began, refit_seconds = time.perf_counter(), 0.0
    rows = {part: tree_inputs(own) for part, own in examples.items()}
    shape = examples["test"].labels.shape
    predictions = [np.zeros(shape, np.float32) for _ in budget.seeds]
    again = [np.zeros(shape, np.float32) for _ in budget.seeds if boosting.refit]
    settings: dict[str, dict[str, Any]] = {}
    validate_quality = []
    for t, task in enumerate(tasks):
        labels = {part: own.labels[:, t].numpy() for part, own in examples.items()}
        lists = None if not boosting.ranking else {p: _lists(own) for p, own in examples.items()}
        trainer = _Trainer(boosting, rows, labels, examples["train"].categorical.shape[1], lists)

        def quality(
            parameters: dict[str, Any],
            number: int,
            trainer: _Trainer = trainer,
            name: str = task.name,
        ) -> float:
            found = trainer.stopped(parameters, SEED)
            tell(f"LightGBM {name}, trial {number + 1} of {budget.trials}")
            return float(found.best_score["valid_0"][boosting.metric])

        best = search(boosting.space, quality, budget.trials)
        settings[task.name] = best.parameters
        validate_quality.append(best.value)
        for number, seed in enumerate(budget.seeds):
            found = trainer.stopped(best.parameters, seed)
            predictions[number][:, t] = found.predict(rows["test"])
            tell(f"LightGBM {task.name}, seed {seed}")
            if boosting.refit:
                started = time.perf_counter()
                whole = trainer.refit(best.parameters, seed, max(found.best_iteration, 1))
                again[number][:, t] = whole.predict(rows["test"])
                refit_seconds += time.perf_counter() - started
    return TunedTrees(
        settings=settings,
        validate_quality=validate_quality,
        predictions=predictions,
        refit=again,
        seconds=time.perf_counter() - began - refit_seconds,
        refit_seconds=refit_seconds,
    )


@dataclass(frozen=True)
class _Trainer:
    """Trains LightGBM on one objective's rows, by part: train, validate, test.

    Attributes:
        categoricals: how many of the first columns are codes of categories.
        lists: the list of each row, by part; None for an objective that does not rank.
    """

    boosting: Boosting
    rows: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    categoricals: int
    lists: Mapping[str, np.ndarray] | None = None

    def stopped(self, parameters: Mapping[str, Any], seed: int) -> Any:
        """A model of the training rows, stopped early on the validation rows."""
        import lightgbm

        return lightgbm.train(
            self._parameters(parameters, seed),
            self._dataset(parameters, "train"),
            num_boost_round=self.boosting.rounds,
            valid_sets=[self._dataset(parameters, "validate")],
            callbacks=[lightgbm.early_stopping(self.boosting.patience, verbose=False)],
        )

    def refit(self, parameters: Mapping[str, Any], seed: int, rounds: int) -> Any:
        """A model of training and validation rows together."""
        import lightgbm

        both = self._dataset(parameters, "train", "validate")
        return lightgbm.train(self._parameters(parameters, seed), both, num_boost_round=rounds)

    def _dataset(self, parameters: Mapping[str, Any], *parts: str) -> Any:
        import lightgbm

        native = parameters.get(CATEGORICAL, NATIVE) == NATIVE
        rows = np.concatenate([self.rows[part] for part in parts])
        labels = np.concatenate([self.labels[part] for part in parts])
        sizes = None
        if self.lists is not None:  # LightGBM reads a list as consecutive rows
            lists = np.concatenate([self.lists[part] for part in parts])
            order = np.argsort(lists, kind="stable")
            rows, labels = rows[order], labels[order]
            sizes = np.unique(lists, return_counts=True)[1]
        return lightgbm.Dataset(
            rows,
            labels,
            group=sizes,
            categorical_feature=list(range(self.categoricals)) if native else "auto",
            free_raw_data=False,
        )

    def _parameters(self, parameters: Mapping[str, Any], seed: int) -> dict[str, Any]:
        boosting = self.boosting
        common: dict[str, Any] = {"objective": boosting.objective}
        common |= {"metric": boosting.metric.partition("@")[0]}
        common |= {"verbosity": -1, "seed": seed, "deterministic": True}
        common |= {"num_threads": torch.get_num_threads(), "bagging_freq": 1}
        common |= {"eval_at": [RANKS]} if boosting.ranking else {}
        return common | {name: value for name, value in parameters.items() if name != CATEGORICAL}


def _lists(examples: Examples) -> np.ndarray:
    """The list of each row. Raises ValueError for rows without lists."""
    if examples.lists is None:
        raise ValueError("a ranking objective needs the list of each row")
    return examples.lists.numpy()


def tree_inputs(examples: Examples) -> np.ndarray:
    """Codes of categories, then numbers (NaN = missing): [N, F]."""
    return np.concatenate([examples.categorical.numpy(), examples.numeric.numpy()], 1)
