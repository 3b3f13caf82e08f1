"""Knowledge distillation: labels of training rows mixed with probabilities of boosted trees.

A network of soft labels learns part of what boosted trees know, and costs no more at scoring than
one of true labels (Hinton et al., arXiv 1503.02531; docs/decisions/0018). The trees are
cross-fitted: those that predict a row were fitted on rows of other users. Only trainings of
networks read these labels; whatever is judged, calibrated or stopped by reads true ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import torch
from torch import Tensor

from mtl_ranker.models.objectives import Task
from mtl_ranker.models.trees import Forest, tree_numbers
from mtl_ranker.training.batches import Examples, take
from mtl_ranker.training.boosting import fit_forest

FOLDS = 4
MOST_TREES = 200  # of an objective; how many are kept is chosen on the fold's own rows
MOST_ROWS = 1_000_000  # that a fold's trees are fitted on
PREDICTED_ROWS = 1_024  # at a time: see `TREES_AT_A_TIME`


@dataclass(frozen=True)
class Teacher:
    """Boosted trees whose probabilities are mixed into the labels.

    Attributes:
        share: s of the probability in a label, y := (1 − s) y + s p.
        forests: of each fold of users, fitted on rows of the other folds.
    """

    share: float
    forests: Sequence[Forest]

    def taught(self, rows: Examples, frame: pl.DataFrame) -> Examples:
        """The rows with the labels that a network is trained on.

        Missing labels stay missing, and labels of objectives without trees as they are.

        Args:
            frame: the same rows, raw.
        """
        labels, fold = rows.labels.clone(), folds_of(frame["user_id"])
        for number, forest in enumerate(self.forests):
            for chosen in torch.from_numpy(np.flatnonzero(fold == number)).split(PREDICTED_ROWS):
                labels[chosen] = self._mixed(forest, take(rows, chosen))
        return replace(rows, labels=labels)

    def _mixed(self, forest: Forest, rows: Examples) -> Tensor:
        p = torch.sigmoid(forest(tree_numbers(rows.categorical, rows.numeric)))
        return torch.where(p.isnan(), rows.labels, (1 - self.share) * rows.labels + self.share * p)


def folds_of(users: pl.Series) -> np.ndarray:
    """The fold of each row's user: [N], the same on every host."""
    ids = users.unique()
    fold = [zlib.crc32(str(user).encode()) % FOLDS for user in ids]
    return users.replace_strict(ids, fold, return_dtype=pl.Int64).to_numpy()


def fit_teacher(
    tasks: Sequence[Task], rows: Examples, frame: pl.DataFrame, share: float
) -> Teacher | None:
    """The teacher of these rows; None with a share of 0.

    Args:
        rows: with true labels.
        frame: the same rows, raw.
    """
    if share == 0:
        return None
    fold, forests = folds_of(frame["user_id"]), []
    for number in range(FOLDS):
        own, others = (
            take(rows, torch.from_numpy(np.flatnonzero(chosen))).sample(MOST_ROWS)
            for chosen in (fold == number, fold != number)
        )
        forests.append(fit_forest(tasks, others, [MOST_TREES] * len(tasks), 0, own))
    return Teacher(share, forests)
