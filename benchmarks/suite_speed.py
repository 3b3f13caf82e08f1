"""The suite's trainings side by side against one after the other, and that the results agree."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from measured import CONSOLE
from prepared import folders, parse, parser, preset_of, real_examples
from rich.table import Table

from mtl_ranker.nightly.suite import train_all
from mtl_ranker.training.network import model_specs
from mtl_ranker.workspace import write_json


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=2)
    options.add_argument("--epochs", type=int, default=0, help="0 = the preset's")
    chosen = parse(options)
    cores = chosen.threads or torch.get_num_threads()
    results: dict[str, Any] = {}
    for folder in folders(chosen.data):
        project, parts = real_examples(folder)
        ways = {
            "one after the other, all threads": {"jobs": 1, "threads": cores},
            "one after the other, one thread": {"jobs": 1, "threads": 1},
            "side by side, one thread each": {"jobs": cores, "threads": 1},
        }
        found: dict[str, Any] = {}
        predictions = {}
        for name, how in ways.items():
            update = how | {"seeds": list(range(chosen.seeds))}
            update |= {"epochs": chosen.epochs} if chosen.epochs else {}
            training = project.training.model_copy(update=update)
            own = project.model_copy(update={"training": training})
            began = time.perf_counter()
            runs = train_all(own, parts, model_specs(own))
            found[name] = {"seconds": time.perf_counter() - began, "trainings": len(runs)}
            predictions[name] = np.stack([run.test_prediction for run in runs])
        best = min(v["seconds"] for k, v in found.items() if k.startswith("one"))
        table = Table(title=f"{preset_of(folder)}: {len(model_specs(project))} models")
        for heading in ("how", "trainings", "seconds", "throughput"):
            table.add_column(heading, justify="left" if heading == "how" else "right")
        for name, values in found.items():
            values["ratio"] = best / values["seconds"]
            row = f"{values['trainings']}", f"{values['seconds']:.1f}", f"{values['ratio']:.2f}x"
            table.add_row(name, *row)
        CONSOLE.print(table)
        names = list(ways)
        same = np.array_equal(predictions[names[1]], predictions[names[2]])
        CONSOLE.print(f"{cores} cores; with one thread each the predictions are equal: {same}")
        results[preset_of(folder)] = {"ways": found, "cores": cores, "equal": bool(same)}
    write_json(chosen.json, results)


if __name__ == "__main__":
    main()
