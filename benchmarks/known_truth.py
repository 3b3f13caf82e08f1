"""A shop's log with known true probabilities: how much of what can be learned is learned.

The shop is that of mtl_ranker/logs/shop.py, as one log of joined rows. The strongest signal is
whether an item's category is among its user's favourites. It is in no column of the log, but in two
tables whose columns share a vocabulary. The settings are defaults. Each model's AUC is printed
beside that of the true probabilities, and of item popularity; `share` is how far it is on the way
from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
from rich.progress import Progress
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.prepared import examples_of
from benchmarks.quality import CONSOLE, Predictions, compare, logistic, ranker, trees
from mtl_ranker.config import Project, parse_project
from mtl_ranker.evaluation.metrics import evaluate_all
from mtl_ranker.logs.shop import Shop, Size, make_shop, write_log
from mtl_ranker.nightly.results import baselines
from mtl_ranker.studies.search import Budget
from mtl_ranker.training.dataset import Dataset

PROJECT = """
name = "shop"

[log]
user = "user"
item = "item"
timestamp = "shown_at"
context = ["page"]

[log.users]
path = "users.parquet"
key = "user"
columns = ["country", "budget"]
lists = { favourites = "," }

[log.items]
path = "items.parquet"
key = "item"
columns = ["category", "brand", "price"]

[[objectives]]
name = "click"
group = "engagement"
label = "click"

[[objectives]]
name = "purchase"
group = "satisfaction"
label = "purchase"

[features]
windows = [3, 7]
matches = "{matches}"
entities = [["user_id"], ["item_id"], ["brand"], ["user_id", "category"]]
numerics = ["budget", "price"]
categoricals = [
  { column = "page" }, { column = "country" }, { column = "category" },
  { column = "brand", min_count = 5 }, { column = "item_id", min_count = 10 },
]
lists = [{ column = "favourites", max_length = 3 }]

[split]
train_days = 7

[models.mmoe]
preset = "mmoe"

[training]
epochs = {epochs}
trees = 200
"""


def truth(shop: Shop, parts: Dataset) -> np.ndarray:
    """True probabilities of the test rows: [N, 2]."""
    keys = {"user_id": "user", "item_id": "item", "timestamp": "shown_at"}
    hidden = shop.log.rename({old: new for new, old in keys.items()})
    rows = parts.held_out.frame.select(
        "user_id", "item_id", pl.col("timestamp").cast(pl.Datetime("ms")).cast(pl.Int64)
    )
    joined = rows.join(hidden, on=list(keys), how="left", maintain_order="left")
    if joined.height != rows.height or joined["true_click"].has_nulls():
        raise RuntimeError("test rows and the log's probabilities do not match one to one")
    return joined.select("true_click", "true_purchase").to_numpy()


def project_of(matches: str, epochs: int) -> Project:
    text = PROJECT.replace("{matches}", matches).replace("{epochs}", str(epochs))
    return parse_project(text, "known_truth")


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=40_000)
    options.add_argument("--epochs", type=int, default=30, help="at most; training stops early")
    options.add_argument("--trials", type=int, default=4, help="of tuning LightGBM")
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--seed", type=int, default=0, help="of the shop")
    options.add_argument("--no-peers", action="store_true", help="only the ranker, with matches")
    chosen = results.parse(options)
    folder = Path(mkdtemp(prefix="benchmark-shop-"))
    shop = make_shop(Size(chosen.impressions, chosen.seed))
    write_log(shop, folder)
    project = project_of("auto", chosen.epochs)
    parts = examples_of(project, folder)
    budget = Budget(chosen.trials, range(chosen.seeds))
    total = 4 * max(2, chosen.trials) + 4 * (chosen.trials + chosen.seeds) + 2 * chosen.seeds
    total = 2 * chosen.seeds + (0 if chosen.no_peers else total)
    with Progress(console=CONSOLE) as progress:
        bar = progress.add_task("training", total=total)

        def tick(words: str) -> None:
            progress.update(bar, advance=1, description=words)

        def named(model: Predictions, words: str) -> Predictions:
            return replace(model, name=f"{model.name}{words}")

        models = []
        if not chosen.no_peers:
            plain = project_of("none", chosen.epochs)
            without = examples_of(plain, folder)
            models = [
                named(logistic(without, chosen.trials, tick), ", without matches"),
                logistic(parts, chosen.trials, tick),
                named(trees(without, budget, tick, ["binary"])[0], ", without matches"),
                trees(parts, budget, tick, ["binary"])[0],
                *ranker("mtl_ranker, without matches", plain, without, budget.seeds, tick),
            ]
        models += ranker("mtl_ranker", project, parts, budget.seeds, tick)
    constant = baselines(parts.tasks, parts.frames["train"], parts.held_out)["item_popularity"]
    popular = evaluate_all(parts.tasks, parts.held_out.labels, constant, parts.held_out.lists)
    best = Predictions("true probabilities", [truth(shop, parts)], 0.0, fixed=True)
    found = compare(parts, [best, *models], best.name)
    figures: dict[str, Any] = {"train_rows": parts.frames["train"].height}
    for task in parts.tasks:
        low, high = popular[task.name]["auc"], found[best.name].metrics[task.name]["auc"]
        table = Table(title=f"{task.name}: item popularity {low:.4f}", title_justify="left")
        for heading in ("model", "AUC", "interval", "share"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        figures[task.name] = {"item_popularity": {"auc": low}}
        for name, each in found.items():
            auc, interval = each.metrics[task.name]["auc"], each.intervals[task.name]["auc"]
            share = (auc - low) / (high - low)
            table.add_row(
                name, f"{auc:.4f}", f"[{interval.low:.4f}, {interval.high:.4f}]", f"{share:.0%}"
            )
            figures[task.name][name] = {
                "auc": auc,
                "interval": [interval.low, interval.high],
                "share": share,
            }
        CONSOLE.print(table)
    results.write(chosen, figures)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """AUC and share of the way from item popularity to the true probabilities."""
    models = [name for name in figures["click"] if name != "item_popularity"]
    names = ("click", "purchase")
    rows = [["item popularity", *(f"{figures[n]['item_popularity']['auc']:.4f}" for n in names)]]
    for model in models:
        cells = [
            f"{found['auc']:.4f} [{found['interval'][0]:.4f}, {found['interval'][1]:.4f}], "
            f"{found['share']:.0%}"
            for found in (figures[n][model] for n in names)
        ]
        rows.append([model, *cells])
    return {"known_truth": markdown.table(["model", *names], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    ours, without = "mtl_ranker, trees, refit", "mtl_ranker, without matches, trees, refit"
    words = [
        f"{name}: {figures[name][ours]['share']:.0%} of the way from popularity to the truth, "
        f"{figures[name][without]['share']:.0%} without match features"
        for name in ("click", "purchase")
    ]
    return "; ".join(words)


if __name__ == "__main__":
    main()
