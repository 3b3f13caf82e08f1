"""A night's trainings on a Dask cluster of two worker processes of this host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

pytest.importorskip("distributed", reason="pip install -e '.[cluster]'")

from distributed import Client

from mtl_ranker import __version__
from mtl_ranker.config import Project
from mtl_ranker.context import Context
from mtl_ranker.errors import ProjectError
from mtl_ranker.nightly.contenders import Callbacks, Contender, train_model, training_of
from mtl_ranker.nightly.results import Suite
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.nightly.trainers import Job, Running
from mtl_ranker.nightly.workers import LOOK, connected, refuse_workers, workers_of
from mtl_ranker.reports.tables import comparison_rows
from mtl_ranker.training.dask_worker import SEAT
from mtl_ranker.training.dataset import Dataset, load_dataset
from mtl_ranker.training.specs import model_specs
from tests.conftest import FIRST, write_log
from tests.integration.commands import free_port
from tests.nightly.test_suite import prepared
from tests.projects import with_training, write_project

LAST = FIRST + timedelta(days=5)


def started(*command: str, **variables: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.getcwd(), "DASK_LOGGING__DISTRIBUTED": "error"}
    line = [sys.executable, "-m", *command, "--host", "127.0.0.1", "--no-dashboard"]
    return subprocess.Popen(line, env=env | variables)


def worker(address: str, threads: int = 1, **variables: str) -> subprocess.Popen:
    options = ("--nthreads", str(threads), "--no-nanny")
    return started("distributed.cli.dask_worker", address, *options, **variables)


@contextmanager
def cluster_of(*threads: int, **variables: str) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A scheduler, and workers with some threads; yields its address and their processes."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    scheduler = started("distributed.cli.dask_scheduler", "--port", str(port))
    processes = [worker(address, each, **variables) for each in threads]
    try:
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(len(threads), timeout=60)
        yield address, processes
    finally:
        for process in [scheduler, *processes]:
            process.kill()
            process.wait(30)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with a worker of one thread and one of two."""
    with cluster_of(1, 2) as (address, _):
        yield address


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The tiny project with every day built, and a training for each kind of job."""
    root = write_log(tmp_path_factory.mktemp("built"))
    write_project(
        root,
        models={"other": {"preset": "shared_bottom"}},
        training={"threads": 1, "refit": True, "spread_seeds": 1, "trees": 4, "epochs": 3},
        calibration={"refit_days": 2},
    )
    return prepared(root)


def assert_same_suite(one: Suite, other: Suite) -> None:
    assert comparison_rows(one) == comparison_rows(other)
    assert one.winner.label == other.winner.label
    assert [run.label for run in one.runs] == [run.label for run in other.runs]
    for run, same in zip(one.runs, other.runs, strict=True):
        np.testing.assert_array_equal(run.test_prediction, same.test_prediction)
    assert one.winner.artifact.seed_metrics == other.winner.artifact.seed_metrics


@pytest.mark.slow
@pytest.mark.parametrize(("in_memory_rows", "distill"), [(1_000_000, 0.0), (30, 0.8)])
def test_two_workers_give_the_suite_of_this_host(cluster, built, in_memory_rows, distill):
    """Also with streamed and distilled rows; the log says which worker trained what."""
    context = with_training(built, in_memory_rows=in_memory_rows, distill=distill, ranks=1)
    calls: dict[str, list] = {"here": [], "there": []}

    def callbacks(where):
        return Callbacks(lambda name, seed, epoch: calls[where].append((name, seed, epoch.number)))

    here = train_suite(context, LAST, callbacks("here"))
    said: list[str] = []
    with workers_of(cluster, said.append) as trainer:
        there = train_suite(context, LAST, callbacks("there"), trainer)
    assert_same_suite(here, there)
    assert [note for note in there.notes if "training.distill" in note] == there.notes[-1:] * (
        distill > 0
    )
    assert sorted(calls["there"]) == sorted(calls["here"])
    trained, places = zip(*(line.split(" trained on ") for line in said), strict=True)
    assert {"linear seed 0", "mmoe seed 0", "other seed 0"} < set(trained)
    assert len(set(trained) & {"linear seed 1", "mmoe seed 1", "other seed 1"}) == 1
    # Contenders, trees, refit, a day left out, another seed.
    assert len(trained) == 3 + 1 + 1 + 1 + 1
    assert len(set(places)) == 2
    assert not list((context.workspace.root / "checkpoints").glob("*"))


def meeting(folder: Path, size: int, project: Project, dataset: Dataset, running: Running):
    """A job that waits until `size` jobs are there: its process, torch's threads, those it met."""
    (folder / str(os.getpid())).touch()
    present: set[str] = set()
    end = time.monotonic() + 60
    while len(present) < size and time.monotonic() < end:
        present = {file.name for file in folder.iterdir()}
        time.sleep(0.01)
    return os.getpid(), torch.get_num_threads(), len(present)


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "fitting"), [(1, 3), (2, 2)])
def test_a_worker_takes_as_many_trainings_as_its_threads_are_enough_for(
    cluster, built, tmp_path, threads, fitting
):
    """One worker has one thread, the other two; a training takes one or two of them.

    A worker with fewer threads than a training takes one training.
    """
    project = with_training(built, threads=threads).project
    dataset = load_dataset(built, LAST)
    jobs = [Job(str(n), partial(meeting, tmp_path, fitting)) for n in range(5)]
    with workers_of(cluster) as trainer:
        found = trainer.run(project, dataset, jobs)
    assert {met for _, _, met in found} == {fitting}
    assert len({process for process, _, _ in found}) == fitting
    assert {of_torch for _, of_torch, _ in found} == {threads}


def dying(contender: Contender, mark: Path, project: Project, dataset: Dataset, running: Running):
    """A training that once, in its third epoch, kills its process or the worker that started it."""

    def on_epoch(epoch):
        running.on_epoch(epoch)
        if epoch.number == 3 and not mark.exists():
            mark.touch()
            time.sleep(0.5)  # the report is sent
            os.kill(os.getpid() if mark.name == "process" else os.getppid(), signal.SIGKILL)
            time.sleep(60)  # it ends with its worker

    return train_model(project, dataset, contender, on_epoch)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["process", "worker"])
def test_a_training_that_loses_its_worker_resumes_from_the_checkpoint(built, tmp_path, victim):
    """On another worker; where it was the only one, on one that joins later."""
    training = built.project.training.model_copy(
        update={"epochs": 6, "patience": 6, "batch_size": 16, "checkpoint_seconds": 1e-9}
    )
    project, mark = built.project.model_copy(update={"training": training}), tmp_path / victim
    dataset = load_dataset(replace(built, project=project), LAST)
    contender = Contender("mmoe", model_specs(project)["mmoe"], 0)
    here = train_model(project, dataset, contender)
    shutil.rmtree(built.workspace.root / "checkpoints")
    epochs: list[int] = []
    said: list[str] = []
    job = Job("mmoe", partial(dying, contender, mark), lambda epoch: epochs.append(epoch.number))
    with cluster_of(1) as (address, processes):

        def replace_lost() -> None:
            processes[0].wait()
            processes.append(worker(address))

        joining = threading.Thread(target=replace_lost, daemon=True)
        with workers_of(address, said.append) as trainer:
            if victim == "worker":
                joining.start()
            (there,) = trainer.run(project, dataset, [job])
        assert len(processes) == (2 if victim == "worker" else 1)
    assert mark.exists()
    assert ", after it was lost on tcp://" in said[0]
    assert epochs[:3] == [1, 2, 3]
    assert epochs[3:] in ([4, 5, 6], [3, 4, 5, 6])  # not from the first epoch on
    weights, same = here.trained.model.state_dict(), there.trained.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    np.testing.assert_array_equal(here.test_prediction, there.test_prediction)


def places(line: str) -> list[str]:
    """The addresses in a line on where a job was trained."""
    return line.split(" trained on ")[1].split(",")[0].split(" and ")


def assert_ranks_train_alike(address: str, built: Context) -> list[str]:
    """Two ranks train what one process does, without dropout; the addresses of their workers.

    Rows are streamed. The random numbers of dropout are each rank's own.
    """
    context = with_training(built, in_memory_rows=30, ranks=2, batch_size=8, unknown_rate=0.0)
    dataset, spec = load_dataset(context, LAST), model_specs(context.project)["mmoe"]
    contender = Contender("mmoe", replace(spec, dropout=0.0), 0)
    here = train_model(context.project, dataset, contender)
    epochs: list[int] = []
    on_epoch = Callbacks(lambda name, seed, epoch: epochs.append(epoch.number))
    said: list[str] = []
    with workers_of(address, said.append) as trainer:
        (there,) = trainer.run(context.project, dataset, [training_of(contender, on_epoch)])
    assert epochs == [epoch.number for epoch in here.trained.epochs]
    weights, same = here.trained.model.state_dict(), there.trained.model.state_dict()
    for name in weights:
        torch.testing.assert_close(weights[name], same[name], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(here.test_prediction, there.test_prediction, rtol=1e-4, atol=1e-6)
    return places(said[0])


@pytest.mark.slow
def test_ranks_on_workers_train_what_one_process_does(cluster, built):
    assert len(assert_ranks_train_alike(cluster, built)) == 2


@pytest.mark.slow
def test_ranks_on_two_hosts_train_what_one_process_does(hosts, built):
    """Each host has a worker with room for one rank, and one interface beside its loopback."""
    address = f"tcp://{hosts[0].address}:8786"
    quiet = {"DASK_LOGGING__DISTRIBUTED": "error", "GLOO_SOCKET_IFNAME": ""}
    line = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard", "--host"]
    processes = [hosts[0].start(*line, hosts[0].address, **quiet)]
    line = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1"]
    line += ["--no-dashboard", "--no-nanny", "--host"]
    processes += [host.start(*line, host.address, **quiet) for host in hosts]
    try:
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        found = assert_ranks_train_alike(address, built)
    finally:
        for process in processes:
            process.kill()
            process.wait(30)
    assert {urlsplit(place).hostname for place in found} == {host.address for host in hosts}


@pytest.mark.slow
def test_trainings_share_the_room_of_the_cluster(cluster, built):
    """There is room for three processes: for one training and for two."""
    context = with_training(built, in_memory_rows=30, epochs=1)
    dataset, spec = load_dataset(context, LAST), model_specs(context.project)["mmoe"]
    jobs = [training_of(Contender("mmoe", spec, seed)) for seed in range(2)]
    said: list[str] = []
    with workers_of(cluster, said.append) as trainer:
        trainer.run(context.project, dataset, jobs[:1])
        assert [len(places(line)) for line in said] == [3]
        trainer.run(context.project, dataset, jobs)
        assert sorted(len(places(line)) for line in said[1:]) == [1, 2]
        pcgrad = with_training(context, balancing="pcgrad").project
        trainer.run(pcgrad, dataset, jobs[:1])
        assert len(places(said[3])) == 1  # its gradients are no sums over rows


def dying_rank(contender: Contender, mark: Path, project: Project, dataset: Dataset, running):
    """A training whose second rank kills its process once, or its worker, in its second epoch."""

    def on_epoch(epoch):
        running.on_epoch(epoch)
        if running.world.rank == 1 and epoch.number == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid() if mark.name == "process" else os.getppid(), signal.SIGKILL)
            time.sleep(60)

    return train_model(project, dataset, contender, on_epoch, running.world)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["process", "worker"])
def test_a_training_that_loses_a_rank_resumes_from_the_checkpoint(built, tmp_path, victim):
    """It ends with the bits of a training on as many ranks that lost none."""
    context = with_training(
        built,
        in_memory_rows=30,
        ranks=2,
        epochs=3,
        patience=3,
        batch_size=16,
        checkpoint_seconds=1e-9,
    )
    project = context.project
    dataset, spec = load_dataset(context, LAST), model_specs(project)["mmoe"]
    contender, mark = Contender("mmoe", spec, 0), tmp_path / victim
    epochs: list[int] = []
    job = Job(
        "mmoe",
        partial(dying_rank, contender, mark),
        lambda epoch: epochs.append(epoch.number),
        divisible=True,
    )
    said: list[str] = []
    with cluster_of(1, 1, 1) as (address, _), workers_of(address, said.append) as trainer:
        (lost,) = trainer.run(project, dataset, [job])
        assert mark.exists()
        shutil.rmtree(built.workspace.root / "checkpoints")
        (whole,) = trainer.run(project, dataset, [training_of(contender)])
        shutil.rmtree(built.workspace.root / "checkpoints")
    assert [len(places(line)) for line in said] == [2, 2]
    assert " and lost a rank" in said[0]
    assert epochs[-2:] == [2, 3]
    assert epochs.count(1) == 1  # not from the first epoch on
    weights, same = whole.trained.model.state_dict(), lost.trained.model.state_dict()
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def waiting_rank(
    contender: Contender, folder: Path, victim: int, project: Project, dataset: Dataset, running
):
    """A training whose first rank, when all batches are done, waits until a worker was killed."""
    run = train_model(project, dataset, contender, running.on_epoch, running.world)
    (folder / f"{running.world.rank}").write_text(str(os.getppid()))
    if running.world.rank == 0:
        while not (folder / "killed").exists():
            time.sleep(0.1)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_worker_that_is_lost_after_the_last_batch(built, tmp_path, victim):
    """That of rank 0 has lost the result, that of rank 1 nothing."""
    context = with_training(built, in_memory_rows=30, ranks=2, epochs=1)
    dataset, spec = load_dataset(context, LAST), model_specs(context.project)["mmoe"]
    work = partial(waiting_rank, Contender("mmoe", spec, 0), tmp_path, victim)

    def kill() -> None:
        while not all((tmp_path / f"{rank}").exists() for rank in range(2)):
            time.sleep(0.1)
        time.sleep(1.0)  # the second rank's result is sent
        os.kill(int((tmp_path / f"{victim}").read_text()), signal.SIGKILL)
        (tmp_path / "killed").touch()

    said: list[str] = []
    with cluster_of(1, 1) as (address, _), workers_of(address, said.append) as trainer:
        threading.Thread(target=kill, daemon=True).start()
        (run,) = trainer.run(context.project, dataset, [Job("mmoe", work, divisible=True)])
    assert len(run.trained.epochs) == 1
    assert len(places(said[0])) == (1 if victim == 0 else 2)  # one worker is left for a new start
    shutil.rmtree(built.workspace.root / "checkpoints", ignore_errors=True)


def failing_rank(project: Project, dataset: Dataset, running: Running) -> None:
    if running.world.rank == 1:
        raise KeyError("of the second rank")
    time.sleep(LOOK + 4)  # it notices late
    running.world.wait()


@pytest.mark.slow
def test_the_error_of_a_rank_comes_before_those_of_ranks_that_lost_it(cluster, built):
    context = with_training(built, in_memory_rows=30, ranks=2)
    job = Job("one", failing_rank, divisible=True)
    with workers_of(cluster) as trainer, pytest.raises(KeyError, match="of the second rank"):
        trainer.run(context.project, load_dataset(context, LAST), [job])


def sleeping(seconds: float) -> None:
    time.sleep(seconds)


@pytest.mark.slow
def test_ranks_without_room_for_all_become_one(cluster, built):
    """Another night has taken a third of the room that the cluster is known to have."""
    context = with_training(built, in_memory_rows=30, ranks=3, epochs=1)
    dataset, spec = load_dataset(context, LAST), model_specs(context.project)["mmoe"]
    said: list[str] = []
    with (
        workers_of(cluster, said.append) as trainer,
        Client(cluster, timeout=60, set_as_default=False) as other,
    ):
        trainer.run(context.project, dataset, [Job("first", where)])  # rooms are known now
        held = other.submit(sleeping, 60, resources={SEAT: 1})
        (run,) = trainer.run(context.project, dataset, [training_of(Contender("mmoe", spec, 0))])
        held.cancel()
    assert len(places(said[1])) == 1
    assert len(run.trained.epochs) == 1


def where(project: Project, dataset: Dataset, running: Running) -> int:
    return os.getpid()


@pytest.mark.slow
def test_an_error_of_a_training_on_a_worker_is_that_of_the_suite(cluster, built):
    context = with_training(built, learning_rate=1e30)
    with (
        workers_of(cluster) as trainer,
        pytest.raises(FloatingPointError, match="loss is not finite in epoch"),
    ):
        train_suite(context, LAST, trainer=trainer)


def out_of_time(project: Project, dataset: Dataset, running: Running) -> None:
    raise TimeoutError("the job's own")


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_is_not_started_again(cluster, built):
    with workers_of(cluster) as trainer, pytest.raises(TimeoutError, match="the job's own"):
        trainer.run(built.project, load_dataset(built, LAST), [Job("late", out_of_time)])


@pytest.mark.slow
def test_a_worker_without_torch_is_refused(tmp_path):
    """Before anything is built."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    with (
        cluster_of(1, PYTHONPATH=path) as (address, _),
        pytest.raises(ProjectError, match=r"worker tcp://\S+ lacks torch; allowed"),
        connected(address),
    ):
        pass


def test_workers_that_cannot_train_are_named():
    workers = {
        "tcp://a:1": (__version__, True),
        "tcp://b:1": ("0.0.9", True),
        "tcp://c:1": (__version__, False),
        "tcp://d:1": ModuleNotFoundError("No module named 'mtl_ranker'"),
    }
    with pytest.raises(ProjectError) as refused:
        refuse_workers("tcp://host:8786", workers)
    assert str(refused.value) == (
        "--cluster tcp://host:8786: worker tcp://b:1 has mtl_ranker 0.0.9; worker tcp://c:1 lacks "
        "torch; worker tcp://d:1 cannot import mtl_ranker: No module named 'mtl_ranker'; allowed: "
        f"workers with torch and mtl_ranker {__version__}, as on this host"
    )
    refuse_workers("tcp://host:8786", {"tcp://a:1": (__version__, True)})
