"""Several ranks train the same model as one process; after a lost rank, training is resumed."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mtl_ranker.errors import ProjectError
from mtl_ranker.training.distributed import group_name, interface_of

WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from mtl_ranker.training.batches import encode_examples
from mtl_ranker.training.state import Checkpoint
from mtl_ranker.training.distributed import ranks
from mtl_ranker.training.loop import Design, Execution, Rows, train_ranker
from tests.training import rows as small

folder, how = Path(sys.argv[1]), sys.argv[2]
more = {"sparse_rows": 1} if how == "sparse" else {}

class Saving(Checkpoint):
    saves = 0
    def due(self): return True
    def save(self, state):
        super().save(state)
        self.saves += 1
        if how == "die" and self.saves == 13 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
frame = small.frame(500)
encoder = small.encoder(frame)
rows = encode_examples(encoder, frame, small.LABELS)
held_out = encode_examples(encoder, small.frame(200, seed=9), small.LABELS)
with ranks() as world:
    run = train_ranker(
        Design(small.spec(dropout=0.0), encoder, small.TASKS), Rows(rows, held_out),
        small.settings(position_dropout=0.0, **more), 0,
        Execution(checkpoint=Saving(folder / "a.pt", "key"), world=world),
    )
    if world.rank == 0:
        torch.save(run.model.state_dict(), folder / "weights.pt")
        (folder / "losses.txt").write_text(str([e.train_loss for e in run.epochs]))
        (folder / "ranks.txt").write_text(str(world.size))
"""


def run(folder: Path, ranks: int, how: str = "live", restarts: int = 0) -> dict[str, torch.Tensor]:
    folder.mkdir()
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    launch = [] if ranks == 0 else ["-m", "torch.distributed.run", "--standalone"]
    if ranks:
        launch += [f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch, str(worker), str(folder), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "weights.pt")


@pytest.mark.slow
def test_two_and_three_ranks_train_what_one_process_does(tmp_path):
    one = run(tmp_path / "one", 0)
    for size in (2, 3):
        many = run(tmp_path / str(size), size)
        assert (tmp_path / str(size) / "ranks.txt").read_text() == str(size)
        for name, value in one.items():
            torch.testing.assert_close(many[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_ranks_also_add_sparse_gradients(tmp_path):
    one, two = run(tmp_path / "one", 0, "sparse"), run(tmp_path / "two", 2, "sparse")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_lost_rank_resumes_from_its_checkpoint(tmp_path):
    whole = run(tmp_path / "whole", 2)
    resumed = run(tmp_path / "lost", 2, "die", restarts=1)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [(tmp_path / name / "losses.txt").read_text() for name in ("whole", "lost")]
    assert losses[0] == losses[1]


def start(store: dist.Store, size: int) -> list[str]:
    """The name that each rank of one start gets; the last rank calls first."""
    with ThreadPoolExecutor(size) as pool:
        names = [pool.submit(group_name, store, rank, size, 20.0) for rank in reversed(range(size))]
        return [name.result() for name in names]


def test_the_ranks_of_each_start_agree_on_a_new_name(tmp_path):
    store = dist.HashStore()
    groups = []
    for _ in range(4):
        names = start(store, 3)
        assert len(set(names)) == 1
        groups.append(names[0])
    assert len(set(groups)) == 4


def test_a_start_in_which_a_rank_never_arrived_does_not_confuse_the_next():
    store = dist.HashStore()
    with pytest.raises(TimeoutError, match="rank 1 of 3: rank 0 has not started"):
        group_name(store, 1, 3, 0.2)
    store.set("name", "lost")  # by a rank 0 that was killed while it waited for rank 2
    store.set("lost/1", "")
    assert len(set(start(store, 3))) == 1


def test_an_address_of_no_interface_is_named():
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ProjectError, match=r"worker at 198\.51\.100\.7: no network interface"):
        interface_of("198.51.100.7")
