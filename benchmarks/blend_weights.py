"""The blend weights of a preset, chosen on validation days.

The preset's MMoE, with trees where the preset has them, is trained without refit, so that its
validation days are held out. Of 200 choices of weights on every second user's rows, the one that
`mtl-ranker blend` proposes for even shares of engagement and satisfaction is taken, and evaluated
on the other users beside the preset's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import markdown, results
from benchmarks.prepared import examples_of, parser
from benchmarks.quality import CONSOLE
from mtl_ranker.config import load_project
from mtl_ranker.evaluation.pareto import Point
from mtl_ranker.models.presets import make
from mtl_ranker.nightly.blend_search import BlendSearch, trade_off
from mtl_ranker.nightly.contenders import Contender, train_model, with_trees
from mtl_ranker.nightly.results import predicted_rows

HEADINGS = ["", "weights", "engagement NDCG@10", "satisfaction NDCG@10"]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--preset", choices=["kuairand", "simulated"], required=True)
    chosen = results.parse(options)
    project = load_project(chosen.preset)
    parts = examples_of(project, chosen.data)
    spec = make("mmoe", project.models["mmoe"], len(parts.tasks), project.features.groups)
    run = train_model(project, parts, Contender("mmoe", spec, 0))
    if project.training.trees:
        run = with_trees(project, parts, run)
    rows = predicted_rows(parts.validation, run.validate_prediction)
    found = trade_off(project, rows, BlendSearch())
    figures = {
        "preset": chosen.preset,
        "validated": [str(day) for day in parts.days.validate],
        "choices": {
            "the preset's": _figures(found.current_on_test),
            "proposed": _figures(found.proposed_on_test),
        },
    }
    title = f"{chosen.preset}: on the users not chosen on"
    results.show(CONSOLE, HEADINGS, _rows(figures), title)
    results.write(chosen, figures)


def _figures(point: Point) -> dict[str, Any]:
    return {
        "weights": point.weights,
        "engagement": point.engagement,
        "satisfaction": point.satisfaction,
    }


def _rows(figures: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            ", ".join(f"{n} {w:.2g}" for n, w in each["weights"].items()),
            f"{each['engagement']:.4f}",
            f"{each['satisfaction']:.4f}",
        ]
        for name, each in figures["choices"].items()
    ]


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """The preset's weights and the proposed ones."""
    return {"blend_weights": markdown.table(HEADINGS, _rows(figures))}


def summary(figures: Mapping[str, Any]) -> str:
    each = figures["choices"]["proposed"]
    weights = ", ".join(f"{n} {w:.2g}" for n, w in each["weights"].items())
    return f"{figures['preset']}: {weights}"


if __name__ == "__main__":
    main()
