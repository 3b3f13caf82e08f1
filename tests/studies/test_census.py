"""Census-Income: UCI's files, the paper's protocol, and models tuned alike."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from mtl_ranker.errors import ProjectError
from mtl_ranker.models.presets import make
from mtl_ranker.studies.census import (
    MODELS,
    Candidate,
    averaged,
    compare,
    equal_size,
    read_split,
    tune_ranker,
    tune_trees,
)
from mtl_ranker.studies.census_data import CENSUS_COLUMNS, CENSUS_NUMBERS, read_census
from mtl_ranker.studies.search import Budget
from mtl_ranker.training.network import build_ranker

DEGREES = ["Children", "High school graduate", "Bachelors degree(BA AB BS)", "Some college"]


def lines(rows: int, seed: int, end: str = ".") -> list[str]:
    """Rows in UCI's format in which age tells income and education, and both tell marriage."""
    rng = random.Random(seed)
    found = []
    for _ in range(rows):
        age = rng.randint(1, 90)
        degree = DEGREES[min(3, int(age / 20) * rng.randint(0, 1) + rng.randint(0, 1))]
        values = {
            "age": str(age),
            "education": degree,
            "marital_status": "Never married" if rng.random() > age / 60 else "Divorced",
            "income": "50000+" if age + rng.gauss(0, 20) > 60 else "- 50000",
            "previous_state": "?",
            "class_of_worker": rng.choice(["Not in universe", "Private"]),
            "instance_weight": "1700.5",
        }
        fields = [
            values.get(c, str(rng.randint(0, 9)) if c in CENSUS_NUMBERS else "x")
            for c in CENSUS_COLUMNS
        ]
        found.append(", ".join(fields) + end)
    return found


def write(path: Path, rows: list[str]) -> Path:
    text = "\n".join(rows) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["census-income.data", "census-income.data.gz"])
@pytest.mark.parametrize("end", [".", ""])
def test_reader_takes_plain_and_gzip_with_and_without_the_full_stop(tmp_path, name, end):
    frame = read_census(write(tmp_path / name, lines(50, 0, end)))
    assert frame.height == 50
    assert frame["age"].dtype.is_float()
    assert set(frame["income_50k"]) == {0, 1}
    assert frame["class_of_worker"].is_in(["Not in universe", "Private"]).all()
    assert (frame["previous_state"] == "?").all()


def test_reader_names_the_line(tmp_path):
    rows = lines(5, 0)
    short = write(tmp_path / "a.data", [*rows[:2], "1, 2, 3", *rows[2:]])
    with pytest.raises(ProjectError, match=r"a\.data: line 3 has 3 .* 42"):
        read_census(short)
    foreign = write(tmp_path / "b.data", [*rows[:4], rows[4].rsplit(",", 1)[0] + ", rich."])
    with pytest.raises(ProjectError, match=r"b\.data: line 5 ends in 'rich'; allowed"):
        read_census(foreign)


def test_one_file_is_split_70_15_15_and_the_tasks_leave_the_inputs(tmp_path):
    write(tmp_path / "census-income.data", lines(400, 0))
    first, second = read_split(tmp_path, 1), read_split(tmp_path, 2)
    assert [len(e) for e in first.examples.values()] == [280, 60, 60]
    assert {"income", "marital_status", "instance_weight"}.isdisjoint(first.encoder.columns)
    assert {"education", "age"} <= set(first.encoder.columns)
    assert {"education", "marital_status"}.isdisjoint(second.encoder.columns)
    assert {"income", "age"} <= set(second.encoder.columns)
    for split in (first, second):
        assert {"college", "income_50k", "never_married"}.isdisjoint(split.encoder.columns)
    ages = [row for part in first.frames.values() for row in part["age"]]
    assert len(ages) == 400
    labels = np.concatenate([e.labels.numpy() for e in first.examples.values()])
    assert first.correlation == pytest.approx(abs(np.corrcoef(labels.T)[0, 1]))


def test_two_files_follow_the_papers_protocol(tmp_path):
    write(tmp_path / "census-income.data", lines(300, 0))
    write(tmp_path / "census-income.test.gz", lines(101, 1))
    split = read_split(tmp_path, 1)
    assert [len(e) for e in split.examples.values()] == [300, 50, 51]
    assert "halved" in split.protocol
    with pytest.raises(ProjectError, match=r"neither census-income\.data nor"):
        read_split(tmp_path / "nowhere", 1)


@pytest.mark.slow
@pytest.mark.real
def test_correlations_of_the_real_data_are_near_the_papers(shared_data):
    data = shared_data / "census-income"
    assert read_split(data, 1).correlation == pytest.approx(0.1768, abs=0.01)
    assert read_split(data, 2).correlation == pytest.approx(0.2373, abs=0.01)


def test_models_are_of_equal_size_beyond_their_embeddings(tmp_path):
    write(tmp_path / "census-income.data", lines(200, 0))
    split = read_split(tmp_path, 1)
    sizes = []
    for name in (m for m in MODELS if m != "tensor_factorisation"):
        spec = make(name, equal_size(split, name, 30_000), 2)
        model = build_ranker(spec, split.encoder, split.tasks)
        sizes.append(model.parameter_count() - model.embedding.table.weight.numel())
    assert max(sizes) < 1.1 * min(sizes), sizes


@pytest.mark.slow
def test_tuning_ranker_and_trees_on_the_same_rows(tmp_path):
    pytest.importorskip("lightgbm")
    pytest.importorskip("optuna")
    write(tmp_path / "census-income.data", lines(3_000, 0))
    split = read_split(tmp_path, 1)
    told: list[str] = []
    candidate = Candidate("mmoe", equal_size(split, "mmoe", 6_000))
    budget = Budget(trials=2, seeds=range(2), epochs=4)
    ours = tune_ranker(split, candidate, budget, told.append)
    trees = tune_trees(split, budget, told.append)
    assert len(told) == 4 + 8
    again = tune_ranker(split, candidate, budget)
    np.testing.assert_array_equal(ours.predictions[1], again.predictions[1])
    rows, gains = compare(split, [trees, ours, averaged(ours)], "LightGBM")
    labels = split.examples["test"].labels.numpy()
    for row, model in zip(rows, [trees, ours, averaged(ours)], strict=True):
        found = model.aucs(labels)
        assert row.best == found.max(0).tolist()
        np.testing.assert_allclose([m.value for m in row.mean], found.mean(0))
        assert (found > 0.7).all()
    assert len(gains) == 4
