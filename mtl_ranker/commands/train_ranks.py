"""A night's training by several processes, on one machine or many.

    torchrun --nproc-per-node 2 -m mtl_ranker.commands.train_ranks -c feed.toml -w /work

Every model is trained from scratch, with any `training.start` and `training.contenders`. Every
rank reads the same workspace, as built by `mtl-ranker features` (on several machines, a shared
folder). Rank 0 logs the runs to MLflow and registers the winner as challenger; run
`mtl-ranker promote` and `mtl-ranker score` afterwards. If a rank fails, the others stop; with
`--max-restarts 3` all ranks are restarted and training is resumed from the last checkpoint.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from mtl_ranker.context import without_log
from mtl_ranker.environment import prepare as prepare_environment
from mtl_ranker.errors import ProjectError
from mtl_ranker.stores.objects import address_of, is_address


def main(
    config: Annotated[str, typer.Option("--config", "-c", help="Preset or project file.")],
    workspace: Annotated[
        Path, typer.Option("--workspace", "-w", help="Workspace with the examples.")
    ],
    day: Annotated[
        datetime | None,
        typer.Option("--date", formats=["%Y-%m-%d"], help="Day D; default: the last day."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Train only this model; repeatable.")
    ] = None,
) -> None:
    """Train the project's models data-parallel over all ranks and register the winner."""
    prepare_environment(workspace)
    _refuse_store(workspace)
    from mtl_ranker.config import load_project
    from mtl_ranker.features.examples import soft_objectives
    from mtl_ranker.nightly.plan import FROM_SCRATCH
    from mtl_ranker.nightly.suite import train_suite
    from mtl_ranker.nightly.trainers import OneProcess
    from mtl_ranker.reports.console import console
    from mtl_ranker.reports.tables import comparison_table
    from mtl_ranker.tracking import connection, registry
    from mtl_ranker.training.distributed import SUMMED, ranks
    from mtl_ranker.workspace import open_workspace

    project, work = load_project(config), open_workspace(workspace)
    unknown = set(model or []) - set(project.models)
    if unknown:
        allowed = ", ".join(project.models)
        raise ProjectError(f"--model {sorted(unknown)[0]}: allowed: {allowed}")
    if model:
        chosen = {name: project.models[name] for name in model}
        project = project.model_copy(update={"models": chosen})
    if project.training.balancing not in SUMMED:
        raise ProjectError(
            f"training.balancing = {project.training.balancing!r}: needs each objective's gradient "
            f"or loss, which ranks do not exchange; allowed here: {', '.join(SUMMED)}"
        )
    built = work.days("examples")
    if not built:
        raise ProjectError(f"{workspace}: no examples; run `mtl-ranker features` first")
    last = day.date() if day else work.days("events")[-1]
    with ranks(project.training.device) as world:
        context = without_log(project, work)
        plan = FROM_SCRATCH
        if soft_objectives(project):
            connection.connect(work)
            of_night = registry.night_plan(context, last)
            plan = replace(plan, prior=of_night.prior, prior_note=of_night.prior_note)
        suite = train_suite(context, last, trainer=OneProcess(world), plan=plan)
        if world.rank == 0:
            connection.connect(work)
            _, version, _ = registry.record(context, suite)
            console.print(comparison_table(suite, console.width))
            typer.echo(
                f"{world.size} ranks: {suite.winner.label} wins on validation; registered as "
                f"{project.name} version {version.version}, alias challenger"
            )
        world.wait()


def _refuse_store(workspace: Path) -> None:
    """Raise ProjectError for ranks of several hosts (by torchrun's variables) and an address."""
    here, everywhere = (os.environ.get(f"{of}WORLD_SIZE", "1") for of in ("LOCAL_", ""))
    if is_address(workspace) and here != everywhere:
        raise ProjectError(
            f"--workspace {address_of(workspace)}: ranks on several hosts share their rows and "
            "checkpoints; allowed: a folder that all hosts mount, or the ranks of one host"
        )


if __name__ == "__main__":
    from mtl_ranker.commands.app import run_app

    run_app(lambda: typer.run(main))
