"""The project file: what is wrong is named with its key, what was found and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtl_ranker.config import load_project, parse_project, preset_names
from mtl_ranker.errors import ProjectError
from mtl_ranker.training.suite import model_specs
from tests.conftest import PROJECT


def test_presets_load_and_their_models_are_known():
    assert preset_names() == ["census", "kuairand", "simulated"]
    for name in preset_names():
        project = load_project(name)
        assert set(model_specs(project)) == {"single_task", "shared_bottom", "omoe", "mmoe"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("windows = [1, 3]", "window = [1, 3]"), ["features.window", "did you mean windows"]),
        (("windows = [1, 3]", "windows = [3, 1]"), ["features.windows", "ascending"]),
        (("windows = [1, 3]", 'windows = "all"'), ["features.windows", "'all'", "list"]),
        (
            ('group = "engagement"', 'group = "fun"'),
            ["objectives[0].group", "'fun'", "satisfaction"],
        ),
        (('name = "long"', 'name = "click"'), ["'click'", "twice"]),
        (("train_days = 3", "train_days = 0"), ["split.train_days", "0", "greater than or equal"]),
        (('user = "u"', 'user = "u"\ntimezone = "Mars"'), ["log.timezone", "Mars", "IANA"]),
        (('label = "click"', ""), ["objectives[0].label", "missing"]),
        (("[training]", "[trainning]"), ["trainning", "did you mean training"]),
        (("[training]", "training ="), ["not valid TOML"]),
        (('where = "click = 1"', 'after = "view"'), ["objectives[1].after", "'view'", "'click'"]),
        (('where = "click = 1"', 'after = "long"'), ["objectives[1].after", "wait for each other"]),
        (('where = "click = 1"', 'kind = "ordinal"'), ["objectives[1]", "levels"]),
        (('where = "click = 1"', 'transform = "log1p"'), ["objectives[1]", "regression"]),
        (
            ("[split]", '[[features.histories]]\nsignal = "click"\ncolumns = ["play"]\n[split]'),
            ["histories[0].columns", "'play'", "tab, item_id"],
        ),
        (
            ("[split]", '[[features.histories]]\nsignal = "share"\ncolumns = ["tab"]\n[split]'),
            ["histories[0].signal", "'share'", "click, long"],
        ),
        (("[training]", '[training]\nbalancing = "fair"'), ["training.balancing", "'pcgrad'"]),
    ],
)
def test_errors_name_key_found_and_allowed(change, words):
    with pytest.raises(ProjectError) as error:
        parse_project(PROJECT.replace(*change, 1), "project.toml")
    for word in ["project.toml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("experts = 2", "expert = 2"), ["models.mmoe.expert", "did you mean expert"]),
        (("experts = 2", "experts = 0"), ["models.mmoe.experts", "0", "at least 1"]),
        (("experts = 2", 'expert_kinds = ["tree"]'), ["models.mmoe.expert_kinds", "cross"]),
        (("experts = 2", 'expert_groups = ["user"]'), ["models.mmoe.expert_groups", "all"]),
        (('preset = "mmoe"', 'preset = "moe"'), ["models.mmoe.preset", "'moe'", "omoe"]),
    ],
)
def test_model_errors(change, words):
    project = parse_project(PROJECT.replace(*change, 1), "project.toml")
    with pytest.raises(ProjectError) as error:
        model_specs(project)
    for word in words:
        assert word in str(error.value)


def test_unknown_file(tmp_path: Path):
    with pytest.raises(ProjectError, match="presets: census, kuairand, simulated"):
        load_project(str(tmp_path / "nothing.toml"))
