"""What each user's latest clicks add as a sequence that attends to the candidate, on a feed whose
users have tastes: the simulated preset without histories, and with several.

The two binary objectives of the simulated feed; everything else as in `ablation.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from benchmarks import ablation, results
from benchmarks.ablation import Size, ablate, section
from mtl_ranker.config import History, load_project
from mtl_ranker.logs.simulate import Feed, simulate

VARIANTS = {
    "without": [],
    "topic, last 20": [History(signal="click", columns=["topic"], length=20)],
    "topic and creator, last 20": [
        History(signal="click", columns=["topic", "creator"], length=20)
    ],
    "topic and creator, last 50": [
        History(signal="click", columns=["topic", "creator"], length=50)
    ],
    "clicks and likes, topic": [
        History(signal="click", columns=["topic"], length=20),
        History(signal="like", columns=["topic"], length=20),
    ],
}


def main() -> None:
    options = results.parser(__doc__)
    options.add_argument("--impressions", type=int, default=150_000)
    options.add_argument("--seeds", type=int, default=3)
    chosen = results.parse(options)
    feed = simulate(Feed(impressions=chosen.impressions), Path(mkdtemp(prefix="benchmark-")))
    preset = load_project("simulated")
    binary = [o for o in preset.objectives if o.kind == "binary"]
    preset = preset.model_copy(update={"objectives": binary})
    projects = {n: section("features", histories=h)(preset) for n, h in VARIANTS.items()}
    found = ablate(projects, feed, Size(chosen.seeds))
    results.write(chosen, found)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    return {"histories": ablation.variants_table(figures)}


def summary(figures: Mapping[str, Any]) -> str:
    return ablation.summary(figures)


if __name__ == "__main__":
    main()
