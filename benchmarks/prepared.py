"""Real examples for the benchmarks: ingest, features and encoding as in a night."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from tempfile import mkdtemp

import torch

from mtl_ranker.config import Project, load_project
from mtl_ranker.context import Context, without_log
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.days import needed_days, split_days
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.sources import open_source
from mtl_ranker.training.dataset import Dataset, load_dataset
from mtl_ranker.workspace import Workspace


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark on real data has."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of KuaiRand-Pure, of Census-Income, or one that holds both",
    )
    found.add_argument("--json", type=Path, help="write the figures to this file")
    found.add_argument("--threads", type=int, default=0, help="of torch; 0 = all cores")
    return found


def parse(found: argparse.ArgumentParser) -> argparse.Namespace:
    chosen = found.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return chosen


def folders(data: Path) -> list[Path]:
    """The folders of real data at or right below `data`."""
    below = [data, *sorted(p for p in data.iterdir() if p.is_dir())]
    known = [p for p in below if (p / "log").is_dir() or (p / "census-income.data.gz").is_file()]
    if not known:
        raise SystemExit(f"--data {data}: no log/ and no census-income.data.gz here or one below")
    return known


def preset_of(data: Path) -> str:
    """Which shipped preset reads this folder."""
    return "kuairand" if (data / "log").is_dir() else "census"


def examples_of(project: Project, data: Path, last: date | None = None) -> Dataset:
    """The examples of the split that ends with `last` or the log's last day, built aside."""
    source, workspace = open_source(project, data), Workspace(Path(mkdtemp(prefix="benchmark-")))
    days = [d for d in source.days() if last is None or d <= last]
    needed = needed_days(project, days, days[-1])
    for day in needed:
        ingest_day(Context(project, source, workspace), day)
        aggregate_day(Context(project, source, workspace), day)
    split = split_days(project, needed, days[-1])
    for day in [*split.train, *split.validate, *split.test]:
        build_examples(Context(project, source, workspace), day)
    return load_dataset(without_log(project, workspace), days[-1])


def real_examples(data: Path) -> tuple[Project, Dataset]:
    project = load_project(preset_of(data))
    return project, examples_of(project, data)
