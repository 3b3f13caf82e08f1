"""Replica-steps per second: many random starts side by side against one after the other.

The models of the synthetic study (Ma et al., KDD 2018, section 5.2) on their data, batch 64, Adam.
One after the other means the plainest loop over one model, as a separate process would run it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import markdown, results
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.studies.synthetic import MODELS, Tasks, build_model, equal_units
from mtl_ranker.training.replicas import Replicas

BATCH, RATE = 64, 1e-3


@fast_matmul()
def together(preset: str, units: int, count: int, steps: int) -> float:
    """Replica-steps per second of `count` replicas."""
    replicas = Replicas([build_model(preset, units) for _ in range(count)], RATE)
    x, y = next(Tasks(0.5).chunks(0, BATCH))
    x, y = (part[0].expand(count, -1, -1).contiguous() for part in (x, y))
    for _ in range(3):
        replicas.step(x, y)
    began = time.perf_counter()
    for _ in range(steps):
        replicas.step(x, y)
    return count * steps / (time.perf_counter() - began)


def alone(preset: str, units: int, steps: int) -> float:
    """Steps per second of one model by itself."""
    model = build_model(preset, units)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    chunks = islice(Tasks(0.5).chunks(0, BATCH), 1)
    pairs = [pair for chunk in chunks for pair in zip(*chunk, strict=True)]

    def step(number: int) -> None:
        x, y = pairs[number % len(pairs)]
        optimiser.zero_grad()
        (model(x) - y).square().mean(0).sum().backward()
        optimiser.step()

    for number in range(20):
        step(number)
    began = time.perf_counter()
    for number in range(steps):
        step(number)
    return steps / (time.perf_counter() - began)


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--replicas", type=int, default=200)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--repeats", type=int, default=3, help="the fastest of each counts")
    chosen = results.parse(options)
    units = equal_units()
    table = Table(title=f"{chosen.replicas} replicas, {torch.get_num_threads()} threads")
    for heading in ("model", "one by one, steps/s", "together, replica-steps/s", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    figures = {}
    for preset in MODELS:
        one, many = 0.0, 0.0
        for _ in range(chosen.repeats):
            one = max(one, alone(preset, units[preset], 10 * chosen.steps))
            with fast_matmul():  # which pays for many products at a time only
                one = max(one, alone(preset, units[preset], 10 * chosen.steps))
            many = max(many, together(preset, units[preset], chosen.replicas, chosen.steps))
        figures[preset] = {"alone": one, "together": many, "ratio": many / one}
        table.add_row(preset, f"{one:,.0f}", f"{many:,.0f}", f"{many / one:.1f}x")
    Console(width=120).print(table)
    threads = torch.get_num_threads()
    results.write(chosen, {"replicas": chosen.replicas, "threads": threads, "models": figures})


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [model, f"{each['alone']:,.0f}", f"{each['together']:,.0f}", f"{each['ratio']:.1f}"]
        for model, each in figures["models"].items()
    ]
    headings = ["model", "one by one, steps/s", "batched, replica-steps/s", "ratio"]
    return {"replicas": markdown.table(headings, rows)}


def summary(figures: Mapping[str, Any]) -> str:
    ratios = [f"{model} {each['ratio']:.1f}" for model, each in figures["models"].items()]
    return f"{figures['replicas']} replicas at once over one by one: {', '.join(ratios)} times"


if __name__ == "__main__":
    main()
