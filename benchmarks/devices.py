"""Rows a second of trainings and predictions by device, batch, number format and compiler.

Trainings run the loop of a night (`train_ranker`) on made rows: the MMoE of 8 experts with 16
units at batches of 1,024 to 65,536 rows, on the CPU and, where there is one, on a CUDA device, with
rows on the device and rows copied from pinned memory; and a network of 64 experts with 256 units on
the GPU. Beside the rates are AUC after the same training, memory and the share of the
matrix products' peak that is measured in the same run. Number formats and `torch.compile` are
compared on steps of the KuaiRand preset's network. What cannot run on a machine is listed as
skipped.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.config import Features, Training
from mtl_ranker.features.encoders import Encoder
from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear
from mtl_ranker.models.matmul import fast_matmul
from mtl_ranker.models.objectives import Task, losses
from mtl_ranker.models.presets import make
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.spec import RankerSpec
from mtl_ranker.training.batches import Examples
from mtl_ranker.training.loop import Design, Execution, Rows, Trained, train_ranker
from mtl_ranker.training.network import build_ranker, predict, predict_logits

TASKS = [Task("click", "binary"), Task("long_view", "binary"), Task("like", "binary")]
FIELDS, VOCABULARY, NUMBERS, BINS = 20, 500, 70, 10
BATCHES = (1_024, 4_096, 16_384, 65_536)
EIGHT = {"preset": "mmoe", "experts": 8, "expert_hidden": [16], "dropout": 0.0}
WIDE = {"preset": "mmoe", "experts": 64, "expert_hidden": [256], "dropout": 0.0}
OF_PRESET = {"preset": "mmoe", "members": 4, "dropout": 0.0}
EPOCHS = 3
PEAK_SIDE = 8_192  # of the matrices whose product measures the peak


def spec_of(settings: Mapping[str, Any]) -> RankerSpec:
    return make("mmoe", dict(settings), len(TASKS))


@cache
def encoder() -> Encoder:
    """Of 20 categorical and 70 numeric fields."""
    rng = np.random.default_rng(0)
    rows = 20_000
    numbers = {f"n{i}": rng.random(rows) for i in range(NUMBERS)}
    ids = {f"c{i}": rng.integers(0, VOCABULARY - 1, rows) for i in range(FIELDS)}
    features = Features(categoricals=[{"column": name} for name in ids], bins=BINS)
    return Encoder.fit(features, list(numbers), pl.DataFrame(numbers | ids))


def made(rows: int, device: str, seed: int = 1) -> Examples:
    """Random rows with labels that depend on ten numbers and two categories."""
    where = torch.device(device)
    generator = torch.Generator(where).manual_seed(seed)
    fixed = torch.Generator().manual_seed(0)
    effect = torch.randn(2, VOCABULARY, len(TASKS), generator=fixed).to(where)
    slope = torch.randn(10, len(TASKS), generator=fixed).to(where)
    ids = torch.randint(0, VOCABULARY, (rows, FIELDS), generator=generator, device=where)
    numbers = torch.rand(rows, NUMBERS, generator=generator, device=where)
    logit = (numbers[:, :10] - 0.5) @ slope * 2 + 0.5 * (
        effect[0][ids[:, 0]] + effect[1][ids[:, 1]]
    )
    uniform = torch.rand(rows, len(TASKS), generator=generator, device=where)
    labels = (uniform < torch.sigmoid(logit - 1.0)).float()
    return Examples(ids, ids[:, :0], numbers, labels)


@dataclass(frozen=True)
class Loop:
    """A training by `train_ranker`.

    Attributes:
        resident: rows are on the device before it starts.
    """

    settings: Mapping[str, Any]
    device: str
    batch: int
    rows: int
    resident: bool = True
    seed: int = 0

    def train(self, rows: Examples) -> tuple[Trained, float]:
        """The training and the seconds of its fastest epoch."""
        seconds: list[float] = []
        training = Training(
            batch_size=self.batch, epochs=EPOCHS, device=self.device, learning_rate=2e-3
        )
        trained = train_ranker(
            Design(spec_of(self.settings), encoder(), TASKS),
            Rows(rows),
            training,
            self.seed,
            Execution(lambda epoch: seconds.append(epoch.seconds), [EPOCHS] * len(TASKS)),
        )
        return trained, min(seconds)

    def measure(self) -> dict[str, float | None]:
        """Rows a second of the fastest epoch, GB of the device's memory, and FLOP a row."""
        on_gpu = self.device == "cuda"
        rows = made(self.rows, self.device if self.resident else "cpu")
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        _, seconds = self.train(rows)
        memory = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        rate = self.rows / seconds
        return {"rows_per_second": rate, "memory": memory, "flop": flop_per_row(self.settings)}


def flop_per_row(settings: Mapping[str, Any], rows: int = 1_024) -> float:
    """Floating-point operations of matrix products for one row of a training step."""
    model = build_ranker(spec_of(settings), encoder(), TASKS)
    batch = made(rows, "cpu")
    with FlopCounterMode(display=False) as counter:
        losses(model(*batch.inputs), batch.labels, TASKS).sum().backward()
    return counter.get_total_flops() / rows


def prediction(device: str, rows: int, rounds: int = 5) -> dict[str, float | None]:
    """Rows a second of `predict_logits`, of rows on the device."""
    model = build_ranker(spec_of(EIGHT), encoder(), TASKS).to(device).eval()
    examples = made(rows, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    predict_logits(model, examples)
    synchronise(device)
    began = time.perf_counter()
    for _ in range(rounds):
        predict_logits(model, examples)
    synchronise(device)
    spent = time.perf_counter() - began
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"rows_per_second": rounds * rows / spent, "memory": memory}


def quality(devices: list[str], seeds: int, rows: int = 200_000) -> dict[str, list[list[float]]]:
    """AUC [seeds][T] on held-out rows after the same training on each device."""
    train, test = made(rows, "cpu"), made(100_000, "cpu", seed=2)
    found: dict[str, list[list[float]]] = {device: [] for device in devices}
    for device in devices:
        for seed in range(seeds):
            model = Loop(EIGHT, device, 1_024, rows, False, seed).train(train)[0].model
            predicted = predict(model, test, TASKS)
            found[device].append(
                [
                    float(roc_auc_score(test.labels[:, t], predicted[:, t]))
                    for t in range(len(TASKS))
                ]
            )
    return found


def peak(device: str, rounds: int = 20) -> float:
    """FLOP a second of a large matrix product at the precision of trainings."""
    a, b = (torch.randn(PEAK_SIDE, PEAK_SIDE, device=device) for _ in range(2))
    with fast_matmul(torch.device(device), rounded=True):
        for _ in range(3):
            a @ b
        synchronise(device)
        began = time.perf_counter()
        for _ in range(rounds):
            a @ b
        synchronise(device)
        spent = time.perf_counter() - began
    return 2 * PEAK_SIDE**3 * rounds / spent


@dataclass(frozen=True)
class Way:
    """How a step of the preset's network is run.

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
        device = torch.device(self.device)
        return fast_matmul(device, rounded=True) if self.fast else contextlib.nullcontext()


def ranker() -> Ranker:
    torch.manual_seed(0)
    return build_ranker(spec_of(OF_PRESET), encoder(), TASKS)


def step_rate(way: Way, steps: int) -> dict[str, float]:
    """Rows a second of steps, and the last steps' mean loss."""
    model = ranker().to(way.device)
    forward: Callable[..., torch.Tensor] = torch.compile(model) if way.compiled else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = [made(way.size, way.device, seed) for seed in range(8)]

    def step(number: int) -> torch.Tensor:
        batch = rows[number % len(rows)]
        optimiser.zero_grad()
        with way.number_format():
            logits = forward(*batch.inputs)
        loss = losses(logits.float(), batch.labels, TASKS).sum()
        loss.backward()
        optimiser.step()
        return loss.detach()

    with way.kernels():
        return timed(step, way, steps)


def large_table(rows: int, batch: int, steps: int) -> dict[str, float]:
    """Rows a second of steps with sparse updates of a table of so many embeddings, on the GPU."""
    with torch.device("cuda"):
        numerics = PiecewiseLinear(encoder().edges, encoder().missing)
        model = Ranker(spec_of(EIGHT), FeatureEmbedding([rows // FIELDS] * FIELDS, [], numerics, 8))
    model.embedding.sparse = True
    table = model.embedding.table.weight
    dense = torch.optim.AdamW([p for p in model.parameters() if p is not table], fused=True)
    sparse = torch.optim.SparseAdam([table])
    batches = [made(batch, "cuda", seed) for seed in range(8)]
    ids = [torch.randint_like(each.categorical, rows // FIELDS) for each in batches]

    def step(number: int) -> torch.Tensor:
        rows, chosen = batches[number % 8], ids[number % 8]
        model.zero_grad()
        loss = losses(model(chosen, *rows.inputs[1:]), rows.labels, TASKS).sum()
        loss.backward()
        dense.step()
        sparse.step()
        return loss.detach()

    torch.cuda.reset_peak_memory_stats()
    found = timed(step, Way(batch, "cuda"), steps)
    return found | {"memory": torch.cuda.max_memory_allocated() / 1e9}


def predicting(way: Way, steps: int) -> dict[str, float]:
    """Rows a second of prediction, and the largest difference from float32's probabilities."""
    model = ranker().to(way.device).eval()
    rows = [made(way.size, way.device, seed) for seed in range(8)]
    with torch.inference_mode():
        exact = torch.sigmoid(model(*rows[0].inputs).mean(0))
        with way.kernels(), way.number_format():
            off = torch.sigmoid(model(*rows[0].inputs).float().mean(0)) - exact
            found = timed(lambda n: model(*rows[n % 8].inputs).sum(), way, steps)
    return found | {"loss": float(off.abs().max())}


def timed(step: Callable[[int], torch.Tensor], way: Way, steps: int) -> dict[str, float]:
    for number in range(max(3, steps // 10)):
        step(number)
    synchronise(way.device)
    began = time.perf_counter()
    values = [step(number) for number in range(steps)]
    synchronise(way.device)
    spent = time.perf_counter() - began
    loss = float(torch.stack(values[-8:]).mean())
    return {"rows_per_second": way.size * steps / spent, "loss": loss}


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def ways(steps: int, compiled: bool) -> tuple[dict[str, Callable[[], dict[str, float]]], list[str]]:
    """Steps that this machine can run, by name; and in words what it cannot."""
    of_cpu = {
        "float32": Way(1_024),
        "float32, fast_matmul": Way(1_024, fast=True),
        "bfloat16": Way(1_024, half=True),
    }
    found: dict[str, Callable[[], dict[str, float]]] = {
        **{f"train, CPU, {k}": partial(step_rate, way, steps) for k, way in of_cpu.items()},
        **{f"predict, CPU, {k}": partial(predicting, way, steps) for k, way in of_cpu.items()},
    }
    missing = []
    if not compiled:
        missing.append("torch.compile: --no-compile")
    elif shutil.which("g++"):
        fused = Way(1_024, compiled=True, fast=True)
        found["train, CPU, float32, fast_matmul, torch.compile"] = partial(step_rate, fused, steps)
    else:
        missing.append("torch.compile on the CPU: no g++ found")
    if not torch.cuda.is_available():
        return found, [*missing, "everything on a GPU: no CUDA device found"]
    large = Way(16_384, "cuda")
    of_gpu = {
        "float32": large,
        "TensorFloat-32": replace(large, fast=True),
        "bfloat16": replace(large, half=True),
        "TensorFloat-32, torch.compile": replace(large, fast=True, compiled=True),
    }
    return found | {
        **{
            f"train, GPU, {k}": partial(step_rate, way, 5 * steps)
            for k, way in of_gpu.items()
            if compiled or not way.compiled
        },
        **{
            f"predict, GPU, {k}": partial(predicting, way, 5 * steps)
            for k, way in of_gpu.items()
            if not way.compiled
        },
        "train, GPU, 100 million embeddings, sparse updates": partial(
            large_table, 100_000_000, BATCHES[-1], steps
        ),
    }, missing


def measure_steps(steps: int, compiled: bool) -> dict[str, Any]:
    possible, missing = ways(steps, compiled)
    found: dict[str, Any] = {}
    table = Table(title=f"steps of the KuaiRand preset's MMoE, {torch.get_num_threads()} threads")
    for heading in ("way", "rows/s", "over float32 on the CPU", "loss | largest difference"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, run in possible.items():
        found[name] = run()
        kind = name.split(",")[0]
        base = next(values for key, values in found.items() if key.startswith(kind))
        found[name]["ratio"] = found[name]["rows_per_second"] / base["rows_per_second"]
        rate, loss = found[name]["rows_per_second"], found[name]["loss"]
        table.add_row(name, f"{rate:,.0f}", f"{found[name]['ratio']:.2f}x", f"{loss:.4f}")
    CONSOLE.print(table)
    for words in missing:
        CONSOLE.print(f"[yellow]skipped[/] {words}")
    return found | {"skipped": missing}


def measure_loops(rows: int, devices: list[str]) -> dict[str, Any]:
    """Rates of the loop by device and batch, and of predictions."""
    found: dict[str, Any] = {}
    for device in devices:
        count = rows if device == "cuda" else rows // 40
        for batch in BATCHES:
            found[f"{device}, batch {batch:,}"] = Loop(EIGHT, device, batch, count).measure()
        if device == "cuda":
            copied = Loop(EIGHT, device, BATCHES[-1], count // 4, resident=False)
            found[f"{device}, batch {BATCHES[-1]:,}, rows from the CPU"] = copied.measure()
            wide = Loop(WIDE, device, BATCHES[-1], count // 8)
            found[f"{device}, batch {BATCHES[-1]:,}, 64 experts of 256"] = wide.measure()
        found[f"{device}, predict"] = prediction(device, count)
        most = peak(device) if device == "cuda" else None
        for name, each in found.items():
            if most is not None and name.startswith(device) and "flop" in each:
                each["share_of_peak"] = each["flop"] * each["rows_per_second"] / most
    table = Table(title="training loop and predictions, MMoE of 8 experts of 16 units")
    for heading in ("", "rows/s", "memory, GB", "share of the matrix products' peak"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in found.items():
        table.add_row(*loop_cells(name, each))
    CONSOLE.print(table)
    return found


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--rows", type=int, default=8_000_000, help="of a training on a GPU")
    options.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    options.add_argument("--seeds", type=int, default=3, help="of the comparison of AUC")
    chosen = results.parse(options)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    name = torch.cuda.get_device_name() if len(devices) > 1 else None
    found: dict[str, Any] = {
        "gpu": name,
        "loops": measure_loops(chosen.rows, devices),
        "auc": quality(devices, chosen.seeds),
        "steps": measure_steps(chosen.steps, not chosen.no_compile),
    }
    for device, by_seed in found["auc"].items():
        mean, spread = np.mean(by_seed, 0), np.std(by_seed, 0, ddof=min(1, len(by_seed) - 1))
        words = ", ".join(
            f"{task.name} {m:.4f} ± {s:.4f}" for task, m, s in zip(TASKS, mean, spread, strict=True)
        )
        CONSOLE.print(f"AUC on {device}, {len(by_seed)} seeds: {words}")
    results.write(chosen, found)


def loop_cells(name: str, each: Mapping[str, Any]) -> list[str]:
    """Rate, memory and share of the peak, the last two where they were measured."""
    memory, share = each["memory"], each.get("share_of_peak")
    return [
        name,
        f"{each['rows_per_second']:,.0f}",
        "" if memory is None else f"{memory:.1f}",
        "" if share is None else f"{share:.1%}",
    ]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Rates of the loop by device and batch, and of steps by number format."""
    loops = [loop_cells(name, each) for name, each in figures["loops"].items()]
    quality = []
    for device, by_seed in figures["auc"].items():
        mean, spread = np.mean(by_seed, 0), np.std(by_seed, 0, ddof=min(1, len(by_seed) - 1))
        quality.append([device, *(f"{m:.4f} ± {s:.4f}" for m, s in zip(mean, spread, strict=True))])
    steps = []
    for name, each in figures["steps"].items():
        if name == "skipped":
            continue
        ratio = f"{each['ratio']:.2f}" if each["ratio"] != 1.0 else ""
        steps.append([name, f"{each['rows_per_second']:,.0f}", ratio, f"{each['loss']:.4f}"])
    headings = (
        "",
        "rows/s",
        "over float32 on the CPU",
        "loss, or largest difference of a probability",
    )
    return {
        "devices": markdown.table(headings, steps),
        "devices auc": markdown.table(("AUC", *(task.name for task in TASKS)), quality),
        "devices loops": markdown.table(("", "rows/s", "memory, GB", "share of the peak"), loops),
    }


def summary(figures: Mapping[str, Any]) -> str:
    """The fastest training and prediction of each device."""
    words = []
    for device in figures["auc"]:
        rates = {n: e["rows_per_second"] for n, e in figures["loops"].items() if device in n}
        trained = max(rate for n, rate in rates.items() if "predict" not in n)
        words.append(
            f"{device} {trained:,.0f} trained, {rates[f'{device}, predict']:,.0f} predicted"
        )
    gpu = f" ({figures['gpu']})" if figures["gpu"] else ""
    return f"rows/s: {'; '.join(words)}{gpu}"


if __name__ == "__main__":
    main()
