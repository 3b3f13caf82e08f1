"""Where trainings run on this host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mtl_ranker.config import load_project
from mtl_ranker.nightly.trainers import THIS_HOST, Job


def threads(*given: Any) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize(("setting", "expected"), [(None, 1), (3, 3)])
def test_a_training_has_no_more_threads_than_its_process_unless_it_is_told(setting, expected):
    """As with OMP_NUM_THREADS=1; the process has as many afterwards as before."""
    project = load_project("simulated")
    training = project.training.model_copy(update={"jobs": 1, "threads": setting})
    project = project.model_copy(update={"training": training})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset: Any = None  # which the job does not read
        assert THIS_HOST.run(project, dataset, [Job("one", threads)]) == [expected]
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
