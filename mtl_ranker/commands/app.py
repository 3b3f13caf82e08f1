"""The command line: `mtl-ranker …`. Exit codes: 0 done, 1 unexpected failure, 2 user's mistake."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mtl_ranker.environment import prepare
from mtl_ranker.errors import ProjectError

if TYPE_CHECKING:
    from mtl_ranker.context import Context

NIGHT, OPERATE, JUDGE, LOOK = "The night", "Operate", "Judge and improve", "Begin and look"

app = typer.Typer(
    name="mtl-ranker",
    help="From nightly Parquet interaction logs to a registered multi-task ranker and rankings.",
    epilog="Begin: mtl-ranker simulate -o feed, mtl-ranker nightly -c simulated -d feed, "
    "mtl-ranker ui. Exit codes: 0 done, 1 unexpected failure, 2 a mistake in project file, data or "
    "command. COMMAND --help shows an example of each.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

study = typer.Typer(help="Reproduce Ma et al. (KDD 2018).", no_args_is_help=True)

app.add_typer(study, name="study", rich_help_panel=JUDGE)

Config = Annotated[
    str, typer.Option("--config", "-c", help="A preset (simulated, kuairand, census) or a file.")
]

Data = Annotated[
    Path, typer.Option("--data", "-d", help="Folder below which the project's paths lie.")
]

Work = Annotated[Path, typer.Option("--workspace", "-w", help="Folder for everything produced.")]

Day = Annotated[
    datetime | None,
    typer.Option("--date", formats=["%Y-%m-%d"], help="The day D; default: the log's last day."),
]

Dry = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and write nothing.")]

Write = Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")]

Cluster = Annotated[
    str | None,
    typer.Option(help="Dask: `local` processes, or a scheduler such as tcp://host:8786."),
]

DEFAULT_WORK = Path("workspace")

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
    "freeze": 'mtl-ranker freeze -c feed.toml --reason "launch week"',
    "explain": "mtl-ranker explain -c feed.toml -d /logs --user 42 --item 7 --date 2026-11-25",
    "serve": 'mtl-ranker serve -c feed.toml -d /logs -w /work --nightly-cron "30 2 * * *"',
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
        float, typer.Option(min=0, help="Wait so long for a log of D that is late.")
    ] = 0.0,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """The whole night: learn from the log up to day D, rank the candidates of D + 1."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        _dry_run(context, day)
        return
    chosen = _chosen(context, day)
    flow = _flow("nightly", "nightly", workspace)
    more = {"wait_minutes": wait_minutes, "cluster": cluster}
    ranked = flow(config, str(data), str(workspace), chosen, **more)
    _write(write, ranked)
    typer.echo(
        f"look:     mtl-ranker ui --workspace {workspace}   (MLflow on http://127.0.0.1:5000)"
    )


@command("ingest", NIGHT)
def ingest(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
) -> None:
    """Check day D (and the earlier days that training on D needs) and publish its events."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        _dry_run(context, day, "build")
        return
    _run_step("ingest", context, day)


@command("features", NIGHT)
def features(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
) -> None:
    """Aggregate the published events and build the examples that training on D reads."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        _dry_run(context, day, "build")
        return
    _run_step("features", context, day)


@command("train", NIGHT)
def train(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Train every model × seed on the split that ends with D; register the winner."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        _dry_run(context, day, "train")
        return
    suite = _run_step("train", context, day)
    from mtl_ranker.reports.tables import comparison_rows

    _write(write, {"winner": suite.winner.label, "models": comparison_rows(suite)})


@command("promote", NIGHT)
def promote(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Compare challenger and champion on D's test days; the better one becomes champion."""
    context = _open(config, data, workspace)
    _write(write, _run_step("promote", context, day, dry_run=dry_run))


@command("score", NIGHT)
def score(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Write = None,
) -> None:
    """Rank the candidates of day D with the champion and features as of D."""
    context = _open(config, data, workspace, make=not dry_run)
    if dry_run:
        from mtl_ranker.commands.dry_run import plan_ranking

        typer.echo(plan_ranking(context, _chosen(context, day)))
        return
    ranked = _run_step("score", context, day, cluster=cluster)
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
    """Rank every given candidate set that is new or newer than its ranking (the hourly job)."""
    flow = _flow("score", "score_new", workspace)
    found = flow(config, str(data), str(workspace), dry_run)
    for ranked in found:
        typer.echo(str(ranked.path))
    _write(write, {"ranked": [asdict(ranked) for ranked in found]})


@command("backfill", OPERATE)
def backfill(
    config: Config,
    data: Data,
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day.")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day.")],
    workspace: Work = DEFAULT_WORK,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Days at a time.")] = 2,
    cluster: Cluster = None,
    dry_run: Dry = False,
    write: Annotated[
        Path | None, typer.Option("--json", help="Write why each day was built to this file.")
    ] = None,
) -> None:
    """Build the missing or outdated days of a span in parallel; say why each was built."""
    if first > last:
        raise ProjectError(f"--from {first.date()} lies after --to {last.date()}")
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
    """Give `champion` back to the version that had it before."""
    project, registry = _registered(config, workspace)
    left, back = registry.roll_back(project, dry_run)
    if dry_run:
        typer.echo(f"{project.name}: champion would be version {back} again, not version {left}")
    else:
        typer.echo(f"{project.name}: champion is version {back} again, version {left} is not")
    _write(write, {"from": left, "to": back, "dry_run": dry_run})


@command("freeze", OPERATE)
def freeze(
    config: Config,
    workspace: Work = DEFAULT_WORK,
    reason: Annotated[str, typer.Option(help="Why; shown each night.")] = "by hand",
    off: Annotated[bool, typer.Option("--off", help="Let challengers win again.")] = False,
    dry_run: Dry = False,
) -> None:
    """Keep the champion whatever challengers show, until `freeze --off`."""
    project, registry = _registered(config, workspace)
    if dry_run:
        version = registry.alias_version(project, "champion")
        words = "may be replaced again" if off else f"frozen ({reason})"
        typer.echo(f"{project.name}: champion version {version} would be {words}")
        return
    version = registry.freeze(project, None if off else reason)
    state = "may be replaced again" if off else f"is frozen ({reason})"
    typer.echo(f"{project.name}: champion version {version} {state}")


@command("explain", JUDGE)
def explain(
    config: Config,
    data: Data,
    user: Annotated[str, typer.Option("--user", "-u", help="The user's id.")],
    item: Annotated[str, typer.Option("--item", "-i", help="The item's id.")],
    workspace: Work = DEFAULT_WORK,
    day: Annotated[
        datetime | None,
        typer.Option("--date", formats=["%Y-%m-%d"], help="Features as of D; default: tomorrow."),
    ] = None,
    context: Annotated[
        list[str] | None, typer.Option("--context", help="COLUMN=VALUE, repeatable.")
    ] = None,
    write: Write = None,
) -> None:
    """Why the champion scores a pair as it does: features, predictions, experts, rank."""
    opened = _open(config, data, workspace)
    last = opened.last_day()
    from mtl_ranker.commands.explain import explain_command
    from mtl_ranker.ranking.explain import Pair

    chosen = day.date() if day else last + timedelta(days=1)
    pair = Pair(user, item, dict(_pair(text) for text in context or []))
    explanation = explain_command(opened, pair, chosen)
    _write(write, asdict(explanation) | {"day": str(chosen)})


@command("serve", OPERATE)
def serve(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    nightly_cron: Annotated[str, typer.Option(help="When a night begins.")] = "30 2 * * *",
    score_cron: Annotated[
        str | None, typer.Option(help="When new candidate sets are looked for; default: hourly.")
    ] = None,
    tune_cron: Annotated[str, typer.Option(help="When settings are searched.")] = "0 12 * * 6",
    tune_model: Annotated[
        str | None, typer.Option(help="NAME of the [models.NAME] to tune; default: none.")
    ] = None,
    wait_minutes: Annotated[float, typer.Option(min=0, help="For a log that is late.")] = 120.0,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of Prefect's page.")] = 4200,
) -> None:
    """Run the schedules here, without a work pool, until stopped.

    Without PREFECT_API_URL a Prefect server is started on 127.0.0.1, its database in the workspace.
    """
    from mtl_ranker.config import load_project

    project = load_project(config)
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


@command("check", LOOK)
def check(config: Config, data: Data, write: Write = None) -> None:
    """Verify a project file against its data without training or writing anything."""
    from mtl_ranker.commands.check import check_project

    lines = []
    for line in check_project(config, data):
        typer.echo(line)
        lines.append(line)
    _write(write, {"config": config, "found": lines})


@command("simulate", LOOK)
def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write the feed to.")],
    impressions: Annotated[int, typer.Option(min=10)] = 150_000,
    days: Annotated[int, typer.Option(min=1)] = 11,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a simulated feed with known truth: same seed, same bytes."""
    from rich.progress import Progress

    from mtl_ranker.logs import simulate as simulation

    scale = max(1.0, impressions / 150_000)
    feed = simulation.Feed(
        impressions,
        days,
        seed=seed,
        users=round(4_000 * scale**0.7),
        items=round(3_000 * scale**0.5),
    )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("simulating impressions", total=impressions)
        simulation.simulate(feed, out, lambda done: progress.update(bar, completed=done))
    typer.echo(f"{out}: {days} days from {feed.first_day}, the truth aside in {out / 'truth'}")


@command("ui", LOOK)
def ui(
    workspace: Work = DEFAULT_WORK,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open the MLflow page of a workspace on 127.0.0.1."""
    from mtl_ranker.commands.processes import call

    database = workspace.resolve() / "mlflow.db"
    if not database.is_file():
        raise ProjectError(f"{database}: not found; run `mtl-ranker nightly` first")
    prepare(workspace)
    typer.echo(f"MLflow on http://127.0.0.1:{port}  (stop with Ctrl-C)")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    command += ["--default-artifact-root", (workspace.resolve() / "mlartifacts").as_uri()]
    raise typer.Exit(call(command))


@command("blend", JUDGE)
def blend(
    config: Config,
    data: Data,
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    satisfaction: Annotated[
        float, typer.Option(min=0, max=1, help="The trade-off: 0 = engagement only, 1 = none.")
    ] = 0.5,
    how: Annotated[
        str | None, typer.Option(help="weighted_sum or weighted_product; default: as it is.")
    ] = None,
    tries: Annotated[int, typer.Option(min=15, help="Choices of weights to try.")] = 200,
    weights: Annotated[
        list[str] | None,
        typer.Option("--set", help="OBJECTIVE=WEIGHT by hand, repeatable; others weigh 0."),
    ] = None,
    store: Annotated[
        bool, typer.Option("--store", help="Store the choice with the model.")
    ] = False,
    alias: Annotated[str, typer.Option(help="Which model: champion or challenger.")] = "champion",
    write: Write = None,
) -> None:
    """Engagement against satisfaction over weights; the choice needs no training."""
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


@command("tune", JUDGE)
def tune(
    config: Config,
    data: Data,
    model: Annotated[str, typer.Option("--model", "-m", help="NAME of a [models.NAME].")],
    workspace: Work = DEFAULT_WORK,
    day: Day = None,
    trials: Annotated[int, typer.Option(min=1, help="Trainings in all, earlier ones too.")] = 30,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="No training starts after so many.")
    ] = None,
    write: Write = None,
) -> None:
    """Search a model's settings on the validation days; run again, it goes on."""
    _needs("optuna")
    context = _open(config, data, workspace)
    chosen = _chosen(context, day)
    from mtl_ranker.commands.tune import tune_command
    from mtl_ranker.nightly.tuning import Budget

    budget = Budget(trials, None if minutes is None else 60 * minutes)
    recorded = tune_command(context, chosen, model, budget)
    _write(write, asdict(recorded.search) | {"study": recorded.study, "toml": recorded.toml})


@command("backtest", JUDGE)
def backtest(
    config: Config,
    data: Data,
    first: Annotated[datetime, typer.Option("--from", formats=["%Y-%m-%d"], help="First day.")],
    last: Annotated[datetime, typer.Option("--to", formats=["%Y-%m-%d"], help="Last day.")],
    workspace: Work = DEFAULT_WORK,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="Only these models, repeatable.")
    ] = None,
    write: Write = None,
) -> None:
    """Replay every night of a span: a model kept, the champion, one trained every night."""
    if first > last:
        raise ProjectError(f"--from {first.date()} lies after --to {last.date()}")
    context = _open(config, data, workspace)
    from mtl_ranker.commands.backtest import backtest_command

    _write(write, backtest_command(context, first.date(), last.date(), model or []))


Full = Annotated[bool, typer.Option("--full", help="At the paper's size: hours.")]

Starts = Annotated[int | None, typer.Option(min=3, help="Random starts of each model.")]

Steps = Annotated[int | None, typer.Option(min=1, help="Steps of Adam of each start.")]

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
    """Shared bottom, OMoE and MMoE on two tasks of chosen correlation (sections 3 and 5.2)."""
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
    """How dependably each model trains: final losses over many random starts (figure 6)."""
    _study("trainability", workspace, full, starts, steps, learning_rate, write)


@study.command("census")
def study_census(
    data: Annotated[Path, typer.Option("--data", "-d", help="Folder of UCI's files.")],
    workspace: Work = DEFAULT_WORK,
    pair: Annotated[
        list[int] | None, typer.Option(min=1, max=2, help="Pair 1 or 2; default both.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="30 trials, 20 seeds: hours.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, help="Trainings to tune each model.")] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="Trainings to report.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs at most.")] = None,
    write: Write = None,
) -> None:
    """Section 6.3: every model tuned alike on two pairs of tasks; then against LightGBM."""
    _needs("lightgbm", "optuna")
    prepare(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    from mtl_ranker.commands.study import census
    from mtl_ranker.workspace import Workspace

    pairs = sorted(set(pair or [1, 2]))
    census(data, Workspace(workspace), pairs, full, trials, seeds, epochs, write)


def _study(name: str, workspace: Path, *arguments: Any) -> None:
    prepare(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    from mtl_ranker.commands.study import random_starts
    from mtl_ranker.workspace import Workspace

    random_starts(name, Workspace(workspace), *arguments)


def _needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ProjectError(f"{package} is not installed: pip install 'mtl_ranker[studies]'")


def _open(config: str, data: Path, workspace: Path, make: bool = True) -> Context:
    """The context of a command; a missing workspace is created if `make`."""
    prepare(workspace)
    from mtl_ranker.logs.sources import open_context

    context = open_context(config, data, workspace)
    if make:
        workspace.mkdir(parents=True, exist_ok=True)
    return context


def _chosen(context: Context, day: datetime | None) -> date:
    """The day D: the given one, or the log's last. Raises ProjectError for an empty log."""
    last = context.last_day()
    return day.date() if day else last


def _dry_run(context: Context, day: datetime | None, only: str | None = None) -> None:
    """What a night would do, or `only` its part build or train."""
    from mtl_ranker.commands.dry_run import plan_night

    workspace = context.workspace.root
    if not workspace.is_dir():
        typer.echo(f"{workspace}: not there yet, so everything would be built")
    for part, line in plan_night(context, _chosen(context, day)):
        if only in (None, part):
            typer.echo(line)


def _write(place: Path | None, figures: Any) -> None:
    """Figures, or a dataclass of them, to the file that `--json` names."""
    if place is not None and figures is not None:
        from mtl_ranker.workspace import write_json

        plain = is_dataclass(figures) and not isinstance(figures, type)
        write_json(place, asdict(figures) if plain else figures)


def _registered(config: str, workspace: Path) -> tuple[Any, Any]:
    """The project and the registry, connected; for commands that need no log."""
    prepare(workspace)
    from mtl_ranker.config import load_project
    from mtl_ranker.tracking import connection, registry
    from mtl_ranker.workspace import Workspace

    project = load_project(config)
    connection.connect(Workspace(workspace))
    return project, registry


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ProjectError(f"--context {text}: expected COLUMN=VALUE")
    return name, value


def _weight(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ProjectError(f"--set {text}: expected OBJECTIVE=WEIGHT, such as click=1.5") from error


def _flow(module: str, name: str, workspace: Path) -> Callable[..., Any]:
    """The flow of that name (imported late: Prefect reads its settings on import)."""
    prepare(workspace)
    workspace.mkdir(parents=True, exist_ok=True)
    waiting = Console(stderr=True).status("starting Prefect")
    with waiting:
        import importlib

        flow = getattr(importlib.import_module(f"flows.{module}"), name)

    def run(*arguments: Any, **more: Any) -> Any:
        from flows.night import await_api

        with waiting:
            await_api()
        return flow(*arguments, **more)

    return run


def _run_step(name: str, context: Context, day: datetime | None, **more: Any) -> Any:
    """Run the flow of one step of a night for day D, or for the log's last day."""
    chosen = _chosen(context, day)
    return _flow(name, name, context.workspace.root)(context, chosen, **more)


def main() -> None:
    run_app(app)


def run_app(program: Callable[[], Any]) -> None:
    """Entry point: a user's mistake is one clear message on stderr, not a stack trace."""
    try:
        program()
    except ProjectError as error:
        Console(stderr=True).print(
            f"[bold red]error[/] {_escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(2)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
