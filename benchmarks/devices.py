"""Training steps and predictions of the preset's MMoE by number format, compiler and device.

float32 with torch's default kernels (MKL), and with `fast_matmul` (oneDNN where that is exact, see
models/matmul.py), which trainings use; bfloat16 (autocast) and `torch.compile` on the CPU; and,
where a CUDA device is found, float32, bfloat16, large batches and a CUDA graph of the whole step
there. What cannot run on a machine is listed as skipped. Losses after equal steps are beside the
rates.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.models.objectives import Task, losses
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker

TASKS = [Task("click", "binary"), Task("long_view", "binary"), Task("like", "binary")]
FIELDS, VOCABULARY, NUMBERS, BINS = 20, 500, 70, 10


def ranker() -> Ranker:
    """An MMoE of the size of the KuaiRand preset's."""
    torch.manual_seed(0)
    edges = [[float(b) for b in range(BINS + 1)] for _ in range(NUMBERS)]
    numerics = PiecewiseLinear(edges, [False] * NUMBERS)
    embedding = FeatureEmbedding([VOCABULARY] * FIELDS, [], numerics, 8)
    settings = {"preset": "mmoe", "members": 4, "dropout": 0.0}
    return Ranker(make("mmoe", settings, len(TASKS)), embedding)


def batches(size: int, count: int, device: str) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (size, FIELDS), generator=generator)
        numbers = torch.rand(size, NUMBERS, generator=generator) * BINS
        chance = torch.sigmoid(numbers[:, :3] - BINS / 2)
        label = (torch.rand(size, 3, generator=generator) < chance).float()
        made.append(tuple(t.to(device) for t in (ids, ids[:, :0], numbers, label)))
    return made


@dataclass(frozen=True)
class Way:
    """How the network is run.

    Attributes:
        size: rows of a batch.
        half: bfloat16 by autocast.
        fast: within `fast_matmul`.
    """

    size: int
    device: str = "cpu"
    half: bool = False
    compiled: bool = False
    fast: bool = False

    def number_format(self) -> contextlib.AbstractContextManager[Any]:
        if self.half:
            return torch.autocast(self.device, torch.bfloat16)
        return contextlib.nullcontext()

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        return fast_matmul() if self.fast else contextlib.nullcontext()


def train(way: Way, steps: int) -> dict[str, float]:
    """Rows a second of training, and the last steps' mean loss."""
    model = ranker().to(way.device)
    forward: Callable[..., torch.Tensor] = torch.compile(model) if way.compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = batches(way.size, 8, way.device)

    def step(number: int) -> torch.Tensor:
        *inputs, label = rows[number % len(rows)]
        optimiser.zero_grad()
        with way.number_format():
            logits = forward(*inputs)
        loss = losses(logits.float(), label, TASKS).sum()
        loss.backward()
        optimiser.step()
        return loss.detach()

    with way.kernels():
        return timed(step, way.size, steps, way.device)


def graphed(size: int, steps: int) -> dict[str, float]:
    """One CUDA graph of forward, backward and optimiser, replayed."""
    model = ranker().to("cuda")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    rows = batches(size, 8, "cuda")
    static = [t.clone() for t in rows[0]]

    def work() -> torch.Tensor:
        optimiser.zero_grad(set_to_none=False)
        loss = losses(model(*static[:3]), static[3], TASKS).sum()
        loss.backward()
        optimiser.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = work()

    def step(number: int) -> torch.Tensor:
        for target, source in zip(static, rows[number % len(rows)], strict=True):
            target.copy_(source)
        graph.replay()
        return loss.detach().clone()

    return timed(step, size, steps, "cuda")


def predict(way: Way, steps: int) -> dict[str, float]:
    """Rows a second of prediction, and the largest difference from float32's probabilities."""
    model = ranker().to(way.device).eval()
    rows = batches(way.size, 8, way.device)
    with torch.inference_mode():
        exact = torch.sigmoid(model(*rows[0][:3]).mean(0))
        with way.kernels(), way.number_format():
            off = torch.sigmoid(model(*rows[0][:3]).float().mean(0)) - exact
            found = timed(lambda n: model(*rows[n % 8][:3]).sum(), way.size, steps, way.device)
    return found | {"loss": float(off.abs().max())}


def timed(
    step: Callable[[int], torch.Tensor], size: int, steps: int, device: str
) -> dict[str, float]:
    for number in range(max(3, steps // 10)):
        step(number)
    synchronise(device)
    began = time.perf_counter()
    values = [step(number) for number in range(steps)]
    synchronise(device)
    spent = time.perf_counter() - began
    return {"rows_per_second": size * steps / spent, "loss": float(torch.stack(values[-8:]).mean())}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ways(steps: int) -> tuple[dict[str, Callable[[], dict[str, float]]], list[str]]:
    """What this machine can run, by name; and in words what it cannot."""
    found: dict[str, Callable[[], dict[str, float]]] = {
        "train, CPU, float32": lambda: train(Way(1024), steps),
        "train, CPU, float32, fast_matmul": lambda: train(Way(1024, fast=True), steps),
        "train, CPU, bfloat16": lambda: train(Way(1024, half=True), steps),
        "predict, CPU, float32": lambda: predict(Way(512), steps),
        "predict, CPU, float32, fast_matmul": lambda: predict(Way(512, fast=True), steps),
        "predict, CPU, bfloat16": lambda: predict(Way(512, half=True), steps),
    }
    missing = []
    if shutil.which("g++"):
        compiled = Way(1024, compiled=True, fast=True)
        found["train, CPU, float32, fast_matmul, torch.compile"] = lambda: train(compiled, steps)
    else:
        missing.append("torch.compile on the CPU: no g++ found")
    if not torch.cuda.is_available():
        return found, [*missing, "everything on a GPU: no CUDA device found"]
    many, large = 10 * steps, Way(16_384, "cuda")
    return found | {
        "train, GPU, float32, batch 1024": lambda: train(Way(1024, "cuda"), many),
        "train, GPU, float32, batch 16,384": lambda: train(large, many),
        "train, GPU, bfloat16, batch 16,384": lambda: train(replace(large, half=True), many),
        "train, GPU, CUDA graph, batch 1024": lambda: graphed(1024, many),
        "train, GPU, CUDA graph, batch 16,384": lambda: graphed(16_384, many),
        "predict, GPU, float32": lambda: predict(Way(65_536, "cuda"), steps),
        "predict, GPU, bfloat16": lambda: predict(Way(65_536, "cuda", half=True), steps),
    }, missing


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--steps", type=int, default=60)
    chosen = results.parse(options)
    possible, missing = ways(chosen.steps)
    found: dict[str, Any] = {}
    table = Table(title=f"MMoE of the KuaiRand preset's size, {torch.get_num_threads()} threads")
    for heading in ("way", "rows/s", "over float32 on the CPU", "loss | largest difference"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, run in possible.items():
        found[name] = run()
        kind = name.split(",")[0]
        base = next(values for key, values in found.items() if key.startswith(kind))
        ratio = found[name]["rows_per_second"] / base["rows_per_second"]
        found[name]["ratio"] = ratio
        rate, loss = found[name]["rows_per_second"], found[name]["loss"]
        table.add_row(name, f"{rate:,.0f}", f"{ratio:.2f}x", f"{loss:.4f}")
    CONSOLE.print(table)
    for words in missing:
        CONSOLE.print(f"[yellow]skipped[/] {words}")
    results.write(chosen, found | {"skipped": missing})


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Rates, their ratio to float32 on the CPU, and loss or error."""
    rows = []
    for name, each in figures.items():
        if name == "skipped":
            continue
        ratio = f"{each['ratio']:.2f}" if each["ratio"] != 1.0 else ""
        rows.append([name, f"{each['rows_per_second']:,.0f}", ratio, f"{each['loss']:.4f}"])
    headings = ("", "rows/s", "over float32", "loss, or largest difference of a probability")
    return {"devices": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    named = ("train, CPU, float32", "train, CPU, float32, fast_matmul", "train, CPU, bfloat16")
    rates = [f"{name} {figures[name]['rows_per_second']:,.0f}" for name in named]
    return f"rows/s: {'; '.join(rates)}"


if __name__ == "__main__":
    main()
