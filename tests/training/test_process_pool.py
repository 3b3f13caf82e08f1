"""A process for trainings: its messages, its errors and its end."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

from mtl_ranker.training.process_pool import Child


def work(job: str, report: Callable[[object], None]) -> tuple[int, int]:
    import torch

    if job == "fail":
        raise ValueError("no such job")
    if job == "end":
        os._exit(3)
    print("printed, and no message")
    report(job)
    return os.getpid(), torch.get_num_threads()


@pytest.mark.slow
def test_a_process_runs_one_job_after_the_other_until_it_ends(tmp_path: Path):
    file = tmp_path / "work.pickle"
    file.write_bytes(pickle.dumps(work))
    child, reports = Child(file, 3), []
    try:
        one = child.run("one", reports.append)
        assert one[0] != os.getpid()
        assert one[1] == 3
        with pytest.raises(ValueError, match="no such job") as failed:
            child.run("fail", reports.append)
        assert "test_process_pool" in failed.value.__notes__[0]
        assert child.run("two", reports.append) == one
        assert reports == ["one", "two"]
        assert child.runs
        with pytest.raises(ChildProcessError, match=r"ended \(exit code 3\)"):
            child.run("end", reports.append)
        assert not child.runs
    finally:
        child.close()
