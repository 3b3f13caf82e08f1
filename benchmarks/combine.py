"""The mixture of experts: accumulated one expert at a time against the product with all of them.

The second one materialises [O, E, K, H, B] in the forward pass and again for its gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import markdown, results
from mtl_ranker.models.gates import combine

# O outputs, E experts, K members, H units, B rows.
SHAPES = {
    "MMoE 4 × 64, 3 objectives, 4 members": (3, 4, 4, 64, 1_024),
    "MMoE 8 × 16, 2 objectives": (2, 8, 1, 16, 2_048),
    "MMoE 8 × 64, 6 objectives": (6, 8, 1, 64, 2_048),
    "MMoE 16 × 128, 6 objectives": (6, 16, 1, 128, 1_024),
}
Formula = Callable[[Tensor, Tensor], Tensor]


def all_products(weights: Tensor, experts: Tensor) -> Tensor:
    """The formula that `combine` replaces."""
    return (weights.transpose(1, 2).unsqueeze(3) * experts.unsqueeze(0)).sum(1)


def milliseconds(formula: Formula, shape: tuple[int, ...], training: bool, repeats: int) -> float:
    """Of one call, with its gradients in training: the fastest of `repeats`."""
    outputs, experts, members, units, rows = shape
    torch.manual_seed(0)
    weights = torch.rand(outputs, 1, experts, rows, requires_grad=training)
    inputs = torch.randn(experts, members, units, rows, requires_grad=training)
    upstream = torch.randn(outputs, members, units, rows)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        mixture = formula(weights, inputs)
        if training:
            torch.autograd.grad(mixture, (weights, inputs), upstream)
        best = min(best, time.perf_counter() - began)
    return 1_000 * best


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The table of docs/performance.md."""
    rows = []
    for name, by_mode in figures["shapes"].items():
        cells = [name]
        for mode in ("inference", "training"):
            before, after = by_mode[mode]
            cells.append(f"{before:.2f} → {after:.2f} ms, {markdown.times(before / after)} times")
        rows.append(cells)
    return {"combine": markdown.table(["mixture", "inference", "training"], rows)}


def summary(figures: Mapping[str, Any]) -> str:
    """For the table of the scripts."""
    words = []
    for mode in ("inference", "training"):
        ratios = [by[mode][0] / by[mode][1] for by in figures["shapes"].values()]
        words.append(f"{min(ratios):.1f} to {max(ratios):.1f} times faster in {mode}")
    return ", ".join(words)


def main() -> None:
    """Print the table, and write the figures where the options say."""
    options = results.parser(__doc__)
    options.add_argument("--repeats", type=int, default=100)
    chosen = results.parse(options)
    shapes = {
        name: {
            mode: [
                milliseconds(formula, shape, mode == "training", chosen.repeats)
                for formula in (all_products, combine)
            ]
            for mode in ("inference", "training")
        }
        for name, shape in SHAPES.items()
    }
    figures = {"shapes": shapes}
    print(tables(figures)["combine"])
    print(summary(figures))
    results.write(chosen, figures)


if __name__ == "__main__":
    main()
