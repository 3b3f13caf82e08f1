"""Two regression tasks of chosen correlation (Ma et al., KDD 2018, section 3.2), and who learns
them: shared bottom, OMoE and MMoE of equal size over many random starts (section 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear, RowInput
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.training.replicas import AdamSettings, Chunk, train_replicas

MODELS = ("shared_bottom", "omoe", "mmoe")
EXPERTS, UNITS, TOWER = 8, 16, 8  # section 5.2: eight experts of 16 units, towers of 8
CHUNK = 20
TRAIN, HELD_OUT = 1_000_003, 2_000_003  # keep the streams of rows apart from those of tasks


@dataclass(frozen=True)
class Tasks:
    """How the data are made.

    Attributes:
        correlation: p, the cosine between the two tasks' weights.
        dimension: d of the input x ~ N(0, I).
        scale: c, the length of each weight vector.
        sines: m; y = wᵀx + Σ_i sin(α_i wᵀx + β_i) + ε, with α_i = i and β_i drawn.
        noise: standard deviation of ε.
    """

    correlation: float
    dimension: int = 100
    scale: float = 1.0
    sines: int = 3
    noise: float = 0.01

    def weights(self, generator: torch.Generator) -> Tensor:
        """w_1 = c u_1, w_2 = c (p u_1 + sqrt(1 − p²) u_2) with orthonormal u: [2, d] (eq. 2)."""
        u = torch.linalg.qr(torch.randn(self.dimension, 2, generator=generator)).Q.t()
        p = self.correlation
        return self.scale * torch.stack([u[0], p * u[0] + math.sqrt(1 - p * p) * u[1]])

    def chunks(self, seed: int, batch: int, held_out: bool = False) -> Iterator[Chunk]:
        """A seed's own tasks and endless rows of them, each used once: [S, B, d], [S, B, 2].

        Held-out rows are of the same tasks, drawn from a stream of their own.
        """
        generator = torch.Generator().manual_seed(seed)
        weights = self.weights(generator)
        alpha = torch.arange(1, self.sines + 1, dtype=torch.float32)
        beta = torch.rand(self.sines, generator=generator) * 2 * math.pi
        generator.manual_seed(seed + (HELD_OUT if held_out else TRAIN))
        while True:
            x = torch.randn(CHUNK, batch, self.dimension, generator=generator)
            z = x @ weights.t()
            y = z + torch.sin(z.unsqueeze(-1) * alpha + beta).sum(-1)
            yield x, y + self.noise * torch.randn(y.shape, generator=generator)


class FromNumbers(nn.Module):
    """A ranker without its embedding: [B, d] → [B, T]."""

    def __init__(self, ranker: Ranker) -> None:
        super().__init__()
        self.layers, self.towers = ranker.layers, ranker.towers

    def forward(self, x: Tensor) -> Tensor:
        row = RowInput(x[:, :0], x)
        h: RowInput | Tensor = row
        for layer in self.layers:
            h = layer(h, row).outputs
        return self.towers(h)[0]


def build_model(preset: str, units: int, dimension: int = 100) -> FromNumbers:
    """A model of section 5.2 on d numbers; `units` of the bottom, or of each of eight experts."""
    settings = {"preset": preset, "expert_hidden": [units], "tower_hidden": [TOWER], "dropout": 0.0}
    if preset in ("omoe", "mmoe"):
        settings["experts"] = EXPERTS
    numbers = PiecewiseLinear([[0.0, 1.0]] * dimension, [False] * dimension, standardise=True)
    embedding = FeatureEmbedding([], [], numbers, width=1)
    return FromNumbers(Ranker(make(preset, settings, 2), embedding))


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def equal_units(dimension: int = 100) -> dict[str, int]:
    """Units that bring every model as near as possible to the size of MMoE's 8 experts of 16."""
    target = parameter_count(build_model("mmoe", UNITS, dimension))
    found = {}
    for preset in MODELS:
        sizes = {u: parameter_count(build_model(preset, u, dimension)) for u in range(8, 160)}
        found[preset] = min(sizes, key=lambda u: abs(sizes[u] - target))
    return found


@dataclass(frozen=True, kw_only=True)
class Found:
    """Final losses: `losses[model, correlation]` is [starts, 2], on rows not trained on."""

    losses: dict[tuple[str, float], np.ndarray]
    parameters: dict[str, int]
    correlations: list[float]
    label_correlation: dict[float, float]

    def mean(self, model: str, correlation: float) -> np.ndarray:
        """Mean loss of the two tasks for each start: [starts]."""
        return self.losses[model, correlation].mean(1)


@dataclass(frozen=True)
class Starts:
    """How many random starts of every model there are, and how each is trained.

    Attributes:
        test_rows: on which a start's final loss is measured.
        together: replicas trained at once; more need more memory.
    """

    count: int
    steps: int
    batch: int = 64
    learning_rate: float = 3e-3
    test_rows: int = 2_000
    together: int = 200


def run_starts(
    correlations: Sequence[float],
    starts: Starts,
    models: Sequence[str] = MODELS,
    on_progress: Callable[[str, int], None] | None = None,
) -> Found:
    """Every model × correlation from random starts, each with data of its own.

    Start s has the same tasks and rows for every model, so that models compare in pairs.
    `on_progress` is called with what is trained and how many of its replica-steps were just done.
    """
    units = equal_units()
    losses: dict[tuple[str, float], np.ndarray] = {}
    agreement: dict[float, float] = {}
    for correlation in correlations:
        tasks = Tasks(correlation)
        ends: dict[str, list[Tensor]] = {model: [] for model in models}
        drawn: list[float] = []
        for first in range(0, starts.count, starts.together):
            seeds = range(first, min(first + starts.together, starts.count))
            x, y = held_out(tasks, seeds, starts.test_rows)
            drawn += [float(np.corrcoef(rows.T)[0, 1]) for rows in y.numpy()]
            for model in models:
                name = f"{model}, correlation {correlation:g}"
                report = partial(on_progress, name) if on_progress is not None else None
                replicas = train_replicas(
                    partial(build_model, model, units[model]),
                    partial(tasks.chunks, batch=starts.batch),
                    seeds,
                    AdamSettings(starts.steps, starts.learning_rate),
                    report,
                )
                ends[model].append(replicas.losses(x, y))
        agreement[correlation] = float(np.mean(drawn))
        losses |= {(model, correlation): torch.cat(ends[model]).numpy() for model in models}
    sizes = {model: parameter_count(build_model(model, units[model])) for model in models}
    return Found(
        losses=losses,
        parameters=sizes,
        correlations=list(correlations),
        label_correlation=agreement,
    )


def held_out(tasks: Tasks, seeds: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Fresh rows of each seed's own tasks: [R, rows, d] and [R, rows, 2]."""
    found = []
    for seed in seeds:
        x, y = next(tasks.chunks(seed, rows // CHUNK, held_out=True))
        found.append((x.flatten(0, 1), y.flatten(0, 1)))
    return torch.stack([x for x, _ in found]), torch.stack([y for _, y in found])
