"""Likes that come up to three days late: what a training makes of the latest days.

A simulated feed whose tastes drift, with streams of actions and known delays. Each way trains the
same model as of the end of day D, and predicts the impressions of the next day, whose true
probabilities are known:

- `wait` leaves days out whose likes are not final;
- `positives` trains on them without the negatives that may still turn;
- `soft` counts such a negative as positive with a probability, with p the base rate, and with p of
  the model of the night before;
- `as observed` takes every negative for final, and `final labels` knows all likes already: what the
  others would lose, and what they could gain.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE
from mtl_ranker.config import Project, load_project
from mtl_ranker.context import Context
from mtl_ranker.evaluation.intervals import mean_interval
from mtl_ranker.features.aggregates import aggregate_day
from mtl_ranker.features.examples import build_examples
from mtl_ranker.logs.ingest import ingest_day
from mtl_ranker.logs.simulate import Feed, simulate
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Contender, refit, train_model
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.soft_labels import Prior
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import Workspace

WINDOW = 3  # days after which likes are final
MODEL = "shared_bottom"
KEYS = ["user", "item", "shown_at_ms"]
WAYS = (
    "wait", "positives", "soft, p the base rate", "soft, p of a model", "as observed",
    "final labels",
)  # fmt: skip
AFTER = "soft, p of a model"  # trained after the way before it, whose night before gives p


def project_of(immature: str, epochs: int) -> Project:
    """The preset with the two binary objectives, one model and its refit."""
    preset = load_project("streams")
    training = {"immature": immature, "epochs": epochs, "spread_seeds": 0}
    return preset.model_copy(
        update={
            "objectives": [o for o in preset.objectives if o.kind == "binary"],
            "models": {MODEL: preset.models[MODEL]},
            "training": preset.training.model_copy(update=training),
            "calibration": preset.calibration.model_copy(update={"refit_share": 0.0}),
        }
    )


def trained(context: Context, night: date, seed: int, prior: Prior | None = None) -> RankerArtifact:
    """The model as of the end of a day, trained on training and validation days."""
    build_split(context, night)
    dataset = load_dataset(context, night, prior=prior)
    spec = model_specs(context.project)[MODEL]
    run = train_model(context.project, dataset, Contender(MODEL, spec, seed))
    return refit(context.project, dataset, run).artifact


def of_model(artifact: RankerArtifact, digest: str) -> Prior:
    return Prior(artifact.predict, ["click", "like"], digest)


def nothing(frame: pl.DataFrame) -> pl.DataFrame:
    """Predicts that no negative turns."""
    return pl.DataFrame({name: np.zeros(frame.height) for name in ("click", "like")})


def one_way(way: str, data: Path, feed: Feed, epochs: int) -> dict[str, float]:
    """Calibration and AUC of likes on the day after D, the feed's fourth last day."""
    night = feed.first_day + timedelta(days=feed.days - WINDOW - 2)
    immature = way.partition(",")[0]
    immature = {"final labels": "wait", "as observed": "soft"}.get(immature, immature)
    project = project_of(immature, epochs)
    workspace = Workspace(Path(mkdtemp(prefix="benchmark-delays-")))
    context = Context(project, open_source(project, data), workspace)
    prior = None
    if way == AFTER:
        before = night - timedelta(days=1)
        prior = of_model(trained(context, before, feed.seed), str(before))
    elif way == "as observed":
        prior = Prior(nothing, ["click", "like"], "nothing")
    known = night + timedelta(days=WINDOW) if way == "final labels" else night
    artifact = trained(context, known, feed.seed, prior)
    day = night + timedelta(days=1)
    for each in (night, day):
        ingest_day(context, each)
        aggregate_day(context, each)
    build_examples(context, day, known if known > day else day)
    frame = workspace.scan("examples", [day]).collect()
    shown = pl.col("timestamp").cast(pl.Datetime("ms")).to_physical().alias(KEYS[2])
    rows = frame.select(pl.col("user_id").alias("user"), pl.col("item_id").alias("item"), shown)
    hidden = pl.read_parquet(data / f"truth/date={day}/*.parquet", hive_partitioning=False)
    true = rows.join(hidden, on=KEYS, how="left", maintain_order="left", validate="1:1")
    chance = (true["click_probability"] * true["like_given_click"]).to_numpy()
    predicted = artifact.predict(frame)["like"].to_numpy()
    shutil.rmtree(workspace.root)
    return {
        "ratio": float(predicted.sum() / chance.sum()),
        "auc": expected_auc(chance, predicted),
        "best_auc": expected_auc(chance, chance),
        "last_day": (artifact.last_day or night).toordinal() - night.toordinal(),
    }


def expected_auc(chance: np.ndarray, predicted: np.ndarray) -> float:
    """The AUC of predictions [N] where each row is a positive with a known probability [N]."""
    label = np.repeat([1, 0], len(chance))
    weight = np.concatenate([chance, 1 - chance])
    return float(roc_auc_score(label, np.tile(predicted, 2), sample_weight=weight))


def mean_with_interval(values: Sequence[float]) -> list[float]:
    """Mean and the ends of a 95 % interval over seeds (Student's t); NaN ends of one value."""
    if len(values) < 2:
        return [float(np.mean(values)), float("nan"), float("nan")]
    found = mean_interval(np.array(values))
    return [found.value, found.low, found.high]


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=120_000)
    options.add_argument("--days", type=int, default=12, help="up to D")
    options.add_argument("--drift", type=float, default=0.2, help="of tastes, a day")
    options.add_argument("--epochs", type=int, default=8, help="at most")
    options.add_argument("--seeds", type=int, default=4, help="feeds, each with its own training")
    chosen = results.parse(options)
    days = chosen.days + WINDOW + 1
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with Progress(console=CONSOLE) as progress:
        bar = progress.add_task("training", total=chosen.seeds * len(WAYS))
        for seed in range(chosen.seeds):
            feed = Feed(
                chosen.impressions * days // chosen.days,
                days,
                seed=seed,
                users=2_000,
                items=1_000,
                drift=chosen.drift,
                streams=True,
            )
            data = simulate(feed, Path(mkdtemp(prefix="benchmark-delays-feed-")))
            for way in WAYS:
                runs[way].append(one_way(way, data, feed, chosen.epochs))
                progress.update(bar, advance=1, description=f"seed {seed}, {way}")
            shutil.rmtree(data)
    best = [each["auc"] for each in runs["final labels"]]
    figures: dict[str, Any] = {
        way: {
            "ratio": mean_with_interval([r["ratio"] for r in found]),
            "auc": mean_with_interval([r["auc"] for r in found]),
            "behind": mean_with_interval([r["auc"] - b for r, b in zip(found, best, strict=True)]),
            "last_day": int(found[0]["last_day"]),
        }
        for way, found in runs.items()
    }
    truth = [r["best_auc"] for r in runs["wait"]]
    found = {"seeds": chosen.seeds, "true": mean_with_interval(truth), "ways": figures}
    table = Table(title="Likes of the next day, against their true probabilities")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in _rows(found):
        table.add_row(*row)
    CONSOLE.print(table)
    results.write(chosen, found)


HEADINGS = (
    "labels of open days", "last day trained on", "predicted / true", "AUC",
    "AUC minus that of final labels",
)  # fmt: skip


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    def cell(values: Sequence[float], sign: str = "") -> str:
        mean, low, high = (float("nan") if v is None else v for v in values)
        text = f"{mean:{sign}.4f}"
        return text if np.isnan(low) else f"{text} [{low:{sign}.4f}, {high:{sign}.4f}]"

    return [
        [
            way,
            f"D{found['last_day']:+d}" if found["last_day"] else "D",
            cell(found["ratio"]),
            cell(found["auc"]),
            "" if way == "final labels" else cell(found["behind"], "+"),
        ]
        for way, found in figures["ways"].items()
    ]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    return {"delays": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    ways = figures["ways"]
    words = [
        f"{way}: predicted / true {ways[way]['ratio'][0]:.2f}, AUC {ways[way]['auc'][0]:.4f}"
        for way in ("wait", "positives", "soft, p of a model")
    ]
    return "; ".join(words) + f" (true probabilities {figures['true'][0]:.4f})"


if __name__ == "__main__":
    main()
