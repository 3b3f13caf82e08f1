"""The command line `mtl-ranker`.

Exit codes: 0 success, 1 unexpected error, 2 a mistake in project file, data or command.
Heavy imports are inside the commands, so that `mtl-ranker --help` answers at once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from mtl_ranker.environment import prepare
from mtl_ranker.errors import ProjectError, first_line, is_outside
from mtl_ranker.stores.copies import local_folder
from mtl_ranker.stores.objects import seen_by_workers

if TYPE_CHECKING:
    from mtl_ranker.config import Project
    from mtl_ranker.context import Context
    from mtl_ranker.workspace import Workspace

# Panels of `mtl-ranker --help`.
NIGHT, OPERATE = "Nightly pipeline", "Operation"
ANALYSE, SETUP = "Analysis and tuning", "Setup and inspection"

app = typer.Typer(
    name="mtl-ranker",
    help="Train a multi-task ranker on Parquet interaction logs every night and rank candidates.",
    epilog="First steps: mtl-ranker simulate -o feed, mtl-ranker nightly -c simulated -d feed, "
    "mtl-ranker ui. Exit codes: 0 success, 1 unexpected error, 2 a mistake in project file, data "
    "or command. COMMAND --help shows an example.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

study = typer.Typer(
    help="Reproduce the experiments of the MMoE paper (Ma et al., KDD 2018).",
    no_args_is_help=True,
)

app.add_typer(study, name="study", rich_help_panel=ANALYSE)

Config = Annotated[
    str,
    typer.Option(
        "--config",
        "-c",
        help="Preset (simulated, streams, shop, kuairand, census) or project file.",
    ),
]

Data = Annotated[
    Path, typer.Option("--data", "-d", help="Folder that the project's paths are relative to.")
]

Work = Annotated[
    Path,
    typer.Option("--workspace", "-w", help="Folder of all outputs, or its address in a store."),
]

Day = Annotated[
    datetime | None,
    typer.Option("--date", formats=["%Y-%m-%d"], help="Day D; default: the last day of the log."),
]

Ranked = Annotated[
    datetime | None,
    typer.Option(
        "--date",
        formats=["%Y-%m-%d"],
        help="Day D, whose candidates are ranked; default: the day after the log's last one.",
    ),
]

Dry = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, without doing it.")]

Write = Annotated[Path | None, typer.Option("--json", help="Write the results to this JSON file.")]

Cluster = Annotated[
    str | None,
    typer.Option(help="Dask cluster: `local`, or a scheduler's address such as tcp://host:8786."),
]

ExportFormat = Literal["mlflow", "torch", "onnx"]
Simulated = Literal["simulated", "streams", "shop"]

DEFAULT_WORK = Path("workspace")

NIGHTLY = ("mlflow", "prefect")  # packages of the extra `nightly`

EXAMPLES = {
    "nightly": "mtl-ranker nightly -c feed.toml -d /logs -w /work --wait-minutes 120",
    "ingest": "mtl-ranker ingest -c feed.toml -d /logs --date 2026-11-24",
    "features": "mtl-ranker features -c feed.toml -d /logs --dry-run",
    "train": "mtl-ranker train -c feed.toml -d /logs --date 2026-11-24",
    "promote": "mtl-ranker promote -c feed.toml -d /logs --dry-run --json decision.json",
    "score": "mtl-ranker score -c feed.toml -d /logs --date 2026-11-25 --json ranked.json",
    "score-new": "mtl-ranker score-new -c feed.toml -d /logs",
    "backfill": "mtl-ranker backfill -c feed.toml -d /logs --from 2026-10-01 --to 2026-10-31",
    "rollback": "mtl-ranker rollback -c feed.toml --dry-run",
    "prune": "mtl-ranker prune -c feed.toml -d /logs --dry-run",
    "history": "mtl-ranker history -c feed.toml -w /work --prometheus /metrics/feed.prom",
    "freeze": 'mtl-ranker freeze -c feed.toml --reason "launch week"',
    "audit": "mtl-ranker audit -c feed.toml -d /logs --date 2026-11-20 --rows 200",
    "explain": "mtl-ranker explain -c feed.toml -d /logs --user 42 --item 7 --date 2026-11-25",
    "export": "mtl-ranker export -c feed.toml -d /logs --snapshot --out ranker-2026-11-25",
    "serve": 'mtl-ranker serve -c feed.toml -d /logs -w /work --nightly-cron "30 2 * * *"',
    "init": "mtl-ranker init -d /logs -o feed.toml",
    "check": "mtl-ranker check -c feed.toml -d /logs",
    "simulate": "mtl-ranker simulate -o feed --impressions 1000000 --days 28",
    "ui": "mtl-ranker ui -w /work",
    "blend": "mtl-ranker blend -c feed.toml -d /logs --satisfaction 0.5 --store",
    "tune": "mtl-ranker tune -c feed.toml -d /logs --model mmoe --trials 30 --minutes 60",
    "backtest": "mtl-ranker backtest -c feed.toml -d /logs --from 2026-11-18 --to 2026-11-24",
}


def command(name: str, panel: str) -> Callable[..., Any]:
    """A command in a panel of `--help`, with its example."""
    return app.command(name, rich_help_panel=panel, epilog=f"Example: {EXAMPLES[name]}")


@command("nightly", NIGHT)
def nightly(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    wait_minutes: Annotated[
        float, typer.Option(min=0, help="How long to wait for a late log of D.")
    ] = 0.0,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Run all steps: train on the log up to day D and rank the candidates of D + 1."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        _dry_run(context, day)
        return
    from mtl_ranker.ranking.candidates import check_candidates

    chosen = _chosen(context, day, logged=not wait_minutes, late=True)
    tomorrow = chosen + timedelta(days=1)
    check_candidates(context, tomorrow)  # before a server starts
    if not wait_minutes:  # else the flow asks when the log is there
        _check_server()
    typer.echo(f"{'night':<9} of {chosen}: starting Prefect; then train, and rank {tomorrow}")
    flow = _flow("nightly", "nightly", workspace)
    options = {"wait_minutes": wait_minutes, "cluster": cluster}
    ranked = flow(config, str(data), str(workspace), chosen, **options)
    _write(write, ranked)
    typer.echo(f"results:  {_results(context.workspace)}")


@command("ingest", NIGHT)
def ingest(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
) -> None:
    """Validate and publish the events of day D and of the earlier days that training needs."""
    context = _open(config, data, workspace, make=not dry_run)
    _run_step("ingest", context, day, planned="build" if dry_run else None)


@command("features", NIGHT)
def features(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
) -> None:
    """Aggregate published events and build the training examples of the split that ends with D."""
    context = _open(config, data, workspace, make=not dry_run)
    _run_step("features", context, day, planned="build" if dry_run else None)


@command("train", NIGHT)
def train(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Train all models on the split that ends with day D and register the winner as challenger."""
    context = _open(config, data, workspace, make=not dry_run)
    suite = _run_step("train", context, day, planned="train" if dry_run else None)
    if suite is None:
        return
    from mtl_ranker.reports.tables import comparison_rows

    _write(write, {"winner": suite.winner.label, "models": comparison_rows(suite)})


@command("promote", NIGHT)
def promote(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
    accept: Annotated[
        bool, typer.Option("--accept", help="Make the challenger champion without a comparison.")
    ] = False,
    write: Write = None,
) -> None:
    """Compare challenger and champion on the test days; promote the challenger if it is better."""
    context = _open(config, data, workspace)
    _write(write, _run_step("promote", context, day, dry_run=dry_run, accept=accept))


@command("score", NIGHT)
def score(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Ranked = None,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Rank the candidates of day D with the champion and features as of D."""
    data, workspace = (seen_by_workers(place, cluster) for place in (data, workspace))
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        from mtl_ranker.commands.dry_run import plan_ranking

        typer.echo(plan_ranking(context, _ranked(context, day)))
        return
    _check_registry(context)
    flow = _flow("score", "score", workspace)
    ranked = flow(context, _ranked(context, day), cluster=cluster)
    typer.echo(str(ranked.path))
    _write(write, ranked)


@command("score-new", OPERATE)
def score_new(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Rank every candidate set that is new or has changed since it was ranked."""
    _open(config, data, workspace)
    flow = _flow("score", "score_new", workspace)
    rankings = flow(config, str(data), str(workspace), dry_run)
    for ranked in rankings:
        typer.echo(str(ranked.path))
    _write(write, {"ranked": [asdict(ranked) for ranked in rankings]})


@command("backfill", OPERATE)
def backfill(
    config: Config,
    data: Data,
    first: Annotated[
        datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day of the span.")
    ],
    last: Annotated[
        datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day of the span.")
    ],
    workspace: Work = DEFAULT_WORK,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Number of days built at a time.")] = 2,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Annotated[
        Path | None, typer.Option("--json", help="Write the reasons of each day to this JSON file.")
    ] = None,
) -> None:
    """Build missing or outdated days of a span in parallel and print why each was built."""
    if first > last:
        raise ProjectError(f"--from {first.date()} is after --to {last.date()}")
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        from mtl_ranker.commands.dry_run import plan_days

        days = [d for d in context.source.days() if first.date() <= d <= last.date()]
        for line in plan_days(context, days):
            typer.echo(line)
        return
    flow = _flow("backfill", "backfill", workspace)
    rows = flow(config, str(data), str(workspace), first.date(), last.date(), jobs, cluster)
    _write(write, {"days": rows})


@command("rollback", OPERATE)
def rollback(
    config: Config, workspace: Work = DEFAULT_WORK, dry_run: Dry = False, write: Write = None
) -> None:
    """Make the previous champion the champion again."""
    project, registry, lock = _project_and_registry(config, workspace)
    with nullcontext() if dry_run else lock("rollback"):
        current, previous = registry.roll_back(project, dry_run)
    if dry_run:
        typer.echo(
            f"{project.name}: champion would be version {previous} again, not version {current}"
        )
    else:
        typer.echo(
            f"{project.name}: champion is version {previous} again, version {current} is not"
        )
    _write(write, {"from": current, "to": previous, "dry_run": dry_run})


@command("history", OPERATE)
def history(
    config: Config,
    workspace: Work = DEFAULT_WORK,
    metrics: Annotated[
        Path | None,
        typer.Option("--prometheus", help="Write the last night's metrics to this textfile."),
    ] = None,
    write: Write = None,
) -> None:
    """Print every night's champion, quality, volume and cost, and rebuild reports/index.html."""
    from mtl_ranker.config import load_project
    from mtl_ranker.workspace import open_workspace

    prepare(workspace)
    project = load_project(config)
    from mtl_ranker.commands.history import history_command

    _write(write, history_command(project, open_workspace(workspace), metrics))


@command("prune", OPERATE)
def prune(config: Config, data: Data, workspace: Work = DEFAULT_WORK, dry_run: Dry = False) -> None:
    """Remove features and vectors that no model in use has, and parts left by killed runs."""
    context = _open(config, data, workspace)
    _check_registry(context)
    from mtl_ranker.commands.prune import prune as unused

    for line in unused(context, dry_run):
        typer.echo(line)


@command("freeze", OPERATE)
def freeze(
    config: Config,
    workspace: Work = DEFAULT_WORK,
    reason: Annotated[str, typer.Option(help="Reason, shown by `promote`.")] = "by hand",
    off: Annotated[bool, typer.Option("--off", help="End the freeze.")] = False,
    dry_run: Dry = False,
) -> None:
    """Keep the champion: no challenger is promoted until `freeze --off`."""
    project, registry, lock = _project_and_registry(config, workspace)
    if dry_run:
        version = registry.alias_version(project, "champion")
        state = "replaceable again" if off else f"frozen ({reason})"
        typer.echo(f"{project.name}: champion version {version} would be {state}")
        return
    with lock("freeze"):
        version = registry.freeze(project, None if off else reason)
    state = "may be replaced again" if off else f"is frozen ({reason})"
    typer.echo(f"{project.name}: champion version {version} {state}")


@command("audit", ANALYSE)
def audit(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of sampled rows.")] = 100,
    write: Write = None,
) -> None:
    """Recompute features of sampled rows from what was known before; exit code 1 if any differs.

    The day's examples must be built.
    """
    context = _open(config, data, workspace)
    from mtl_ranker.features.audit import audit_day

    found = audit_day(context, _chosen(context, day), rows)
    typer.echo(str(found))
    for difference in found.differences:
        typer.echo(f"  {difference}")
    _write(write, found)
    if found.differences:
        raise typer.Exit(1)


@command("explain", ANALYSE)
def explain(
    config: Config,
    data: Data,
    user: Annotated[str, typer.Option("--user", "-u", help="The user's id.")],
    item: Annotated[str, typer.Option("--item", "-i", help="The item's id.")],
    workspace: Work = DEFAULT_WORK,
    day: Ranked = None,
    context: Annotated[
        list[str] | None,
        typer.Option(
            "--context",
            help="Context as COLUMN=VALUE; repeatable. Default: that of the published ranking.",
        ),
    ] = None,
    write: Write = None,
) -> None:
    """Explain the champion's score of a user-item pair: features, predictions, experts and rank."""
    opened = _open(config, data, workspace)
    chosen = _ranked(opened, day)
    from mtl_ranker.commands.explain import explain_command
    from mtl_ranker.ranking.explain import Pair

    pair = Pair(user, item, dict(_context_value(text) for text in context or []))
    explanation = explain_command(opened, pair, chosen)
    _write(write, asdict(explanation) | {"day": str(chosen)})


@command("export", OPERATE)
def export(
    config: Config,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder to write.")],
    workspace: Work = DEFAULT_WORK,
    day: Ranked = None,
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="An MLflow model, a torch.export program, or an ONNX model."),
    ] = "mlflow",
    snapshot: Annotated[
        bool,
        typer.Option(
            "--snapshot",
            help="With the features as of D: the model reads user, item and context, and ranks.",
        ),
    ] = False,
    write: Write = None,
) -> None:
    """Write the champion as files that need neither this package nor log and workspace."""
    opened = _open(config, data, workspace)
    _check_registry(opened)
    chosen = _ranked(opened, day)
    from mtl_ranker.commands.export import Export, export_command

    _write(write, export_command(opened, Export(out, form, snapshot, chosen)))


@command("serve", OPERATE)
def serve(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    nightly_cron: Annotated[
        str, typer.Option(help="Schedule of `nightly`, in the log's time zone.")
    ] = "30 2 * * *",
    score_cron: Annotated[
        str | None,
        typer.Option(help="Schedule of `score-new`; default: hourly, if candidates are given."),
    ] = None,
    tune_cron: Annotated[str, typer.Option(help="Schedule of `tune`.")] = "0 12 * * 6",
    tune_model: Annotated[
        str | None, typer.Option(help="Model to tune: NAME of `models.NAME`; default: none.")
    ] = None,
    wait_minutes: Annotated[
        float, typer.Option(min=0, help="How long to wait for a late log.")
    ] = 120.0,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the Prefect server.")] = 4200,
) -> None:
    """Run the nightly, hourly and weekly schedules in this process until it is stopped.

    Without PREFECT_API_URL a Prefect server is started on 127.0.0.1, with its database in the
    workspace.
    """
    from mtl_ranker.config import load_project

    project = load_project(config)
    _check_models(project)
    if tune_model is not None and tune_model not in project.models:
        raise ProjectError(f"--tune-model {tune_model}: allowed: {', '.join(project.models)}")
    if score_cron is None and project.scoring.candidates is not None:
        score_cron = "5 * * * *"
    from mtl_ranker.commands.serve import serve_command

    arguments = ["--config", config, "--data", str(data), "--nightly-cron", nightly_cron]
    arguments += ["--wait-minutes", str(wait_minutes)]
    arguments += ["--score-cron", score_cron] if score_cron else []
    arguments += ["--tune-cron", tune_cron, "--tune-model", tune_model] if tune_model else []
    raise typer.Exit(serve_command(workspace, port, arguments))


@command("init", SETUP)
def init(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Project file to write.")] = Path(
        "feed.toml"
    ),
    user: Annotated[str | None, typer.Option(help="Column of the user.")] = None,
    item: Annotated[str | None, typer.Option(help="Column of the item.")] = None,
) -> None:
    """Write a first project file for a folder of Parquet files, with questions as comments."""
    from mtl_ranker.commands.init import write_project_file
    from mtl_ranker.logs.discover import Hints

    for line in write_project_file(data, out, Hints(user, item)):
        typer.echo(line)


@command("check", SETUP)
def check(config: Config, data: Data, write: Write = None) -> None:
    """Verify a project file against its data, without training or writing anything."""
    prepare(DEFAULT_WORK)
    from mtl_ranker.commands.check import check_project

    lines = []
    for line in check_project(config, data):
        typer.echo(line)
        lines.append(line)
    _write(write, {"config": config, "found": lines})


@command("simulate", SETUP)
def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the feed to.")],
    impressions: Annotated[int, typer.Option(min=10, help="Number of impressions.")] = 150_000,
    days: Annotated[int, typer.Option(min=1, help="Number of days.")] = 11,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers.")] = 0,
    horizon: Annotated[
        int,
        typer.Option(
            min=0, help="Days over which items appear, with those of --respond; not with shop."
        ),
    ] = 0,
    candidates: Annotated[
        int,
        typer.Option(
            min=0, help="Candidates of each user to write for every ranked day; not with shop."
        ),
    ] = 0,
    preset: Annotated[
        Simulated,
        typer.Option(help="What to simulate: a feed, a feed with a stream of each action, a shop."),
    ] = "simulated",
    answered: Annotated[
        Path | None,
        typer.Option(
            "--respond",
            help="Simulate the responses of the users of --out to this rankings/date=D.",
        ),
    ] = None,
) -> None:
    """Simulate a log with known true probabilities, or the responses of users to a ranking."""
    from mtl_ranker.logs import respond
    from mtl_ranker.logs import simulate as simulation

    if answered is not None:
        typer.echo(str(respond.respond(out, answered)))
        return
    from rich.progress import Progress

    if preset == "shop":
        given = {"--horizon": horizon, "--candidates": candidates}
        for option, value in given.items():
            if value:
                raise ProjectError(
                    f"{option} {value}: not allowed with --preset shop, whose items and candidates "
                    "are fixed; allowed: --preset simulated, --preset streams"
                )
        from mtl_ranker.logs import shop

        found = shop.make_shop(shop.Size(impressions, seed, days, delayed=True))
        shop.write_streams(found, out, seed)
        typer.echo(f"{out}: {days} days from {shop.FIRST}; true probabilities in {out / 'truth'}")
        return
    scale = max(1.0, impressions / 150_000)
    feed = simulation.Feed(
        impressions,
        days,
        seed=seed,
        users=round(4_000 * scale**0.7),
        items=round(3_000 * scale**0.5),
        horizon=horizon,
        streams=preset == "streams",
    )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("simulating impressions", total=impressions)
        simulation.simulate(feed, out, lambda done: progress.update(bar, completed=done))
    simulated = respond.SimulatedFeed(feed, candidates=candidates)
    simulated.save(out)
    respond.write_candidates(simulated, out, days)
    typer.echo(f"{out}: {days} days from {feed.first_day}; true probabilities in {out / 'truth'}")


@command("ui", SETUP)
def ui(
    workspace: Work = DEFAULT_WORK,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 5000,
) -> None:
    """Open the MLflow page of a workspace on 127.0.0.1."""
    from mtl_ranker.commands.processes import call

    folder = local_folder(workspace).resolve()
    database = folder / "mlflow.db"
    if not database.is_file():
        raise ProjectError(f"{database}: not found; run `mtl-ranker nightly` first")
    prepare(workspace)
    typer.echo(f"MLflow on http://127.0.0.1:{port}  (stop with Ctrl-C)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    command += ["--default-artifact-root", (folder / "mlartifacts").as_uri()]
    raise typer.Exit(call(command))


@command("blend", ANALYSE)
def blend(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    satisfaction: Annotated[
        float,
        typer.Option(min=0, max=1, help="Trade-off: 0 = engagement only, 1 = satisfaction only."),
    ] = 0.5,
    how: Annotated[
        str | None,
        typer.Option(help="weighted_sum or weighted_product; default: the model's current one."),
    ] = None,
    tries: Annotated[int, typer.Option(min=15, help="Number of weight choices to try.")] = 200,
    weights: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set OBJECTIVE=WEIGHT; repeatable, others get weight 0."),
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Store the weights with the model.")
    ] = False,
    alias: Annotated[
        str, typer.Option(help="Registered model: champion or challenger.")
    ] = "champion",
    write: Write = None,
) -> None:
    """Choose the blend weights that trade engagement for satisfaction, without training."""
    if how not in (None, "weighted_sum", "weighted_product"):
        raise ProjectError(f"--how {how}: allowed: weighted_sum, weighted_product")
    context = _open(config, data, workspace)
    chosen = _chosen(context, day)
    from mtl_ranker.commands.blend import BlendOptions, blend_command
    from mtl_ranker.nightly.blend_search import BlendSearch

    options = BlendOptions(
        alias=alias,
        search=BlendSearch(satisfaction, how, tries),
        given=dict(_weight(text) for text in weights or []),
        store=store,
    )
    _write(write, blend_command(context, chosen, options))


@command("tune", ANALYSE)
def tune(
    config: Config,
    data: Data,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model to tune: NAME of `models.NAME`.")
    ],
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, with earlier ones.")] = 30,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no trial after this many minutes.")
    ] = None,
    write: Write = None,
) -> None:
    """Search a model's settings on the validation days; an interrupted search is resumed.

    The best trials replace the project file's settings only if they are significantly better on
    three validation days with three seeds each.
    """
    _needs("optuna")
    context = _open(config, data, workspace)
    chosen = _chosen(context, day)
    from mtl_ranker.commands.tune import tune_command
    from mtl_ranker.nightly.tuning import Budget

    budget = Budget(trials, None if minutes is None else 60 * minutes)
    recorded = tune_command(context, chosen, model, budget)
    _write(write, asdict(recorded.search) | {"study": recorded.study, "toml": recorded.toml})


@command("backtest", ANALYSE)
def backtest(
    config: Config,
    data: Data,
    first: Annotated[
        datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day of the span.")
    ],
    last: Annotated[
        datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day of the span.")
    ],
    workspace: Work = DEFAULT_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Train only this model; repeatable.")
    ] = None,
    write: Write = None,
) -> None:
    """Compare policies over a span of days: keep the first model, promote on evidence, retrain."""
    if first > last:
        raise ProjectError(f"--from {first.date()} is after --to {last.date()}")
    context = _open(config, data, workspace)
    from mtl_ranker.commands.backtest import backtest_command

    _write(write, backtest_command(context, first.date(), last.date(), model or []))


Full = Annotated[bool, typer.Option("--full", help="Run at the paper's size, which takes hours.")]

Starts = Annotated[int | None, typer.Option(min=3, help="Random initialisations of each model.")]

Steps = Annotated[int | None, typer.Option(min=1, help="Training steps of each initialisation.")]

Rate = Annotated[float, typer.Option(min=1e-6, help="Learning rate of Adam.")]


@study.command("synthetic")
def study_synthetic(
    workspace: Work = DEFAULT_WORK,
    full: Full = False,
    starts: Starts = None,
    steps: Steps = None,
    learning_rate: Rate = 3e-3,
    write: Write = None,
) -> None:
    """Compare shared-bottom, OMoE and MMoE on tasks of given correlation (sections 3 and 5.2)."""
    _study("synthetic", workspace, full, starts, steps, learning_rate, write)


@study.command("trainability")
def study_trainability(
    workspace: Work = DEFAULT_WORK,
    full: Full = False,
    starts: Starts = None,
    steps: Steps = None,
    learning_rate: Rate = 3e-3,
    write: Write = None,
) -> None:
    """Measure the spread of final losses over many random initialisations (figure 6)."""
    _study("trainability", workspace, full, starts, steps, learning_rate, write)


@study.command("census")
def study_census(
    data: Annotated[
        Path, typer.Option("--data", "-d", help="Folder of the UCI Census-Income files.")
    ],
    workspace: Work = DEFAULT_WORK,
    pair: Annotated[
        list[int] | None,
        typer.Option(min=1, max=2, help="Pair of tasks, 1 or 2; repeatable, default: both."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="30 trials and 20 seeds, which takes hours.")
    ] = False,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials of each model's search.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Reported trainings of each model.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Maximum number of epochs.")] = None,
    write: Write = None,
) -> None:
    """Compare tuned models and LightGBM on two pairs of Census-Income tasks (section 6.3)."""
    _needs("lightgbm", "optuna")
    prepare(workspace)
    from mtl_ranker.studies.census_data import find_files

    find_files(data)  # before the imports that take seconds
    from mtl_ranker.commands.study import census

    pairs = sorted(set(pair or [1, 2]))
    census(data, _of_study(workspace), pairs, full, trials, seeds, epochs, write)


def _study(name: str, workspace: Path, *arguments: Any) -> None:
    folder = _of_study(workspace)
    prepare(workspace)
    from mtl_ranker.commands.study import random_starts

    random_starts(name, folder, *arguments)


def _of_study(folder: Path) -> Workspace:
    """The folder of a study's pictures and runs. Raises ProjectError for an address."""
    from mtl_ranker.stores.objects import address_of, is_address
    from mtl_ranker.workspace import Workspace

    if is_address(folder):
        raise ProjectError(f"--workspace {address_of(folder)}: studies allow a local folder only")
    folder.mkdir(parents=True, exist_ok=True)
    return Workspace(folder)


def _needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ProjectError(f"{package} is not installed: pip install 'mtl_ranker[studies]'")


def _open(config: str, data: Path, workspace: Path, make: bool = True) -> Context:
    """The context of a command; the workspace is created if `make`."""
    prepare(workspace)
    from mtl_ranker.logs.sources import open_context

    context = open_context(config, data, workspace)
    _check_models(context.project)
    if make:
        context.workspace.root.mkdir(parents=True, exist_ok=True)
    return context


def _check_models(project: Project) -> None:
    """Raise ProjectError for a mistake in `[models]`, before torch is imported."""
    from mtl_ranker.training.specs import model_specs

    model_specs(project)


def _chosen(
    context: Context, day: datetime | None, logged: bool = False, late: bool = False
) -> date:
    """The day D: given, or the last of the log.

    Args:
        logged: whether D must be in the log.
        late: whether D may also be the day after the log's last one, which has not arrived.

    Raises ProjectError for an empty log, and for a day that is not allowed.
    """
    last = context.last_day()
    chosen = day.date() if day else last
    available = context.source.days() if logged else []
    if logged and chosen not in available and not (late and chosen == last + timedelta(days=1)):
        raise ProjectError(
            f"{context.log_path}: no rows for {chosen}; days found: {available[0]} to {last}"
        )
    return chosen


def _ranked(context: Context, day: datetime | None) -> date:
    """The day whose candidates are ranked: given, or the day after the log's last one."""
    last = context.last_day()
    return day.date() if day else last + timedelta(days=1)


def _dry_run(context: Context, day: datetime | None, only: str | None = None) -> None:
    """Print what a night would do, or `only` its step build or train."""
    from mtl_ranker.commands.dry_run import plan_night

    workspace = context.workspace
    if not workspace.exists():
        typer.echo(f"{workspace.where()}: does not exist, so everything would be built")
    for step, line in plan_night(context, _chosen(context, day)):
        if only in (None, step):
            typer.echo(line)


def _write(file: Path | None, results: Any) -> None:
    """Write results, a dataclass or a mapping, to the file of `--json`, if there is one."""
    if file is not None and results is not None:
        from mtl_ranker.workspace import write_json

        is_instance = is_dataclass(results) and not isinstance(results, type)
        write_json(file, asdict(results) if is_instance else results)


def _project_and_registry(config: str, workspace: Path) -> tuple[Any, Any, Any]:
    """The project, the connected registry and its lock, for commands that need no log."""
    prepare(workspace)
    from mtl_ranker.config import load_project

    project = load_project(config)
    _check_models(project)
    from mtl_ranker.tracking import connection, registry
    from mtl_ranker.workspace import open_workspace

    folder = open_workspace(workspace)
    connection.connect(folder)
    return project, registry, partial(folder.lock, scope=registry.REGISTRY, wait=True)


def _context_value(text: str) -> tuple[str, str]:
    """Column and value of `--context`."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ProjectError(f"--context {text}: expected COLUMN=VALUE")
    return name, value


def _weight(text: str) -> tuple[str, float]:
    """Objective and weight of `--set`."""
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ProjectError(f"--set {text}: expected OBJECTIVE=WEIGHT, such as click=1.5") from error


def _results(workspace: Workspace) -> str:
    """Where a night's results are looked at: the server's page, or the command that starts one."""
    from mtl_ranker.tracking.server import without_credentials

    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.lower().startswith("http"):
        return without_credentials(uri)
    return f"mtl-ranker ui --workspace {workspace.where()}   (MLflow on http://127.0.0.1:5000)"


def _flow(module: str, name: str, workspace: Path) -> Callable[..., Any]:
    """A flow, imported after `prepare`, as Prefect reads its settings on import."""
    from mtl_ranker.commands.serve import start_api

    prepare(workspace)
    folder = local_folder(workspace)
    folder.mkdir(parents=True, exist_ok=True)
    spinner = Console(stderr=True).status("starting Prefect")
    with spinner:
        await_api = start_api(folder)
        import importlib

        flow = getattr(importlib.import_module(f"flows.{module}"), name)

    def run(*arguments: Any, **options: Any) -> Any:
        from flows.night import without_heartbeats

        with spinner:
            await_api()
        with without_heartbeats():
            return flow(*arguments, **options)

    return run


def _check_server() -> None:
    from mtl_ranker.tracking.server import check_server

    check_server()


def _check_registry(context: Context) -> None:
    """Raise ProjectError at once where no model can be registered, or no server answers."""
    _check_server()
    database = context.workspace.root / "mlflow.db"
    if "MLFLOW_TRACKING_URI" not in os.environ and not database.is_file():
        raise ProjectError(
            f"{database}: no models are registered; run `mtl-ranker nightly` first, or name the "
            "server that has them by MLFLOW_TRACKING_URI"
        )


def _run_step(
    name: str, context: Context, day: datetime | None, planned: str | None = None, **options: Any
) -> Any:
    """Run the flow of one step for day D, or for the last day of the log.

    Args:
        planned: a part of the night's plan that is printed instead, without running anything.
    """
    if planned is not None:
        return _dry_run(context, day, planned)
    chosen = _chosen(context, day, logged=name in ("ingest", "features", "train"))
    if name == "promote":
        _check_registry(context)
    if name == "train":
        _check_server()
    return _flow(name, name, context.workspace.root)(context, chosen, **options)


def main() -> None:
    run_app(app)


def run_app(program: Callable[[], Any]) -> None:
    """Run a program; print a ProjectError as a message without a stack trace, with exit code 2.

    A missing package of the extra `nightly` is such an error too.
    """
    try:
        program()
    except ProjectError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in NIGHTLY:
            raise
        _fail(f"{error.name} is not installed: pip install 'mtl_ranker[nightly]'")
    except Exception as error:
        if not is_outside(error):
            raise
        message = Text.assemble(("error", "bold red"), " ", first_line(error))
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(1)


def _fail(words: str) -> NoReturn:
    # The message may hold data, so it is not read as markup.
    message = Text.assemble(("error", "bold red"), " ", words)
    Console(stderr=True).print(message, soft_wrap=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
