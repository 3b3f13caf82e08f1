"""Replica-steps per second: many random starts side by side against one after the other.

The models of the synthetic study (Ma et al., KDD 2018, section 5.2) on their data, batch 64, Adam.
One after the other means the plainest loop over one model, as a separate process would run it.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice
from pathlib import Path

import torch
from prepared import parse
from rich.console import Console
from rich.table import Table

from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.studies.synthetic import MODELS, Tasks, build_model, equal_units
from mtl_ranker.training.replicas import Replicas
from mtl_ranker.workspace import write_json

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
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--replicas", type=int, default=200)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--repeats", type=int, default=3, help="the fastest of each counts")
    options.add_argument("--threads", type=int, default=0, help="of torch; 0 = all cores")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    chosen = parse(options)
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
    write_json(chosen.json, {"replicas": chosen.replicas, "threads": threads, "models": figures})


if __name__ == "__main__":
    main()
