"""Real examples for the benchmarks: ingest, features and encoding as in a night."""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from tempfile import mkdtemp

from benchmarks import results
from mtl_ranker.config import Project, load_project
from mtl_ranker.context import Context
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.build import build_split
from mtl_ranker.training.dataset import Dataset, load_dataset
from mtl_ranker.workspace import Workspace

# The data's names in tables, in their order there.
TITLES = {"kuairand": "KuaiRand", "census": "Census-Income"}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark on real data has."""
    found = results.parser(description)
    found.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder of KuaiRand-Pure, of Census-Income, or one that holds both",
    )
    return found


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
    """The examples of the split that ends with `last`, or with the log's last day.

    They are built in a temporary workspace.
    """
    workspace = Workspace(Path(mkdtemp(prefix="benchmark-")))
    context = Context(project, open_source(project, data), workspace)
    days = [day for day in context.source.days() if last is None or day <= last]
    build_split(context, days[-1])
    return load_dataset(context, days[-1])


def real_examples(data: Path) -> tuple[Project, Dataset]:
    project = load_project(preset_of(data))
    return project, examples_of(project, data)
