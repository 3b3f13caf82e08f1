"""Training steps and predictions of the preset's MMoE by number format, compiler and device.

float32 as torch multiplies by default (MKL), and as trainings here do (oneDNN, see kernels.py);
bfloat16 (autocast) and `torch.compile` on the CPU; and, where a CUDA device is found, float32,
bfloat16, large batches and a CUDA graph of the whole step there. What cannot run here is said, not
left out. Losses after equal steps stand beside the rates.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured import CONSOLE
from rich.table import Table

from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.models.objectives import Task, losses
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.workspace import write_json

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


def train(
    size: int,
    steps: int,
    device: str,
    half: bool = False,
    compiled: bool = False,
    fast: bool = False,
) -> dict[str, float]:
    """Rows a second of training, and the last steps' mean loss."""
    model = ranker().to(device)
    forward: Callable[..., torch.Tensor] = torch.compile(model) if compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = batches(size, 8, device)

    def step(number: int) -> torch.Tensor:
        *inputs, label = rows[number % len(rows)]
        optimiser.zero_grad()
        context = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
        with context:
            logits = forward(*inputs)
        loss = losses(logits.float(), label, TASKS).sum()
        loss.backward()
        optimiser.step()
        return loss.detach()

    with fast_matmul() if fast else contextlib.nullcontext():
        return timed(step, size, steps, device)


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


def predict(
    size: int, steps: int, device: str, half: bool = False, fast: bool = False
) -> dict[str, float]:
    """Rows a second of prediction, and the largest difference from float32's probabilities."""
    model = ranker().to(device).eval()
    rows = batches(size, 8, device)
    context = torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()
    if fast:
        context = fast_matmul()
    with torch.inference_mode():
        exact = torch.sigmoid(model(*rows[0][:3]).mean(0))
        with context:
            off = torch.sigmoid(model(*rows[0][:3]).float().mean(0)) - exact
            found = timed(lambda n: model(*rows[n % 8][:3]).sum(), size, steps, device)
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


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--threads", type=int, default=0, help="of torch; 0 = all cores")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = options.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    steps = chosen.steps
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "train, CPU, float32, batch 1024": lambda: train(1024, steps, "cpu"),
        "train, CPU, float32 as here": lambda: train(1024, steps, "cpu", fast=True),
        "train, CPU, bfloat16, batch 1024": lambda: train(1024, steps, "cpu", half=True),
        "predict, CPU, float32": lambda: predict(512, steps, "cpu"),
        "predict, CPU, float32 as here": lambda: predict(512, steps, "cpu", fast=True),
        "predict, CPU, bfloat16": lambda: predict(512, steps, "cpu", half=True),
    }
    missing = []
    if shutil.which("g++"):
        ways["train, CPU, float32 as here, torch.compile"] = lambda: train(
            1024, steps, "cpu", compiled=True, fast=True
        )
    else:
        missing.append("torch.compile on the CPU: no g++ here")
    if torch.cuda.is_available():
        many = 10 * steps
        ways |= {
            "train, GPU, float32, batch 1024": lambda: train(1024, many, "cuda"),
            "train, GPU, float32, batch 16,384": lambda: train(16_384, many, "cuda"),
            "train, GPU, bfloat16, batch 16,384": lambda: train(16_384, many, "cuda", half=True),
            "train, GPU, CUDA graph, batch 1024": lambda: graphed(1024, many),
            "train, GPU, CUDA graph, batch 16,384": lambda: graphed(16_384, many),
            "predict, GPU, float32": lambda: predict(65_536, steps, "cuda"),
            "predict, GPU, bfloat16": lambda: predict(65_536, steps, "cuda", half=True),
        }
    else:
        missing.append("everything on a GPU: no CUDA device found, skipped")
    found: dict[str, Any] = {}
    table = Table(title=f"MMoE of the KuaiRand preset's size, {torch.get_num_threads()} threads")
    for heading in ("way", "rows/s", "over float32 on the CPU", "loss | largest difference"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, way in ways.items():
        found[name] = way()
        kind = name.split(",")[0]
        base = next(values for key, values in found.items() if key.startswith(kind))
        ratio = found[name]["rows_per_second"] / base["rows_per_second"]
        found[name]["ratio"] = ratio
        rate, loss = found[name]["rows_per_second"], found[name]["loss"]
        table.add_row(name, f"{rate:,.0f}", f"{ratio:.2f}x", f"{loss:.4f}")
    CONSOLE.print(table)
    for words in missing:
        CONSOLE.print(f"[yellow]skipped[/] {words}")
    write_json(chosen.json, found | {"skipped": missing})


if __name__ == "__main__":
    main()
