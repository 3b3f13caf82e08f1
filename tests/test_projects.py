"""Projects by keyword: tables merge, what cannot be changed fails, the bases stay as they are."""

from __future__ import annotations

import copy
import tomllib

import pytest

from mtl_ranker.config import load_project
from tests import projects
from tests.projects import (
    SMALL,
    TINY,
    WITHOUT,
    changed,
    edit_project,
    merged,
    project_text,
    write_project,
)


@pytest.mark.parametrize("base", [TINY, SMALL], ids=["tiny", "small"])
def test_the_text_says_what_the_tables_say(base):
    assert tomllib.loads(project_text(base)) == base
    more = {"weight": 0.5, "label": 'a "quoted" name\nof two lines'}
    found = merged(base, objectives=changed(base["objectives"], 0, **more))
    assert tomllib.loads(project_text(found)) == found


def test_tables_merge_and_everything_else_replaces():
    found = merged(
        training={"epochs": 12, "seeds": [0, 1]},
        features={"windows": [7]},
        models={"mmoe": {"experts": WITHOUT}, "alone": {"preset": "single_task"}},
        drift={"fail_nulls": 0.5},
        split=WITHOUT,
    )
    assert found["training"] == TINY["training"] | {"epochs": 12, "seeds": [0, 1]}
    assert found["features"] == TINY["features"] | {"windows": [7]}
    assert found["models"] == {
        "mmoe": {"preset": "mmoe", "expert_hidden": [8]},
        "alone": {"preset": "single_task"},
    }
    assert found["drift"] == {"fail_nulls": 0.5}
    assert "split" not in found
    assert found["log"] == TINY["log"]


def test_one_table_of_a_list_changes():
    found = changed(TINY["objectives"], 1, where=WITHOUT, weight=2.0)
    assert found[0] == TINY["objectives"][0]
    assert "where" not in found[1]
    assert projects.project(objectives=found).objectives[1].weight == 2.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trainning": WITHOUT}, "trainning is not there"),
        ({"training": {"epoch": WITHOUT}}, r"training\.epoch is not there"),
        ({"models": {"alone": {"experts": WITHOUT}}}, r"models\.alone\.experts is not there"),
    ],
)
def test_what_is_not_there_cannot_be_taken_away(changes, words):
    with pytest.raises(KeyError, match=words):
        merged(**changes)


def test_an_unknown_table_of_a_list_or_key_in_it_fails():
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"no table {index}: there are 2"):
            changed(TINY["objectives"], index, where="click = 9")
    with pytest.raises(KeyError, match=r"\[0\]\.where is not there"):
        changed(TINY["objectives"], 0, where=WITHOUT)


def test_no_base_changes_with_its_copies():
    before = copy.deepcopy((TINY, SMALL))
    for base in (TINY, SMALL):
        found = merged(base, training={"epochs": 9}, models={"mmoe": WITHOUT})
        found["features"]["windows"].append(30)
        changed(base["objectives"], 0, label="other")[1]["label"] = "other too"
    given = {"seeds": [0, 1]}
    merged(training=given)["training"]["seeds"].append(2)
    assert given == {"seeds": [0, 1]}
    assert before == (TINY, SMALL)


def test_edits_add_up_and_an_edit_that_changes_nothing_fails(tmp_path):
    file = write_project(tmp_path, SMALL, training={"epochs": 3})
    assert file == tmp_path / "project.toml"
    edit_project(tmp_path, features={"windows": [2]})
    edit_project(tmp_path, training={"seeds": [4]})
    found = load_project(str(file))
    assert (found.training.epochs, found.training.seeds) == (3, [4])
    assert found.features.windows == [2]
    with pytest.raises(ValueError, match="says so already"):
        edit_project(tmp_path, features={"windows": [2]})
