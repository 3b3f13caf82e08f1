"""A ranker saved as a folder: encoder, weights, architecture and project file, without pickle."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mtl_ranker.config import Project, parse_project
from mtl_ranker.context import Context
from mtl_ranker.errors import first_line
from mtl_ranker.features.encoders import Encoder, numeric_matrix
from mtl_ranker.features.vectors import load_vectors
from mtl_ranker.features.view import model_context
from mtl_ranker.models.matmul import in_blocks
from mtl_ranker.models.objectives import Task, predictions
from mtl_ranker.models.pairs import ITEM, PAIR, USER, Inputs, ItemSide, PairInput, Sides
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.models.trees import Forest, averaged, tree_numbers
from mtl_ranker.ranking.blend import BlendChoice, blend, blend_choice
from mtl_ranker.ranking.calibration import Calibration
from mtl_ranker.training.batches import Examples, encoded_rows, encoded_tensors, part_of
from mtl_ranker.training.network import build_ranker
from mtl_ranker.workspace import Workspace

LOG = logging.getLogger(__name__)

SIDES = ("user", "item", "pair")  # in the order of USER, ITEM and PAIR in models/pairs.py

SEED_METRICS = "seed_metrics.json"
BLEND = "blend.json"  # a blend that was chosen for the saved ranker, instead of its project's

TRAINING = "training"  # folder of what only a later training reads
BEFORE_REFIT = f"{TRAINING}/before_refit"
MOMENTS = f"{TRAINING}/moments.safetensors"


@dataclass(frozen=True)
class PairItems:
    """V items, encoded and embedded once, to be paired with users.

    Attributes:
        side: the items' embedded features.
        tree_columns: indices of the trees' input columns that belong to users, items and pairs.
        tree_numbers: the items' values of theirs [V, F_i].
    """

    side: ItemSide
    tree_columns: list[Tensor]
    tree_numbers: Tensor


@dataclass(frozen=True)
class RankerArtifact:
    """Everything that turns raw feature rows into predictions and one blended score.

    Attributes:
        trees: their predictions are averaged with the model's; None without trees.
        tree_share: weight of the trees in this average of log-odds; 1 for trees alone.
        sql: template name → text, by which its features were built; None in artifacts that were
            saved without it.
        seed_metrics: objective → metric → value on test days, for each of several trainings of
            this model with other seeds; their spread is the effect of a seed. Empty if one seed
            was trained.
        fixed: it was made without a random seed, as item popularity.
        last_day: the last day that its network was trained on; None if that is not known.
        moments: of the optimisers at the network's weights (training/warm_start.py), from which a
            later training may continue; empty in artifacts that were saved without them, and in
            those of `load`.
        before_refit: of a refit ranker the one that it was made from, if a later training may
            continue from that; None in those of `load`.
    """

    project: Project
    encoder: Encoder
    tasks: Sequence[Task]
    model: Ranker
    calibration: Calibration = field(default_factory=Calibration)
    trees: Forest | None = None
    tree_share: float = 0.5
    sql: Mapping[str, str] | None = None
    seed_metrics: Sequence[dict[str, dict[str, float]]] = ()
    fixed: bool = False
    last_day: date | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    before_refit: RankerArtifact | None = None

    @property
    def start(self) -> RankerArtifact | None:
        """What a later training continues from: it has moments; None if nothing has.

        That is the ranker before its refit, so that validation days are not trained on before they
        choose and calibrate.
        """
        found = self if self.before_refit is None else self.before_refit
        return found if found.moments else None

    @property
    def weights_digest(self) -> str:
        """A hash of the network's weights and of the optimisers' moments at them."""
        tensors = {**self.model.state_dict(), **self.moments}
        digest = blake2b(digest_size=16)
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].contiguous().numpy())
        return digest.hexdigest()

    def on(self, device: torch.device) -> RankerArtifact:
        """The same ranker with a copy of its network and trees on this device."""
        if device == self.model.device:
            return self
        trees = None if self.trees is None else deepcopy(self.trees).to(device)
        return replace(self, model=deepcopy(self.model).to(device), trees=trees)

    def with_blend(self, choice: BlendChoice) -> RankerArtifact:
        """The same ranker with another blend; objectives without a weight get weight 1."""
        update = {
            "blend": choice.how,
            "weights": dict(choice.weights),
            "conditional": list(choice.conditional),
        }
        scoring = self.project.scoring.model_copy(update=update)
        # A choice has the signs of its weights, not of the objectives.
        objectives = [
            o.model_copy(update={"good": o.good or choice.weights.get(o.name, 0.0) > 0})
            for o in self.project.objectives
        ]
        changed = {"scoring": scoring, "objectives": objectives}
        project = self.project.model_copy(update=changed)
        return replace(self, project=project)

    @property
    def columns(self) -> list[str]:
        """The raw feature columns that `predict` reads."""
        surface = [] if self.calibration.by is None else [self.calibration.by]
        return list(dict.fromkeys([*self.encoder.columns, *surface]))

    def save(self, folder: Path) -> Path:
        """Write encoder, calibration and architecture as JSON, the weights, and project.toml."""
        folder.mkdir(parents=True, exist_ok=True)
        self.encoder.save(folder / "encoder.json")
        self.calibration.save(folder / "calibration.json")
        weights = {k: v.contiguous() for k, v in self.model.state_dict().items()}
        save_file(weights, folder / "weights.safetensors")
        architecture = {
            "spec": asdict(self.model.spec),
            "tasks": [asdict(task) for task in self.tasks],
            "positions": self.model.positions,
            "fixed": self.fixed,
            "chained_blend": True,
            "last_day": None if self.last_day is None else str(self.last_day),
        }
        if self.trees is not None:
            save_file(self.trees.state_dict(), folder / "trees.safetensors")
            architecture["trees"] = {
                k: getattr(self.trees, k) for k in ("features", "trees", "depth")
            }
            architecture["tree_share"] = self.tree_share
        (folder / "model.json").write_text(json.dumps(architecture, indent=1), "utf-8")
        (folder / "project.toml").write_text(self.project.source_text, "utf-8")
        if self.sql is not None:
            (folder / "sql.json").write_text(json.dumps(dict(self.sql), indent=1), "utf-8")
        if self.seed_metrics:
            text = json.dumps(list(self.seed_metrics), indent=1)
            (folder / SEED_METRICS).write_text(text, "utf-8")
        if self.moments:
            (folder / TRAINING).mkdir(exist_ok=True)
            save_file({k: v.contiguous() for k, v in self.moments.items()}, folder / MOMENTS)
        if self.before_refit is not None:
            self.before_refit.save(folder / BEFORE_REFIT)
        return folder

    @classmethod
    def load(cls, folder: Path) -> RankerArtifact:
        """The ranker that `save` wrote, also by an earlier version of this package."""
        text = (folder / "project.toml").read_text("utf-8")
        project = parse_project(text, str(folder), rename=True)
        encoder = Encoder.load(folder / "encoder.json")
        architecture = _renamed(json.loads((folder / "model.json").read_text("utf-8")))
        tasks = [Task(**task) for task in architecture["tasks"]]
        spec = RankerSpec.from_dict(architecture["spec"])
        model = build_ranker(spec, encoder, tasks, architecture["positions"])
        model.load_state_dict(load_file(folder / "weights.safetensors"))
        model.eval()
        calibration = Calibration.load(folder / "calibration.json")
        trees = None
        if "trees" in architecture:
            trees = Forest(**architecture["trees"])
            trees.load_state_dict(load_file(folder / "trees.safetensors"))
            trees.eval()
        sql = folder / "sql.json"
        texts = json.loads(sql.read_text("utf-8")) if sql.is_file() else None
        seeds = folder / SEED_METRICS
        ranker = cls(
            project,
            encoder,
            tasks,
            model,
            calibration,
            trees=trees,
            tree_share=architecture.get("tree_share", 0.5),
            sql=texts,
            seed_metrics=json.loads(seeds.read_text("utf-8")) if seeds.is_file() else (),
            fixed=architecture.get("fixed", False),
            last_day=_date(architecture.get("last_day")),
        )
        if (folder / BLEND).is_file():
            chosen = json.loads((folder / BLEND).read_text("utf-8"))
            return ranker.with_blend(blend_choice(chosen, project))
        if architecture.get("chained_blend"):
            return ranker
        # An earlier version's blend had every objective as predicted given its condition.
        given = [o.name for o in project.objectives if o.where is not None]
        scoring = project.scoring
        return ranker.with_blend(BlendChoice(scoring.blend, project.blend_weights, given))

    @classmethod
    def load_start(cls, folder: Path) -> RankerArtifact | None:
        """The `start` of the ranker that `save` wrote; None if it has none that can be read."""
        before = folder / BEFORE_REFIT
        saved = before if before.is_dir() else folder
        if not (saved / MOMENTS).is_file():
            return None
        try:
            moments = load_file(saved / MOMENTS)
        except SafetensorError as error:
            LOG.warning("%s of the model is damaged (%s): not used", MOMENTS, first_line(error))
            return None
        return replace(cls.load(saved), moments=moments)

    def predict(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Calibrated predictions, a column per objective, and `score`, for N raw feature rows."""
        by = self.calibration.by
        surface = frame[by] if by in frame.columns else None
        return self._calibrated(self.uncalibrated(frame).to_numpy(), surface)

    @torch.inference_mode()
    def items_of_pairs(self, items: pl.DataFrame, side_of: Mapping[str, str]) -> PairItems:
        """Items encoded and embedded once for `predict_pairs` of many users.

        Args:
            items: V rows with the features of items; columns of other features may be missing.
            side_of: feature → "user", "item" or "pair".
        """
        names = [v.column for v in (*self.encoder.categoricals, *self.encoder.lists)]
        side_of = {**side_of, **{match.name: "pair" for match in self.encoder.matches}}
        contents = [content.column for content in self.encoder.contents]
        fields = [*names, *self.encoder.numerics, *contents]
        sides = [SIDES.index(side_of[name]) for name in fields]
        encoded = self._on_device(encoded_tensors(self.encoder.transform(self._padded(items))))
        side = ItemSide(self.model.embedding, encoded, sides)
        # The trees read numbers, then categories.
        column_sides = torch.tensor(
            [*sides[len(names) : len(fields) - len(contents)], *sides[: encoded[0].shape[1]]],
            device=self.model.device,
        )
        columns = [(column_sides == s).nonzero().squeeze(1) for s in (USER, ITEM, PAIR)]
        return PairItems(side, columns, self._tree_numbers(encoded).index_select(1, columns[ITEM]))

    @torch.inference_mode()
    def predict_pairs(
        self,
        users: pl.DataFrame,
        items: PairItems,
        pairs: pl.DataFrame,
        user: np.ndarray,
        item: np.ndarray,
    ) -> pl.DataFrame:
        """`predict` for N pairs of few users and items: the same values, several times faster.

        Args:
            users: U rows with the features of users; columns of other features may be missing.
            items: of `items_of_pairs`.
            pairs: N rows with the features of pairs, those of `encoder.matches` too, and the
                surface to calibrate by.
            user: [N], each pair's row in `users`.
            item: [N], each pair's row in `items`.
        """
        device = self.model.device
        encoded = self._on_device(encoded_tensors(self.encoder.transform(self._padded(users))))
        sides = Sides(items.side, encoded)
        pair_numerics = [self.encoder.numerics[n] for n in items.side.pair_numbers]
        # A frame without columns has no rows either.
        numbers = (
            torch.from_numpy(numeric_matrix(pairs, pair_numerics))
            if pair_numerics
            else torch.zeros(len(user), 0)
        )
        numbers = numbers.to(device)
        user_rows, item_rows = (
            torch.from_numpy(np.asarray(i, np.int64)).to(device) for i in (user, item)
        )
        user_numbers = self._tree_numbers(encoded).index_select(1, items.tree_columns[USER])
        order = torch.cat(items.tree_columns).argsort()

        def logits(rows: slice) -> Tensor:
            pair_input = PairInput(sides, user_rows[rows], item_rows[rows], numbers[rows])
            return self.model.trace_row(pair_input).logits

        def tree_inputs(rows: slice) -> Tensor:
            of_user = user_numbers.index_select(0, user_rows[rows])
            of_item = items.tree_numbers.index_select(0, item_rows[rows])
            return torch.cat([of_user, of_item, numbers[rows]], 1).index_select(1, order)

        values = self._predicted(logits, tree_inputs, len(user))
        by = self.calibration.by
        return self._calibrated(values, pairs[by] if by in pairs.columns else None)

    def uncalibrated(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Predictions of the network and the trees before calibration: a column per objective."""
        values = self.raw(encoded_rows(self.encoder.transform(frame)))
        return pl.DataFrame({task.name: values[:, t] for t, task in enumerate(self.tasks)})

    def network_counts(self, task: int) -> bool:
        """Whether the network has a share in the prediction of an objective."""
        return self.trees is None or self.tree_share < 1.0 or self.trees.trees[task] == 0

    @torch.inference_mode()
    def raw(self, examples: Examples) -> np.ndarray:
        """Predictions of encoded rows before calibration: [N, T]."""
        self.model.eval()
        device = self.model.device
        return self._predicted(
            lambda rows: self.model(*(t.to(device) for t in part_of(examples, rows).inputs)),
            lambda rows: tree_numbers(
                examples.categorical[rows].to(device), examples.numeric[rows].to(device)
            ),
            len(examples),
        )

    def with_vectors(self, workspace: Workspace, rows: pl.DataFrame) -> RankerArtifact:
        """The same ranker with the vectors that the keys in these examples name.

        Raises ProjectError as `load_vectors` does.
        """
        columns = [content.column for content in self.encoder.contents]
        keyed = [column for column in columns if rows.schema[column].is_integer()]
        if not keyed:
            return self
        tables = load_vectors(workspace, keyed, [rows.lazy()])
        return replace(self, encoder=replace(self.encoder, tables=tables))

    def predict_examples(self, workspace: Workspace, rows: pl.DataFrame) -> pl.DataFrame:
        """`predict` for examples, whose vectors are keys."""
        return self.with_vectors(workspace, rows).predict(rows)

    def _tree_numbers(self, inputs: Inputs) -> Tensor:
        """Inputs of the trees, which read no vectors."""
        return tree_numbers(inputs[0], inputs[2][:, : len(self.encoder.numerics)])

    def _on_device(self, inputs: Inputs) -> Inputs:
        """Encoded rows on the device of the network."""
        categorical, bags, numeric = (tensor.to(self.model.device) for tensor in inputs)
        return categorical, bags, numeric

    def _predicted(
        self,
        logits: Callable[[slice], Tensor],
        tree_inputs: Callable[[slice], Tensor],
        rows: int,
    ) -> np.ndarray:
        """Predictions [N, T] of `rows` rows, block by block."""

        def predict_block(block: slice) -> Tensor:
            network = predictions(logits(block), self.tasks, self.model.cutpoints)
            if self.trees is None:
                return network
            return averaged(network, self.trees(tree_inputs(block)), self.tree_share)

        blocks = in_blocks(predict_block, rows, self.model.block_rows, self.model.device)
        return torch.cat(blocks).cpu().numpy()

    def _calibrated(self, values: np.ndarray, surface: pl.Series | None) -> pl.DataFrame:
        names = [task.name for task in self.tasks]
        values = self.calibration.apply(names, values, surface)
        columns = {name: values[:, t] for t, name in enumerate(names)}
        return pl.DataFrame(columns).with_columns(blend(self.project).alias("score"))

    def _padded(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The frame with null columns for the encoder's columns that it lacks."""
        missing = [c for c in self.encoder.columns if c not in frame.columns]
        return frame.with_columns(pl.lit(None).alias(c) for c in missing)


def save_blend(folder: Path, choice: BlendChoice) -> None:
    """Write the blend that the ranker of this folder has when it is loaded."""
    (folder / BLEND).write_text(json.dumps(choice.content), "utf-8")


class RegisteredRanker(NamedTuple):
    """A ranker and its version in the model registry."""

    artifact: RankerArtifact
    version: str

    def context(self, context: Context) -> Context:
        """The context in which this model's features are built."""
        return model_context(context, self.artifact.project, self.artifact.sql)


def _date(text: str | None) -> date | None:
    return None if text is None else date.fromisoformat(text)


# Keys in `model.json` of earlier versions, whose models may still be in a registry.
RENAMED = {
    "after": "conditional_on",
    "apart": "unshared",
    "closeness": "l2_weight",
    "embedding_width": "embedding_dim",
}


def _renamed(value: Any) -> Any:
    """The same content with current keys."""
    if isinstance(value, dict):
        return {RENAMED.get(key, key): _renamed(inner) for key, inner in value.items()}
    return [_renamed(inner) for inner in value] if isinstance(value, list) else value
