"""Variants of a model on the same real rows and seeds: a table, a picture and figures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.prepared import TITLES, folders, parser, preset_of, real_examples
from mtl_ranker.evaluation.influence import MEASURE_NAMES
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.sharing import SharingGain, sharing_gains, without_verdict
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.nightly.results import ModelRun, qualities, still_improving
from mtl_ranker.training.dataset import Dataset


@dataclass(frozen=True)
class Variant:
    """A model's settings, and what of `[training]` differs from the preset's."""

    name: str
    model: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Every variant × seed on one data set, and each variant's gain over the reference.

    Attributes:
        intervals: (variant, objective) → the measure by which models are compared.
        measures: objective → which that is: GAUC by list, AUC or R².
    """

    data: str
    parts: Dataset
    runs: dict[str, list[ModelRun]]
    intervals: dict[tuple[str, str], Interval]
    measures: dict[str, str]
    gains: list[SharingGain]
    reference: str


def compare(
    folder: Path, variants: Sequence[Variant], reference: str, seeds: Sequence[int], epochs: int
) -> Compared:
    """Train every variant × seed. `epochs` = 0 keeps the preset's; the model's settings take the
    preset's dropout.
    """
    project, parts = real_examples(folder)
    dropout = project.models["mmoe"].get("dropout", 0.1)
    runs: dict[str, list[ModelRun]] = {}
    jobs = [(variant, seed) for variant in variants for seed in seeds]
    for variant, seed in track(jobs, description=preset_of(folder), console=CONSOLE):
        changed = dict(variant.training) | ({"epochs": epochs} if epochs else {})
        training = project.training.model_copy(update=changed)
        own = project.model_copy(update={"training": training})
        own_dropout = {} if variant.model.get("preset") == "linear" else {"dropout": dropout}
        settings = {**own_dropout, **variant.model}
        spec = make(variant.name, settings, len(parts.tasks), project.features.groups)
        runs.setdefault(variant.name, []).append(
            train_model(own, parts, Contender(variant.name, spec, seed))
        )
    confidence = project.promotion.confidence
    quality = qualities(parts.tasks, runs, parts.held_out)
    return Compared(
        data=preset_of(folder),
        parts=parts,
        runs=runs,
        intervals={key: value.interval(confidence) for key, value in quality.items()},
        measures={objective: value.measure for (_, objective), value in quality.items()},
        gains=sharing_gains(quality, reference, confidence, still_improving(runs)),
        reference=reference,
    )


def options(description: str | None, picture: str) -> argparse.ArgumentParser:
    """The options of every benchmark that compares variants."""
    found = parser(description)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    found.add_argument("--picture", type=Path, default=Path("workspace") / picture)
    return found


Look = Callable[[Compared], Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Benchmark:
    """Variants to compare.

    Attributes:
        title: of tables and picture.
        reference: a variant's name; the first variant if None.
        look: prints more about each variant, and returns it as figures by the variant's name.
    """

    title: str
    reference: str | None = None
    look: Look | None = None


def run(
    found: argparse.ArgumentParser,
    variants: Callable[[argparse.Namespace], Sequence[Variant]],
    what: Benchmark,
) -> None:
    """Compare on every data set given: print, draw, write."""
    chosen = results.parse(found)
    wanted, done = variants(chosen), []
    written: dict[str, Any] = {}
    for folder in folders(chosen.data):
        base = what.reference or wanted[0].name
        done.append(compare(folder, wanted, base, range(chosen.seeds), chosen.epochs))
        show(done[-1], what.title)
        written[done[-1].data] = figures(done[-1])
        for name, more in what.look(done[-1]).items() if what.look is not None else ():
            written[done[-1].data]["models"][name].update(more)
    results.write(chosen, written)
    picture(done, chosen.picture, what.title)


CONSOLE = Console(width=175)
METRICS = ("ndcg_10", "auc", "log_loss", "calibration", "ece")


def show(found: Compared, title: str) -> None:
    """Every objective × variant with all metrics, parameters and time."""
    gains = {(g.model, g.objective): g for g in found.gains}
    seeds = len(next(iter(found.runs.values())))
    for task in found.parts.tasks:
        table = Table(title=f"{found.data}, {task.name}: {title}; mean of {seeds} seeds")
        table.add_column("model", no_wrap=True)
        measure = MEASURE_NAMES[found.measures[task.name]]
        for heading in (measure, "interval", f"gain over {found.reference}", "verdict"):
            table.add_column(heading, justify="right", no_wrap=True)
        for heading in ("NDCG@10", "AUC", "log loss", "calib", "ECE", "parameters", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, runs in found.runs.items():
            interval, gain = found.intervals[name, task.name], gains.get((name, task.name))
            mean = {k: np.mean([r.metrics[task.name][k] for r in runs]) for k in METRICS}
            table.add_row(
                name,
                f"{interval.value:.4f}",
                f"[{interval.low:.4f}, {interval.high:.4f}]",
                f"{gain.gain.value:+.4f} [{gain.gain.low:+.4f}, {gain.gain.high:+.4f}]"
                if gain
                else "",
                gain.verdict if gain else "",
                *("-" if np.isnan(mean[k]) else f"{mean[k]:.4f}" for k in METRICS),
                f"{runs[0].trained.model.parameter_count():,}",
                f"{np.mean([r.trained.seconds for r in runs]):.1f}",
            )
        CONSOLE.print(table)
    for reason in without_verdict(found.gains):
        CONSOLE.print(reason)


def figures(found: Compared) -> dict[str, Any]:
    """The same as plain numbers."""
    gains = {(g.model, g.objective): g for g in found.gains}
    result: dict[str, Any] = {}
    for name, runs in found.runs.items():
        objectives = {}
        for task in found.parts.tasks:
            interval, gain = found.intervals[name, task.name], gains.get((name, task.name))
            each = {k: [r.metrics[task.name][k] for r in runs] for k in ("gauc", *METRICS)}
            objectives[task.name] = {
                "measure": found.measures[task.name],
                "quality": interval.value,
                "interval": [interval.low, interval.high],
                **{k: None if np.isnan(np.mean(v)) else float(np.mean(v)) for k, v in each.items()},
                "auc_by_seed": each["auc"],
                "gain": None
                if gain is None
                else {
                    "value": gain.gain.value,
                    "interval": [gain.gain.low, gain.gain.high],
                    "verdict": gain.verdict,
                    "note": gain.note,
                },
            }
        result[name] = {
            "parameters": runs[0].trained.model.parameter_count(),
            "seconds": float(np.mean([r.trained.seconds for r in runs])),
            "validate_auc": float(np.mean([r.validate_quality for r in runs])),
            "warnings": sorted({w for r in runs for w in r.diagnosis.warnings}),
            "objectives": objectives,
        }
    return {"reference": found.reference, "models": result}


Column = Callable[[Mapping[str, Any]], str]


def columns_of(figures: Mapping[str, Any], more: Mapping[str, Column] | None = None) -> str:
    """Variants as rows of Markdown: every objective's quality, with a significant gain in brackets,
    then `more` columns, whose values of several data sets are side by side.
    """
    sets = {data: figures[data] for data in TITLES if data in figures}
    first = next(iter(sets.values()))["models"]
    objectives = [
        (data, objective)
        for data, found in sets.items()
        for objective in next(iter(found["models"].values()))["objectives"]
    ]
    more = more or {}
    rows = []
    for name in first:
        cells = [quality_text(sets[d]["models"][name]["objectives"][o]) for d, o in objectives]
        for text in more.values():
            cells.append(" / ".join(text(found["models"][name]) for found in sets.values()))
        rows.append([name, *cells])
    return markdown.table(["model", *(o for _, o in objectives), *more], rows)


def quality_text(found: Mapping[str, Any]) -> str:
    gain = found["gain"]
    sure = gain is not None and gain["verdict"] != "undecided"
    return f"{found['quality']:.4f}" + (f" ({gain['value']:+.4f})" if sure else "")


def significant(figures: Mapping[str, Any]) -> str:
    """How many of the gains over the reference are significant, and which."""
    gains = [
        (f"{name} {each['gain']['value']:+.4f} on {objective}", each["gain"]["verdict"])
        for found in figures.values()
        for name, model in found["models"].items()
        for objective, each in model["objectives"].items()
        if each["gain"] is not None
    ]
    sure = [words for words, verdict in gains if verdict != "undecided"]
    reference = next(iter(figures.values()))["reference"]
    undecidable = [
        each["gain"]["note"]
        for found in figures.values()
        for model in found["models"].values()
        for each in model["objectives"].values()
        if each["gain"] is not None and each["gain"]["note"]
    ]
    which = f": {', '.join(sure[:3])}{', …' * (len(sure) > 3)}" if sure else ""
    found = f"{len(sure)} of {len(gains)} gains over {reference} significant{which}"
    if not undecidable:
        return found
    return f"{found} ({len(undecidable)} without a verdict: the model's best epoch is its last)"


def picture(found: Sequence[Compared], path: Path, title: str) -> None:
    """Gain of each variant over the reference with its interval: a panel per objective."""
    panels = [(each, task) for each in found for task in each.parts.tasks]
    names = [n for n in found[0].runs if n != found[0].reference]
    size = (3.6 * len(panels) + 1.6, 0.34 * len(names) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    colours = {"helped": "tab:green", "hurt": "tab:red", "undecided": "0.45"}
    for axis, (each, task) in zip(axes, panels, strict=True):
        for gain in each.gains:
            if gain.objective == task.name:
                row, colour = names.index(gain.model), colours[gain.verdict]
                axis.plot([gain.gain.low, gain.gain.high], [row, row], color=colour)
                axis.plot(gain.gain.value, row, "o", color=colour, markersize=5)
        axis.axvline(0.0, color="0.7", linestyle=":")
        axis.locator_params(axis="x", nbins=4)
        base = each.intervals[each.reference, task.name].value
        axis.set(title=f"{each.data}: {task.name}", xlabel=f"gain over {base:.4f}")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(f"{title} (gain over {found[0].reference}, 95 % intervals)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    CONSOLE.print(f"picture: {path}")
