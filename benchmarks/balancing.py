"""Loss balancing against fixed weights: the same MMoE, rows and seeds."""

from __future__ import annotations

from pathlib import Path

from prepared import folders, parse, parser, write_json
from variants import Variant, compare, figures, picture, show

from mtl_ranker.training.balancing import BALANCERS


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    options.add_argument("--picture", type=Path, default=Path("workspace/balancing.png"))
    chosen = parse(options)
    variants = [Variant(name, {"preset": "mmoe"}, {"balancing": name}) for name in BALANCERS]
    found = []
    for folder in folders(chosen.data):
        found.append(compare(folder, variants, "fixed", range(chosen.seeds), chosen.epochs))
        show(found[-1], "loss balancing of MMoE")
        write_json(chosen.json, {each.data: figures(each) for each in found})
    picture(found, chosen.picture, "Loss balancing of MMoE")


if __name__ == "__main__":
    main()
