"""Loss balancing against fixed weights: the same MMoE, rows and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.variants import Benchmark, Variant, columns_of, options, run, significant
from mtl_ranker.training.balancing import BALANCERS


def main() -> None:
    methods = [Variant(name, {"preset": "mmoe"}, {"balancing": name}) for name in BALANCERS]
    found = options(__doc__, "balancing.png")
    run(found, lambda _: methods, Benchmark("balancing of MMoE", "fixed"))


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    seconds = {"seconds": lambda model: f"{model['seconds']:.1f}"}
    return {"balancing": columns_of(figures, seconds)}


def summary(figures: Mapping[str, Any]) -> str:
    return significant(figures)


if __name__ == "__main__":
    main()
