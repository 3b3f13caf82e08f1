"""Every model of the family on real data: what sharing does to each objective.

All models take the data's preset (`mtl_ranker/presets/`) and the family's own default sizes; the
reference is `single_task`, which shares nothing. Intervals draw users and seeds anew.
"""

from __future__ import annotations

from pathlib import Path

from prepared import folders, parse, parser, write_json
from variants import Variant, compare, figures, picture, show

from mtl_ranker.models.presets import PRESETS

MORE = [
    Variant("mmoe, 2 layers", {"preset": "mmoe", "layers": 2}),
    Variant("mmoe, mixed kinds", {"preset": "mmoe", "expert_kinds": ["mlp", "cross", "fm"]}),
    Variant("mmoe, 4 members", {"preset": "mmoe", "members": 4}),
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    options.add_argument("--models", nargs="*", help="only these presets (and single_task)")
    options.add_argument("--picture", type=Path, default=Path("workspace/model_family.png"))
    chosen = parse(options)
    variants = [Variant(name, {"preset": name}) for name in PRESETS] + MORE
    if chosen.models:
        variants = [v for v in variants if v.name in ("single_task", *chosen.models)]
    found = []
    for folder in folders(chosen.data):
        found.append(compare(folder, variants, "single_task", range(chosen.seeds), chosen.epochs))
        show(found[-1], "model family")
        write_json(chosen.json, {each.data: figures(each) for each in found})
    picture(found, chosen.picture, "Model family")


if __name__ == "__main__":
    main()
