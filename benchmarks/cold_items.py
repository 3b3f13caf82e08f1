"""What content embeddings give items that training has not seen, on a simulated feed.

The feed's items have content embeddings, noisy linear images of the tastes that decide clicks and
likes. The same model is trained on the same rows with and without `features.embeddings`. Test rows
are of the day after training and validation: those of items that were published after the last
training day, and all others. The true probabilities of the feed give the best AUC.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks import markdown, results
from benchmarks.delays import mean_with_interval
from benchmarks.measured import CONSOLE
from mtl_ranker.config import Project, load_project
from mtl_ranker.context import Context
from mtl_ranker.features.columns import LABEL
from mtl_ranker.logs.simulate import Feed, make_world, simulate, truth
from mtl_ranker.logs.sources import open_source
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.contenders import Contender, train_model
from mtl_ranker.training.dataset import load_dataset
from mtl_ranker.training.specs import model_specs
from mtl_ranker.workspace import Workspace

MODEL = "shared_bottom"
COLUMN = "content"
WAYS = {"without": [], "with embeddings": [COLUMN]}
PARTS = ("unseen items", "other items")
NAMES = ("click", "like")


def project_of(embeddings: list[str], epochs: int) -> Project:
    """The preset with one model and its binary objectives, with or without the vectors."""
    preset = load_project("simulated")
    items = preset.log.items
    assert items is not None
    columns = [*items.columns, *embeddings]
    log = preset.log.model_copy(update={"items": items.model_copy(update={"columns": columns})})
    training = {"epochs": epochs, "refit": False, "spread_seeds": 0}
    return preset.model_copy(
        update={
            "log": log,
            "objectives": [o for o in preset.objectives if o.name in NAMES],
            "features": preset.features.model_copy(update={"embeddings": embeddings}),
            "models": {MODEL: preset.models[MODEL]},
            "training": preset.training.model_copy(update=training),
        }
    )


def one_way(embeddings: list[str], data: Path, feed: Feed, epochs: int) -> dict[str, float]:
    """`PART OBJECTIVE` → AUC of a model on the last day, and `best PART OBJECTIVE`."""
    workspace = Workspace(Path(mkdtemp(prefix="benchmark-cold-items-")))
    project = project_of(embeddings, epochs)
    context = Context(project, open_source(project, data), workspace)
    day = feed.first_day + timedelta(days=feed.days - 1)
    build_split(context, day)
    dataset = load_dataset(context, day)
    spec = model_specs(project)[MODEL]
    run = train_model(project, dataset, Contender(MODEL, spec, feed.seed))
    rows = dataset.frames["test"]
    predicted = run.artifact.predict(rows)
    true = best(feed, rows)
    unseen = ~rows["item_id"].is_in(dataset.frames["train"]["item_id"].unique().implode())
    found = {"unseen items rows": float(unseen.sum()), "other items rows": float((~unseen).sum())}
    for part, which in zip(PARTS, (unseen, ~unseen), strict=True):
        for name in NAMES:
            label = rows.filter(which)[LABEL + name]
            known = label.is_not_null()
            for kind, scores in (("", predicted), ("best ", true)):
                own = scores.filter(which).filter(known)[name]
                found[f"{kind}{part} {name}"] = float(roc_auc_score(label.filter(known), own))
    shutil.rmtree(workspace.root)
    return found


def best(feed: Feed, rows: pl.DataFrame) -> pl.DataFrame:
    """The true probabilities of examples, at an examined position as a candidate's."""
    user, item = (rows[key].to_numpy() for key in ("user_id", "item_id"))
    click, like, _ = truth(make_world(feed), user, item)
    return pl.DataFrame({"click": click, "like": click * like})


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=120_000)
    options.add_argument("--items", type=int, default=2_000)
    options.add_argument("--epochs", type=int, default=6, help="at most")
    options.add_argument("--seeds", type=int, default=3, help="feeds, each with its own training")
    chosen = results.parse(options)
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with Progress(console=CONSOLE) as progress:
        bar = progress.add_task("training", total=chosen.seeds * len(WAYS))
        for seed in range(chosen.seeds):
            feed = Feed(chosen.impressions, seed=seed, users=2_000, items=chosen.items)
            data = simulate(feed, Path(mkdtemp(prefix="benchmark-cold-items-feed-")))
            for way, embeddings in WAYS.items():
                runs[way].append(one_way(embeddings, data, feed, chosen.epochs))
                progress.update(bar, advance=1, description=f"seed {seed}, {way}")
            shutil.rmtree(data)
    without, given = runs.values()
    figures: dict[str, Any] = {}
    table = Table(title=f"AUC, means and 95 % intervals over {chosen.seeds} feeds")
    for heading in ("rows", "objective", *WAYS, "gain", "true probabilities"):
        table.add_column(heading)
    for part in PARTS:
        for name in NAMES:
            key = f"{part} {name}"
            gains = [b[key] - a[key] for a, b in zip(without, given, strict=True)]
            own: dict[str, Any] = {
                way: mean_with_interval([r[key] for r in runs[way]]) for way in WAYS
            }
            own["gain"] = mean_with_interval(gains)
            own["best"] = float(np.mean([r[f"best {key}"] for r in given]))
            own["rows"] = float(np.mean([r[f"{part} rows"] for r in given]))
            figures[key] = own
            table.add_row(
                f"{part}, {own['rows']:,.0f}", name,
                *(f"{own[way][0]:.4f}" for way in WAYS), _signed(own["gain"]), f"{own['best']:.4f}",
            )  # fmt: skip
    CONSOLE.print(table)
    results.write(chosen, figures)


def _signed(gain: list[float]) -> str:
    return f"{gain[0]:+.4f} [{gain[1]:+.4f}, {gain[2]:+.4f}]"


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """AUC of unseen and of other items, with and without content embeddings."""
    rows = [
        [
            f"{part}, {name}",
            *(f"{figures[f'{part} {name}'][way][0]:.4f}" for way in WAYS),
            _signed(figures[f"{part} {name}"]["gain"]),
            f"{figures[f'{part} {name}']['best']:.4f}",
        ]
        for part in PARTS
        for name in NAMES
    ]
    return {"cold_items": markdown.table(["AUC", *WAYS, "gain", "true probabilities"], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    words = [f"{name} {_signed(figures[f'unseen items {name}']['gain'])}" for name in NAMES]
    return f"AUC of unseen items: {', '.join(words)}"


if __name__ == "__main__":
    main()
