"""Loss balancing against fixed weights: the same MMoE, rows and seeds."""

from __future__ import annotations

from variants import Variant, benchmark, options

from mtl_ranker.training.balancing import BALANCERS

if __name__ == "__main__":
    methods = [Variant(name, {"preset": "mmoe"}, {"balancing": name}) for name in BALANCERS]
    benchmark(options(__doc__, "balancing.png"), lambda _: methods, "fixed", "balancing of MMoE")
