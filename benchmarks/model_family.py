"""Every model of the family on real data: what sharing does to each objective.

All models take the data's preset (`mtl_ranker/presets/`) and the family's own default sizes; the
reference is `single_task`, which shares nothing. Intervals resample users and seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.variants import Benchmark, Variant, columns_of, options, run, significant
from mtl_ranker.models.presets import PRESETS

MORE = [
    Variant("mmoe, 2 layers", {"preset": "mmoe", "layers": 2}),
    Variant("mmoe, mixed kinds", {"preset": "mmoe", "expert_kinds": ["mlp", "cross", "fm"]}),
    Variant("mmoe, 4 members", {"preset": "mmoe", "members": 4}),
    Variant("shared_bottom, 4 members", {"preset": "shared_bottom", "members": 4}),
]


def family(chosen: argparse.Namespace) -> list[Variant]:
    variants = [Variant(name, {"preset": name}) for name in PRESETS] + MORE
    wanted = chosen.models and ("single_task", *chosen.models)
    return [v for v in variants if not wanted or v.name in wanted]


def main() -> None:
    found = options(__doc__, "model_family.png")
    found.add_argument("--models", nargs="*", help="only these presets (and single_task)")
    run(found, family, Benchmark("model family", "single_task"))


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    more = {
        "parameters": lambda model: f"{model['parameters']:,}",
        "seconds": lambda model: f"{model['seconds']:.1f}",
    }
    return {"model_family": columns_of(figures, more)}


def summary(figures: Mapping[str, Any]) -> str:
    return significant(figures)


if __name__ == "__main__":
    main()
