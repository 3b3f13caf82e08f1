"""Rows per second of the same MMoE here, in torch-rechub and in DeepCTR-Torch, in one run.

8 experts of 16 units, towers of 8, embeddings of 4, Adam at 1e-3, the same encoded rows, batch and
threads; each library in processes of its own, in turn, through its own way of fitting and
predicting, without validation, metrics or progress bars. Categorical columns are embedded, numbers
standardised. The peers predict at the training batch and, in a second column, in blocks of 16,384
rows; we choose our own. AUC is after equal epochs; our learning rate falls to zero over them, as
mtl_ranker always does. Install the peers with `pip install -c constraints.txt -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import in_process
from benchmarks.prepared import folders, parser, preset_of, real_examples
from mtl_ranker.config import Training
from mtl_ranker.evaluation.metrics import auc
from mtl_ranker.models.presets import make
from mtl_ranker.training.batches import Examples, take
from mtl_ranker.training.dataset import Dataset
from mtl_ranker.training.loop import Design, Rows, train_ranker
from mtl_ranker.training.network import predict

EXPERTS, EXPERT, TOWER, EMBEDDING, RATE = 8, 16, 8, 4, 1e-3
OURS, RECHUB, DEEPCTR = "mtl_ranker", "torch-rechub", "DeepCTR-Torch"
LARGE = 16_384  # rows a block in which the peers predict fastest


@dataclass(frozen=True)
class Size:
    """Of a training, and how often it is repeated in a process."""

    batch: int
    epochs: int
    repeats: int
    threads: int


class Job:
    """One library's model: fit on the training rows, predict the test rows, say how long."""

    def __init__(self, parts: Dataset, batch: int, epochs: int) -> None:
        self.parts, self.batch, self.epochs = parts, batch, epochs
        self.train, self.test = parts.examples["train"], parts.examples["test"]

    def fields(self) -> list[tuple[str, int]]:
        return [(v.column, v.size) for v in self.parts.encoder.categoricals]


class Ours(Job):
    name = OURS

    def fit(self, seed: int) -> None:
        settings = {"experts": EXPERTS, "expert_hidden": [EXPERT], "tower_hidden": [TOWER]}
        settings |= {"preset": "mmoe", "embedding_dim": EMBEDDING, "dropout": 0.0}
        training = Training(
            batch_size=self.batch,
            epochs=self.epochs,
            patience=self.epochs,
            learning_rate=RATE,
            weight_decay=0.0,
        )
        few = take(self.test, torch.arange(min(1024, len(self.test))))
        spec = make("mmoe", settings, len(self.parts.tasks))
        encoder, tasks = self.parts.encoder, self.parts.tasks
        self.model = train_ranker(
            Design(spec, encoder, tasks), Rows(self.train, few), training, seed
        ).model

    def predict(self, batch: int) -> np.ndarray:
        return predict(self.model, self.test, self.parts.tasks)

    def parameters(self) -> int:
        return self.model.parameter_count()


class Rechub(Job):
    name = RECHUB

    def __init__(self, parts: Dataset, batch: int, epochs: int) -> None:
        from torch_rechub.basic.features import DenseFeature, SparseFeature

        super().__init__(parts, batch, epochs)
        self.features = [SparseFeature(n, size, embed_dim=EMBEDDING) for n, size in self.fields()]
        numbers = range(self.train.numeric.shape[1])
        self.features += [DenseFeature(f"number_{f}") for f in numbers]

    def _columns(self, rows: Examples) -> dict[str, np.ndarray]:
        ids = {n: rows.categorical[:, i].numpy() for i, (n, _) in enumerate(self.fields())}
        numbers = range(rows.numeric.shape[1])
        return ids | {f"number_{f}": rows.numeric[:, f].numpy() for f in numbers}

    def fit(self, seed: int) -> None:
        from torch_rechub.models.multi_task import MMOE
        from torch_rechub.trainers import MTLTrainer
        from torch_rechub.utils.data import DataGenerator

        torch.manual_seed(seed)
        tasks = len(self.parts.tasks)
        self.model = MMOE(
            self.features,
            ["classification"] * tasks,
            EXPERTS,
            {"dims": [EXPERT]},
            [{"dims": [TOWER]}] * tasks,
        )
        self.trainer = MTLTrainer(
            self.model,
            ["classification"] * tasks,
            optimizer_params={"lr": RATE, "weight_decay": 0.0},
            n_epoch=self.epochs,
        )
        data = DataGenerator(self._columns(self.train), self.train.labels.numpy())
        loader, _, _ = data.generate_dataloader(
            x_val=self._columns(self.test),
            y_val=self.test.labels.numpy(),
            x_test=self._columns(self.test),
            y_test=self.test.labels.numpy(),
            batch_size=self.batch,
        )
        for _ in range(self.epochs):
            self.trainer.train_one_epoch(loader)

    def predict(self, batch: int) -> np.ndarray:
        from torch.utils.data import DataLoader
        from torch_rechub.utils.data import PredictDataset

        loader = DataLoader(PredictDataset(self._columns(self.test)), batch_size=batch)
        return np.array(self.trainer.predict(self.model, loader))

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class DeepCTR(Job):
    name = DEEPCTR

    def __init__(self, parts: Dataset, batch: int, epochs: int) -> None:
        from deepctr_torch.inputs import DenseFeat, SparseFeat

        super().__init__(parts, batch, epochs)
        self.columns: list[Any] = [SparseFeat(n, s, EMBEDDING) for n, s in self.fields()]
        self.columns.append(DenseFeat("numbers", self.train.numeric.shape[1]))

    def _inputs(self, rows: Examples) -> dict[str, np.ndarray]:
        ids = {n: rows.categorical[:, i].numpy() for i, (n, _) in enumerate(self.fields())}
        return ids | {"numbers": rows.numeric.numpy()}

    def fit(self, seed: int) -> None:
        from deepctr_torch.models import MMOE

        names = [task.name for task in self.parts.tasks]
        self.model = MMOE(
            self.columns,
            num_experts=EXPERTS,
            expert_dnn_hidden_units=(EXPERT,),
            gate_dnn_hidden_units=(),
            tower_dnn_hidden_units=(TOWER,),
            l2_reg_embedding=0.0,
            seed=seed,
            task_types=["binary"] * len(names),
            task_names=names,
        )
        optimiser = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.model.compile(optimiser, loss=["binary_crossentropy"] * len(names))
        self.model.fit(
            self._inputs(self.train),
            self.train.labels.numpy(),
            batch_size=self.batch,
            epochs=self.epochs,
            verbose=0,
        )

    def predict(self, batch: int) -> np.ndarray:
        return self.model.predict(self._inputs(self.test), batch_size=batch)

    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


@contextlib.contextmanager
def ablate() -> Iterator[None]:
    """Without the peers' progress bars and prints, which would also cost them time."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
    ):
        yield


def seconds(work: Callable[[], Any]) -> float:
    with ablate():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began


def standardised(parts: Dataset) -> Dataset:
    """All numbers of all rows with mean 0 and deviation 1, gaps at 0, and no lists: what each of
    the three libraries can take.
    """
    train = parts.examples["train"].numeric.double()
    mean = train.nanmean(0)
    spread = (train - mean).square().nanmean(0).sqrt().clamp(min=1e-6)

    def plain(rows: Examples) -> Examples:
        numeric = torch.nan_to_num((rows.numeric.double() - mean) / spread).float()
        return replace(rows, numeric=numeric, bags=rows.bags[:, :0], position=None, weight=None)

    names = parts.encoder.numerics
    encoder = replace(
        parts.encoder,
        edges=[[0.0, 1.0] for _ in names],
        missing=[False for _ in names],
        lists=[],
        numeric_encoding="standardise",
    )
    return replace(
        parts, encoder=encoder, examples={n: plain(e) for n, e in parts.examples.items()}
    )


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--batch", type=int, default=1024)
    options.add_argument("--epochs", type=int, default=4)
    options.add_argument("--repeats", type=int, default=3, help="in a process; the fastest counts")
    options.add_argument("--rounds", type=int, default=2, help="processes of each library, in turn")
    chosen = results.parse(options)
    results.write(chosen, {preset_of(f): measure(f, chosen) for f in folders(chosen.data)})


def library(folder: str, name: str, size: dict[str, int]) -> dict[str, Any]:
    """All measurements of one library, in a process of its own. `size` is a `Size`."""
    batch, epochs, repeats, threads = (size[k] for k in ("batch", "epochs", "repeats", "threads"))
    if threads:
        torch.set_num_threads(threads)
    _, prepared = real_examples(Path(folder))
    parts = standardised(prepared)
    job = next(kind for kind in (Ours, Rechub, DeepCTR) if kind.name == name)(parts, batch, epochs)
    fits, quality = [], []
    predicts: dict[int, list[float]] = {batch: [], LARGE: []}
    labels = parts.examples["test"].labels.numpy()
    with ablate():
        job.fit(repeats)  # the first one of a process also starts torch up
    for seed in range(repeats):
        fits.append(seconds(lambda: job.fit(seed)))  # noqa: B023
        for block, times in predicts.items():
            times += [seconds(lambda: job.predict(block)) for _ in range(3)]  # noqa: B023
        with ablate():
            found = job.predict(LARGE)
        quality.append([auc(labels[:, t], found[:, t]) for t in range(len(found[0]))])
    return {
        "fit": min(fits),
        "predict": min(predicts[batch]),
        "predict_large": min(predicts[LARGE]),
        "auc": np.mean(quality, 0).tolist(),
        "parameters": job.parameters(),
        "train_rows": len(parts.examples["train"]),
        "test_rows": len(parts.examples["test"]),
        "names": [task.name for task in parts.tasks],
    }


def measure(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    size = Size(chosen.batch, chosen.epochs, chosen.repeats, chosen.threads)
    settings = {"folder": str(folder.resolve()), "size": asdict(size)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, RECHUB, DEEPCTR)}
    for _ in range(chosen.rounds):  # in turn, because a machine has slow spells
        for name, each in found.items():
            each.append(in_process(library, settings | {"name": name}))
    measured = {
        name: each[0] | {k: min(e[k] for e in each) for k in ("fit", "predict", "predict_large")}
        for name, each in found.items()
    }
    mine = measured[OURS]
    rows, test_rows, names = (mine[k] for k in ("train_rows", "test_rows", "names"))
    figures: dict[str, Any] = {
        "data": preset_of(folder),
        "train_rows": rows,
        "test_rows": test_rows,
        "batch": chosen.batch,
        "epochs": chosen.epochs,
        "threads": torch.get_num_threads(),
        "libraries": {},
    }
    table = Table(title=f"{figures['data']}: {rows:,} rows x {chosen.epochs} epochs")
    blocks = ("predict rows/s", "speed-up", f"in {LARGE:,}s", "speed-up")
    for heading in ("library", "parameters", "train rows/s", "speed-up", *blocks):
        table.add_column(heading, justify="right" if heading != "library" else "left")
    for name in names:
        table.add_column(f"AUC {name}", justify="right")
    ours = min(mine["predict"], mine["predict_large"])
    for name, values in measured.items():
        train, faster = rows * chosen.epochs / values["fit"], values["fit"] / mine["fit"]
        keys = ("predict", "predict_large")
        best = [ours if name == OURS else values[key] for key in keys]
        scored, sooner = [test_rows / t for t in best], [t / ours for t in best]
        figures["libraries"][name] = {
            "parameters": values["parameters"],
            "train_rows_per_second": train,
            "predict_rows_per_second": scored[0],
            "predict_rows_per_second_large": scored[1],
            "train_ratio": faster,
            "predict_ratio": sooner[0],
            "predict_ratio_large": sooner[1],
            "auc": dict(zip(names, values["auc"], strict=True)),
        }
        cells = [f"{train:,.0f}", f"{faster:.1f}x"]
        for rate, ratio in zip(scored, sooner, strict=True):
            cells += [f"{rate:,.0f}", f"{ratio:.1f}x"]
        cells += [f"{value:.4f}" for value in values["auc"]]
        table.add_row(name, f"{values['parameters']:,}", *cells)
    console = Console(width=150)
    console.print(table)
    console.print(
        f"{torch.get_num_threads()} threads, batch {chosen.batch} (peers' predictions too, then "
        f"in blocks of {LARGE:,}); fastest of {chosen.rounds} x {chosen.repeats}, AUC on test "
        "rows. torch-rechub's layers have batch norm, which it cannot leave out."
    )
    return figures


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Rates of all libraries for each data set, and that of mtl_ranker over theirs."""
    headings = ["library", "rows/s trained", "speed-up", "rows/s predicted", "speed-up"]
    headings += [f"predicted in blocks of {LARGE:,}", "speed-up"]
    kinds = (
        ("train_rows_per_second", "train_ratio"),
        ("predict_rows_per_second", "predict_ratio"),
        ("predict_rows_per_second_large", "predict_ratio_large"),
    )
    found = {}
    for data, each in figures.items():
        rows = []
        for name, values in each["libraries"].items():
            cells = [name]
            for rate, ratio in kinds:
                ours = "" if name == OURS else f"{values[ratio]:.1f}x"
                cells += [f"{values[rate]:,.0f}", ours]
            rows.append(cells)
        found[f"training_speed {data}"] = markdown.table(headings, rows)
    return found


def summary(figures: Mapping[str, Any]) -> str:
    words = []
    for data, each in figures.items():
        peers = {name: v for name, v in each["libraries"].items() if name != OURS}
        ratios = [
            f"{v['train_ratio']:.1f} and {v['predict_ratio']:.1f} times {name}"
            for name, v in peers.items()
        ]
        words.append(f"{data}: trains and predicts {', '.join(ratios)}")
    return "; ".join(words)


if __name__ == "__main__":
    main()
