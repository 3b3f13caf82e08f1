"""A ranker as one `torch.export` program: network, trees, calibration and blend.

The program reads encoded rows (`Encoder.transform`); the encoder's vocabularies are written beside
it as JSON. Any number of rows is allowed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.models.objectives import predictions
from mtl_ranker.models.trees import averaged, tree_numbers
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.blend import factors
from mtl_ranker.ranking.calibration import TINY, Map
from mtl_ranker.training.batches import encoded_tensors

FILE = "program.pt2"
CONTENT = "program.json"
TOLERANCE = 1e-5


class CalibrationMap(nn.Module):
    """`Map` in torch: predictions [B] → calibrated predictions [B], in float64."""

    x: Tensor
    y: Tensor

    def __init__(self, points: Map) -> None:
        super().__init__()
        self.straight, self.scale, self.top = points.straight, points.scale, points.top
        self.register_buffer("x", torch.tensor(points.x, dtype=torch.float64))
        self.register_buffer("y", torch.tensor(points.y, dtype=torch.float64))

    def forward(self, prediction: Tensor) -> Tensor:
        p = prediction.double()
        if self.scale == "log_odds":
            p = (p / self.top).clamp(TINY, 1 - TINY)
            z = p.log() - torch.log1p(-p)
        elif self.scale == "log1p":
            z = p.clamp(min=0.0).log1p()
        else:
            z = p.clamp(min=TINY).log() if self.scale == "log" else p
        z = self._mapped(z)
        if self.scale == "log_odds":
            return self.top * z.sigmoid()
        if self.scale == "log1p":
            return z.expm1().clamp(min=0.0)
        return z.exp() if self.scale == "log" else z

    def _mapped(self, z: Tensor) -> Tensor:
        x, y = self.x, self.y
        if self.straight:
            return y[0] + (y[1] - y[0]) / (x[1] - x[0]) * (z - x[0])
        if len(x) == 1:
            return y.expand_as(z)
        z = torch.minimum(torch.maximum(z, x[0]), x[-1])
        right = torch.searchsorted(x, z).clamp(1, len(x) - 1)
        left = right - 1
        slope = (y[right] - y[left]) / (x[right] - x[left])
        return y[left] + slope * (z - x[left])


class ScoringProgram(nn.Module):
    """From encoded rows to calibrated predictions and the score, as `RankerArtifact.predict`.

    Shape: categorical [B, C], bags [B, S] and surface [B] integers, numeric [B, F], NaN where
    missing → [B, T + 1] float64, the objectives and the score. A surface is its number in
    `surfaces`, from 1; 0 for others.
    """

    def __init__(self, artifact: RankerArtifact) -> None:
        super().__init__()
        calibration, project = artifact.calibration, artifact.project
        self.model, self.trees, self.share = artifact.model, artifact.trees, artifact.tree_share
        self.tasks = list(artifact.tasks)
        self.names = [task.name for task in self.tasks]
        self.surfaces = sorted({s for maps in calibration.surfaces.values() for s in maps})
        self.maps = nn.ModuleDict(
            {
                f"{t}": CalibrationMap(calibration.everywhere[name])
                for t, name in self._calibrated(artifact)
            }
        )
        self.surface_maps = nn.ModuleDict(
            {
                f"{t} {self.surfaces.index(surface) + 1}": CalibrationMap(points)
                for t, name in self._calibrated(artifact)
                for surface, points in calibration.surfaces.get(name, {}).items()
            }
        )
        self.parents = {
            t: self.names.index(calibration.conditional_on[name])
            for t, name in enumerate(self.names)
            if name in calibration.conditional_on
        }
        self.how, multiplied = project.scoring.blend, factors(project)
        self.blended = [
            (weight, [self.names.index(n) for n in (name, *multiplied[name])])
            for name, weight in project.blend_weights.items()
        ]

    def _calibrated(self, artifact: RankerArtifact) -> list[tuple[int, str]]:
        known = artifact.calibration.everywhere
        return [(t, name) for t, name in enumerate(self.names) if name in known]

    def forward(
        self, categorical: Tensor, bags: Tensor, numeric: Tensor, surface: Tensor
    ) -> Tensor:
        logits = self.model(categorical, bags, numeric)
        predicted = predictions(logits, self.tasks, self.model.cutpoints)
        if self.trees is not None:
            own = numeric[:, : self.model.embedding.numerics.features]  # without vectors
            forest = self.trees(tree_numbers(categorical, own))
            predicted = averaged(predicted, forest, self.share)
        columns = [self._calibrate(t, predicted[:, t], surface) for t in range(len(self.names))]
        clipped = []
        for t, column in enumerate(columns):
            parent = t
            while parent in self.parents:
                parent = self.parents[parent]
                column = torch.minimum(column, columns[parent])
            clipped.append(column)
        values = [(w, torch.stack([clipped[i] for i in own]).prod(0)) for w, own in self.blended]
        if self.how == "weighted_sum":
            score = torch.stack([w * value for w, value in values]).sum(0)
        else:
            score = torch.stack([w * v.clamp(min=1e-9).log() for w, v in values]).sum(0).exp()
        return torch.stack([*clipped, score], 1)

    def _calibrate(self, t: int, prediction: Tensor, surface: Tensor) -> Tensor:
        if f"{t}" not in self.maps:
            return prediction.double()
        value = self.maps[f"{t}"](prediction)
        for number in range(1, len(self.surfaces) + 1):
            key = f"{t} {number}"
            if key in self.surface_maps:
                value = torch.where(surface == number, self.surface_maps[key](prediction), value)
        return value


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
Run = Callable[[Inputs], np.ndarray]  # a program as it was read again: inputs → [N, T + 1]
NAMES = ("categorical", "bags", "numeric", "surface")


def program_inputs(artifact: RankerArtifact, surfaces: Sequence[str], rows: pl.DataFrame) -> Inputs:
    """N feature rows as the program's inputs."""
    by = artifact.calibration.by
    surface = torch.zeros(rows.height, dtype=torch.long)
    if by is not None and by in rows.columns:
        text = rows[by].cast(pl.String)
        for number, value in enumerate(surfaces, 1):
            surface[torch.from_numpy((text == value).fill_null(False).to_numpy())] = number
    return *encoded_tensors(artifact.encoder.transform(rows)), surface


class Traced(NamedTuple):
    """A ranker as a program, and the inputs that it was traced with."""

    module: ScoringProgram
    program: ExportedProgram
    inputs: Inputs


def trace(artifact: RankerArtifact, rows: pl.DataFrame) -> Traced:
    """The program of a ranker for any number of rows.

    Args:
        rows: at least two feature rows.
    """
    module = ScoringProgram(artifact).eval()
    inputs = program_inputs(artifact, module.surfaces, rows)
    batch = Dim("rows", min=1)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=({0: batch},) * len(inputs))
    return Traced(module, program, inputs)


def save_description(artifact: RankerArtifact, traced: Traced, folder: Path) -> None:
    """Write the encoder, and the program's inputs, outputs and surfaces, into a folder."""
    artifact.encoder.save(folder / "encoder.json")
    content = {
        "inputs": {
            name: {"dtype": str(tensor.dtype), "shape": ["rows", *tensor.shape[1:]]}
            for name, tensor in zip(NAMES, traced.inputs, strict=True)
        },
        "outputs": [*traced.module.names, "score"],
        "surface": {"column": artifact.calibration.by, "values": traced.module.surfaces},
    }
    (folder / CONTENT).write_text(json.dumps(content, indent=1), "utf-8")


def load_program(folder: Path) -> Run:
    """The program that `export_program` wrote."""
    program = torch.export.load(folder / FILE).module()
    return lambda inputs: program(*inputs).detach().numpy()


def export_program(artifact: RankerArtifact, rows: pl.DataFrame, folder: Path) -> float:
    """Write the program, its description and the encoder; returns the largest difference.

    Raises ProjectError as `checked` does.

    Args:
        rows: at least two feature rows.
        folder: an existing one.
    """
    traced = trace(artifact, rows)
    torch.export.save(traced.program, folder / FILE)
    save_description(artifact, traced, folder)
    return checked(load_program(folder), artifact, rows, traced.inputs)


def checked(run: Run, artifact: RankerArtifact, rows: pl.DataFrame, inputs: Inputs) -> float:
    """The largest difference of a program from `RankerArtifact.predict`, for all rows and for one.

    Differences are relative above 1. Raises ProjectError where one is above `TOLERANCE`.

    Args:
        inputs: of these rows.
    """
    worst = 0.0
    for part in (rows, rows.head(1)):
        expected = artifact.predict(part).cast(pl.Float64).to_numpy()
        categorical, bags, numeric, surface = (tensor[: part.height] for tensor in inputs)
        found = run((categorical, bags, numeric, surface))
        difference = float((np.abs(found - expected) / np.maximum(1.0, np.abs(expected))).max())
        if not difference <= TOLERANCE:
            raise ProjectError(
                f"the exported program's predictions differ by up to {difference:.2g} from the "
                f"model's; allowed: {TOLERANCE:g}"
            )
        worst = max(worst, difference)
    return worst


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a request: median and 99th percentile."""

    p50: float
    p99: float

    @classmethod
    def of(cls, request: Callable[[], object], times: int) -> Latency:
        """Measure `times` requests, after a tenth of them to warm up."""
        seconds = []
        for number in range(times + times // 10):
            start = time.perf_counter()
            request()
            if number >= times // 10:
                seconds.append(time.perf_counter() - start)
        low, high = np.quantile(seconds, [0.5, 0.99])
        return cls(1e3 * float(low), 1e3 * float(high))


def latencies(
    artifact: RankerArtifact, rows: pl.DataFrame, run: Run, times: int = 200
) -> Mapping[str, Latency]:
    """The latency of one request of N rows: of a program, and of the ranker's own prediction.

    Args:
        rows: such as one user's 500 candidates with features.
        run: of `load_program` or `onnx_model.load_onnx`.
    """
    surfaces = ScoringProgram(artifact).surfaces
    encoded = program_inputs(artifact, surfaces, rows)
    with torch.inference_mode(), fast_matmul():
        return {
            "program, encoded rows": Latency.of(lambda: run(encoded), times),
            "program, feature rows": Latency.of(
                lambda: run(program_inputs(artifact, surfaces, rows)), times
            ),
            "model, feature rows": Latency.of(lambda: artifact.predict(rows), times),
        }
