"""Candidates a second from a Parquet file to a ranked Parquet file, against DeepCTR-Torch's
`predict` on features joined with pandas.

The same candidates, windows as of the same morning (given to pandas as ready tables), fields and
MMoE (8 experts of 16 units, untrained: weights do not change the time). Pandas merges the tables,
maps categories and standardises numbers; predictions in blocks of 16,384 rows, where it is fastest;
then both keep each user's best 20. The same once more under rules on the lists: seen items, a block
list, creators, fresh items, and diversity of content embeddings. Peers:
`pip install -c constraints.txt -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.table import Table

from benchmarks import markdown, results
from benchmarks.measured import CONSOLE, in_process
from benchmarks.scale import (
    SMALL,
    aggregates,
    candidates,
    features,
    ingest,
    opened,
    scoring,
    simulate,
    some_rows,
    with_candidates,
)
from mtl_ranker.config import Rules
from mtl_ranker.features.encoders import Encoder, fit_encoder
from mtl_ranker.features.point_in_time import AsOf
from mtl_ranker.logs.sources import open_source
from mtl_ranker.models.presets import make
from mtl_ranker.ranking.artifact import RankerArtifact, RegisteredRanker
from mtl_ranker.ranking.candidates import load_candidates
from mtl_ranker.ranking.scoring import score_day
from mtl_ranker.training.network import build_ranker, tasks_of

IMPRESSIONS, DAYS, TOP = 1_000_000, 14, 20
CONTENT = 32  # numbers of an embedding
RULES: dict[str, Any] = {
    "seen_days": 3,
    "block": [{"path": "blocked.parquet", "key": ["item_id"]}],
    "at_most": [{"column": "creator", "count": 2, "within": 10}],
    "fresh": {"count": 2, "within": 10, "days": 3},
    "mmr": {"column": "content", "weight": 0.2},
}
BLOCK = 16_384


def prepare(place: str, count: int, per_user: int) -> dict[str, Any]:
    simulate(place, IMPRESSIONS, DAYS)
    with_content(Path(place) / "feed")
    for stage in (ingest, aggregates, features):
        stage(place)
    made = candidates(place, count, per_user)
    context = opened(place)
    project = context.project
    frame, _ = some_rows(context.workspace)
    encoder = fit_encoder(project, frame)
    tasks = tasks_of(project)
    model = build_ranker(make("mmoe", SMALL, len(tasks)), encoder, tasks).eval()
    RankerArtifact(project, encoder, tasks, model).save(Path(place) / "model")
    context = replace(context, project=with_candidates(project))
    day = date.fromisoformat(made["day"])
    as_of = AsOf.build(context, load_candidates(context, day), day)
    for entity in as_of.entities:
        entity.table.write_parquet(Path(place) / f"{entity.name}.parquet")
    for key, table in as_of.tables.items():
        table.collect().write_parquet(Path(place) / f"table_{key}.parquet")
    numbers = frame.select(pl.col(n).cast(pl.Float32) for n in encoder.numerics).to_numpy()
    np.save(Path(place) / "mean.npy", np.stack([np.nanmean(numbers, 0), np.nanstd(numbers, 0)]))
    return {"rows": made["rows"], "day": made["day"], "inputs": len(encoder.columns)}


def with_content(feed: Path) -> None:
    """Add content embeddings, around those of the topic, to the items, and a block list of 5 %."""
    rng = np.random.default_rng(0)
    items = pl.read_parquet(feed / "items.parquet")
    topics = rng.normal(size=(int(items["topic"].to_numpy().max()) + 1, CONTENT))
    content = topics[items["topic"].to_numpy()] + rng.normal(size=(items.height, CONTENT))
    numbers = pl.Series("content", content.astype(np.float32)).cast(pl.List(pl.Float32))
    items.with_columns(numbers).write_parquet(feed / "items.parquet")
    blocked = items.select("item").sample(fraction=0.05, seed=0)
    blocked.rename({"item": "item_id"}).write_parquet(feed / "blocked.parquet")


def scoring_with_rules(place: str, day: str) -> dict[str, Any]:
    context = opened(place)
    log = context.project.log
    assert log.items is not None
    columns = [*log.items.columns, "content"]
    items = log.items.model_copy(update={"columns": list(dict.fromkeys(columns))})
    scored = with_candidates(context.project)
    scoring = scored.scoring.model_copy(update={"rules": Rules.model_validate(RULES)})
    ruled = {"log": log.model_copy(update={"items": items}), "scoring": scoring}
    project = scored.model_copy(update=ruled)
    source = open_source(project, f"{context.source.root}", context.workspace)
    context = replace(context, project=project, source=source)
    ranker = RegisteredRanker(RankerArtifact.load(Path(place) / "model"), "benchmark")
    began, cpu = time.perf_counter(), time.process_time()
    ranked = score_day(context, ranker, date.fromisoformat(day))
    spent, cpu = time.perf_counter() - began, time.process_time() - cpu
    effects = [str(effect) for effect in ranked.effects]
    found = {"rows": ranked.candidates, "ranked": ranked.rows, "effects": effects}
    return found | {"seconds": spent, "cpu_seconds": cpu}


def pandas_and_deepctr(place: str, day: str) -> dict[str, Any]:
    import pandas as pd
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import MMOE

    context = opened(place)
    project, source = context.project, context.source
    encoder = Encoder.load(Path(place) / "model" / "encoder.json")
    mean, spread = np.load(Path(place) / "mean.npy")
    sparse = encoder.categoricals
    columns: list[Any] = [SparseFeat(v.column, v.size, 8) for v in sparse]
    columns.append(DenseFeat("numbers", len(encoder.numerics)))
    names = [task.name for task in tasks_of(project)]
    model = MMOE(
        columns,
        num_experts=8,
        expert_dnn_hidden_units=(16,),
        gate_dnn_hidden_units=(),
        tower_dnn_hidden_units=(8,),
        task_types=["binary"] * len(names),
        task_names=names,
    )
    began = time.perf_counter()
    frame = pd.read_parquet(source.root / "candidates" / f"date={day}")
    frame = frame.rename(columns={"user": "user_id", "item": "item_id"})
    frame = frame.drop(columns=["date"], errors="ignore")
    for key in ("user_id", "item_id"):
        table = pd.read_parquet(Path(place) / f"table_{key}.parquet")
        table = table.drop(columns=[c for c in table.columns if "tags" in c])
        frame = frame.merge(table, on=key, how="left")
    for keys in project.features.entities:
        name = "_x_".join(k.removesuffix("_id") for k in keys)
        table = pd.read_parquet(Path(place) / f"entity_{name}.parquet")
        frame = frame.merge(table, on=keys, how="left")
    if "item_age_days" not in frame:
        frame["item_age_days"] = 0.0
    inputs: dict[str, Any] = {}
    for vocabulary in sparse:
        known = {value: i + 1 for i, value in enumerate(vocabulary.values)}
        codes = frame[vocabulary.column].map(known).fillna(0).to_numpy(np.int64)
        if vocabulary.hash_buckets is not None:
            codes = 1 + frame[vocabulary.column].to_numpy(np.int64) % vocabulary.hash_buckets
        inputs[vocabulary.column] = codes
    numbers = frame[encoder.numerics].to_numpy(np.float32)
    inputs["numbers"] = np.nan_to_num((numbers - mean) / np.maximum(spread, 1e-6))
    joined = time.perf_counter()
    predicted = model.predict(inputs, batch_size=BLOCK)
    scored = time.perf_counter()
    ranked = frame[["user_id", "item_id", "surface"]].copy()
    for t, name in enumerate(names):
        ranked[name] = predicted[:, t]
    ranked["score"] = predicted.sum(1)
    ranked = ranked.drop_duplicates(["user_id", "item_id"])
    ranked = ranked.sort_values(["user_id", "score"], ascending=[True, False])
    ranked["rank"] = ranked.groupby("user_id").cumcount() + 1
    ranked[ranked["rank"] <= TOP].to_parquet(Path(place) / "ranked.parquet")
    ended = time.perf_counter()
    return {
        "rows": len(frame),
        "seconds": ended - began,
        "features_seconds": joined - began,
        "predict_seconds": scored - joined,
    }


NAMES = {
    "scoring": "mtl_ranker",
    "scoring_with_rules": "mtl_ranker with rules",
    "pandas_and_deepctr": "DeepCTR-Torch, pandas",
}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--candidates", type=int, default=2_000_000)
    options.add_argument("--per-user", type=int, default=500, help="candidates of each user")
    options.add_argument("--runs", type=int, default=2, help="of each, of which the fastest counts")
    options.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help="DeepCTR-Torch, too"
    )
    chosen = results.parse(options)
    place = Path(mkdtemp(prefix="scoring-"))
    found: dict[str, Any] = {}
    try:
        given = {"place": str(place)}
        more = {"count": chosen.candidates, "per_user": chosen.per_user}
        found["prepare"] = in_process(prepare, given | more)
        stages = [scoring, scoring_with_rules]
        if chosen.peer:
            stages.append(pandas_and_deepctr)
        day = found["prepare"]["day"]
        for _ in range(chosen.runs):  # in turns, as other load of the machine changes
            for stage in stages:
                CONSOLE.print(f"[dim]{stage.__name__} …[/]")
                run = in_process(stage, given | {"day": day})
                best = found.setdefault(stage.__name__, run)
                least = min(best, run, key=lambda each: each["seconds"])
                if "cpu_seconds" in run:  # on a busy machine of another run than the wall time
                    least |= {"cpu_seconds": min(best["cpu_seconds"], run["cpu_seconds"])}
                found[stage.__name__] = least
    finally:
        shutil.rmtree(place)
    table = Table(title=f"{found['prepare']['inputs']} features, {torch.get_num_threads()} threads")
    for heading in (
        "way",
        "candidates",
        "seconds",
        "CPU seconds",
        "candidates/s",
        "peak MB",
        "speed-up",
    ):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    ours = found["scoring"]["seconds"] / found["scoring"]["rows"]
    for name, title in shown(found):
        values = found[name]
        each = values["seconds"] / values["rows"]
        values["per_second"], values["ratio"] = 1 / each, each / ours
        table.add_row(
            title,
            f"{values['rows']:,}",
            f"{values['seconds']:.1f}",
            f"{values['cpu_seconds']:.1f}" if "cpu_seconds" in values else "–",
            f"{1 / each:,.0f}",
            f"{values['peak_mb']:,.0f}",
            f"{each / ours:.1f}x",
        )
    CONSOLE.print(table)
    plain, ruled = found["scoring"], found["scoring_with_rules"]
    CONSOLE.print(
        f"rules take {ruled['cpu_seconds'] / plain['cpu_seconds'] - 1:+.0%} CPU time",
        highlight=False,
    )
    for effect in ruled["effects"]:
        CONSOLE.print(effect, highlight=False)
    if chosen.peer:
        peer = found["pandas_and_deepctr"]
        CONSOLE.print(
            f"DeepCTR-Torch, pandas: {peer['features_seconds']:.1f} s for features, "
            f"{peer['predict_seconds']:.1f} s for predict; fastest of {chosen.runs} runs each"
        )
    results.write(chosen, found)


def shown(figures: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ways that were measured, with their titles."""
    return [(name, title) for name, title in NAMES.items() if name in figures]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    rows = [
        [
            title,
            f"{figures[name]['per_second']:,.0f}",
            f"{figures[name]['peak_mb']:,.0f}",
            "" if name == "scoring" else f"{figures[name]['ratio']:.1f} times slower",
        ]
        for name, title in shown(figures)
    ]
    return {"scoring_speed": markdown.table(["way", "candidates/s", "peak MB", ""], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    text = f"{figures['scoring']['per_second']:,.0f} candidates/s"
    if "scoring_with_rules" in figures:
        text += f", {figures['scoring_with_rules']['per_second']:,.0f} with rules"
    if "pandas_and_deepctr" in figures:
        ratio = figures["pandas_and_deepctr"]["ratio"]
        text += f", {ratio:.1f} times DeepCTR-Torch with pandas"
    return text


if __name__ == "__main__":
    main()
