"""What each idea in the preset for KuaiRand gives: the preset with one idea taken away or added.

Every variant builds its own features, trains the same MMoE with every seed on the same days and is
compared with the preset on the same test rows (users and seeds resampled, paired). `--test-days`
counts back from `--date`, so that the days which `quality.py` reports can be left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import (
    COMPARED,
    CONSOLE,
    HEADINGS,
    SHOWN,
    Predictions,
    compare,
    gain_text,
    number,
    plain_gain,
)
from mtl_ranker.config import History, Project, load_project
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, refit, train_model, with_trees
from mtl_ranker.training.dataset import Dataset

Change = Callable[[Project], Project]
PRESET = "preset"


def section(name: str, **changes: Any) -> Change:
    """The project with some settings of one section changed."""

    def change(project: Project) -> Project:
        made = getattr(project, name).model_copy(update=changes)
        return project.model_copy(update={name: made})

    return change


def model(**changes: Any) -> Change:
    def change(project: Project) -> Project:
        models = {**project.models, "mmoe": {**project.models["mmoe"], **changes}}
        return project.model_copy(update={"models": models})

    return change


def entity(*keys: str) -> Change:
    def change(project: Project) -> Project:
        entities = [*project.features.entities, list(keys)]
        return section("features", entities=entities)(project)

    return change


@dataclass(frozen=True)
class Size:
    """How much is trained: seeds of each variant, up to which day."""

    seeds: int
    last: date | None = None


VARIANTS: dict[str, Change] = {
    PRESET: lambda project: project,
    "without refit": section("training", refit=False),
    "without trees": section("training", trees=0),
    "losses not normalised": section("training", balancing="fixed"),
    "without edges in long tails": section("features", tail_edges=0),
    "without members": model(members=1),
    "shared bottom instead of MMoE": model(preset="shared_bottom"),
    "batches of 1024 at 1e-3": section("training", batch_size=1024, learning_rate=1e-3),
    "windows of 3 and 14 days": section("features", windows=[3, 14]),
    "a window of 3 days": section("features", windows=[3]),
    "with rates by tab alone": entity("tab"),
    "with rates by user and video type": entity("user_id", "video_type"),
    "with rates by user and music type": entity("user_id", "music_type"),
    "standardised numbers": section("features", numeric_encoding="standardise"),
    "one calibration for all tabs": section("calibration", by=None),
    "isotonic calibration": section("calibration", method="isotonic"),
    "no calibration": section("calibration", method="none"),
    "refit calibrated in full": section("calibration", refit_share=1.0),
    "with histories (target attention)": section(
        "features",
        histories=[History(signal="is_click", columns=["item_id", "tag"], length=16)],
    ),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument(
        "--date", type=date.fromisoformat, help="last test day; default: the log's"
    )
    options.add_argument("--test-days", type=int, default=2)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--only", nargs="*", help="these variants (and the preset)")
    chosen = results.parse(options)
    unknown = set(chosen.only or ()) - set(VARIANTS)
    if unknown:
        raise SystemExit(f"--only {sorted(unknown)}: allowed: {', '.join(VARIANTS)}")
    names = [n for n in VARIANTS if n == PRESET or not chosen.only or n in chosen.only]
    split = section("split", test_days=chosen.test_days, train_days=28)
    projects = {name: VARIANTS[name](split(load_project("kuairand"))) for name in names}
    size = Size(chosen.seeds, chosen.date)
    results.write(chosen, ablate(projects, chosen.data, size))


def ablate(projects: Mapping[str, Project], data: Path, size: Size) -> dict[str, Any]:
    """Train, compare and print the variants of a project; the first is the reference.

    Returns the figures of each variant.
    """
    models, parts = [], None
    for name, project in track(projects.items(), description="variants", console=CONSOLE):
        parts = examples_of(project, data, size.last)
        models.append(train(name, project, parts, size.seeds))
    assert parts is not None
    reference = models[0].name
    found = compare(parts, models, reference)
    days = parts.days
    CONSOLE.print(
        f"train {days.train[0]}..{days.train[-1]}, validate {days.validate[0]}, "
        f"test {days.test[0]}..{days.test[-1]} ({len(parts.held_out.user):,} rows), "
        f"{size.seeds} seeds; * significant"
    )
    for task in parts.tasks:
        table = Table(title=task.name, title_justify="left")
        table.add_column("variant", no_wrap=True)
        over = [f"{measure} over {reference}" for measure in COMPARED.values()]
        for heading in (*HEADINGS, *over):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, each in found.items():
            values = [number(each.metrics[task.name][k]) for k in SHOWN]
            gains = each.gains[task.name]
            texts = ["" if name == reference else gain_text(gains[k]) for k in COMPARED]
            table.add_row(name, *values, *texts)
        CONSOLE.print(table)
    CONSOLE.print("seconds  " + "; ".join(f"{m.name}: {m.seconds:,.0f}" for m in models))
    seconds = {m.name: m.seconds for m in models}
    return {
        name: {
            "seconds": seconds[name],
            "objectives": {
                objective: {
                    **each.metrics[objective],
                    "over_reference": {
                        k: plain_gain(gain) for k, gain in each.gains[objective].items()
                    },
                }
                for objective in each.metrics
            },
        }
        for name, each in found.items()
    }


def train(name: str, project: Project, parts: Dataset, seeds: int) -> Predictions:
    spec = make("mmoe", project.models["mmoe"], len(parts.tasks), project.features.groups)
    predictions: list[np.ndarray] = []
    began = time.perf_counter()
    for seed in range(seeds):
        run = train_model(project, parts, Contender("mmoe", spec, seed))
        if project.training.trees:
            run = with_trees(project, parts, run)
        if project.training.refit:
            run = refit(project, parts, run)
        predictions.append(run.test_prediction)
    return Predictions(name, predictions, time.perf_counter() - began)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """List GAUC / AUC of the preset, what each variant gains over it in both, and its ECE."""
    return {
        "ablation": variants_table(figures),
        "ablation auc": variants_table(figures, "auc"),
    }


def variants_table(figures: Mapping[str, Any], measure: str = "gauc") -> str:
    """A row per variant: the gain of a measure by objective, and the first objective's ECE."""
    reference, first = next(iter(figures.items()))
    objectives = list(first["objectives"])
    rows = []
    for name, each in figures.items():
        cells = [
            f"{own['gauc']:.4f} / {own['auc']:.4f}"
            if name == reference
            else markdown.gain(*own["over_reference"][measure])
            for own in each["objectives"].values()
        ]
        rows.append([name, *cells, f"{each['objectives'][objectives[0]]['ece']:.4f}"])
    return markdown.table(["variant", *objectives, "ECE"], rows)


def summary(figures: Mapping[str, Any]) -> str:
    """The variants that differ significantly from the first in any objective's GAUC by list."""
    reference, *others = figures
    words = []
    for name in others:
        gains = {n: o["over_reference"]["gauc"] for n, o in figures[name]["objectives"].items()}
        sure = {n: value for n, (value, _, _, verdict) in gains.items() if verdict}
        words += [f"{name} {v:+.4f} on {n}" for n, v in list(sure.items())[:1]]
    return f"list GAUC over {reference}, significant: {'; '.join(words) or 'none'}"


if __name__ == "__main__":
    main()
