"""The project file: what is wrong is named with its key, what was found and what is allowed."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mtl_ranker.config import load_project, parse_project, preset_names
from mtl_ranker.errors import ProjectError
from mtl_ranker.training.network import tasks_of
from mtl_ranker.training.specs import model_specs
from tests.projects import TINY, WITHOUT, changed, project, project_text


def objective(index: int, **changes: Any) -> dict[str, Any]:
    """Changes of the tiny project: one objective."""
    return {"objectives": changed(TINY["objectives"], index, **changes)}


def test_presets_load_and_their_models_are_known():
    assert preset_names() == ["census", "kuairand", "shop", "simulated", "streams"]
    for name in preset_names():
        project = load_project(name)
        assert set(model_specs(project)) == {"single_task", "shared_bottom", "omoe", "mmoe"}


@pytest.mark.parametrize("name", preset_names())
def test_the_first_part_of_a_preset_describes_the_log_completely(name):
    text = resources.files("mtl_ranker").joinpath(f"presets/{name}.toml").read_text("utf-8")
    marks = [line.strip("# =") for line in text.splitlines() if line.startswith("# ===")]
    assert marks == ["Describe your log", "Tuning; usually leave"]
    described = parse_project(text.partition("Tuning; usually leave")[0], name)
    whole = load_project(name)
    assert (described.log, described.objectives) == (whole.log, whole.objectives)
    assert described.scoring == whole.scoring
    for columns in ("entities", "numerics", "categoricals", "lists", "signals", "histories"):
        assert getattr(described.features, columns) == getattr(whole.features, columns)
    assert described != whole


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        (
            {"features": {"windows": WITHOUT, "window": [1, 3]}},
            ["features.window", "did you mean windows"],
        ),
        ({"features": {"windows": [3, 1]}}, ["features.windows", "ascending"]),
        ({"features": {"windows": "all"}}, ["features.windows", "'all'", "list"]),
        (objective(0, group="fun"), ["objectives[0].group", "'fun'", "satisfaction"]),
        (objective(1, name="click"), ["'click'", "twice"]),
        ({"split": {"train_days": 0}}, ["split.train_days", "0", "greater than or equal"]),
        ({"log": {"timezone": "Mars"}}, ["log.timezone", "Mars", "IANA"]),
        (objective(0, label=WITHOUT), ["objectives[0].label", "missing"]),
        (
            {"training": WITHOUT, "trainning": TINY["training"]},
            ["trainning", "did you mean training"],
        ),
        (
            objective(1, where=WITHOUT, conditional_on="view"),
            ["objectives[1].conditional_on", "'view'", "'click'"],
        ),
        (
            objective(1, where=WITHOUT, conditional_on="long"),
            ["objectives[1].conditional_on", "depend on each other"],
        ),
        (objective(1, where=WITHOUT, kind="ordinal"), ["objectives[1]", "levels"]),
        (
            objective(1, where=WITHOUT, kind="ordinal", levels=[1, 3]),
            ["objectives[1]", "levels: [1, 3]; allowed: a number, or whole numbers one after"],
        ),
        (objective(1, where=WITHOUT, kind="ordinal", levels=[5]), ["levels", "at least 2"]),
        (objective(1, where=WITHOUT, transform="log1p"), ["objectives[1]", "regression"]),
        (
            {"features": {"histories": [{"signal": "click", "columns": ["play"]}]}},
            ["histories[0].columns", "'play'", "tab, item_id"],
        ),
        (
            {"features": {"histories": [{"signal": "share", "columns": ["tab"]}]}},
            ["histories[0].signal", "'share'", "click, long"],
        ),
        ({"log": {"list": ["tab"]}}, ["log: list: ['tab']; allowed: user_id and further columns"]),
        ({"log": {"list": ["user_id", "tab", "tab"]}}, ["log: list", "each once"]),
        ({"log": {"list": ["user_id"], "request": "r"}}, ["log: request: not with list"]),
        ({"log": {"list": ["user_id", "date"]}}, ["log: list or request: date; allowed: columns"]),
        ({"log": {"request": "u"}}, ["log: list or request: u; allowed: columns beside user"]),
        ({"log": {"request": "item_id"}}, ["log: list or request: item_id; allowed: columns"]),
        ({"log": {"lists": ["user_id"]}}, ["log.lists", "did you mean list?"]),
        (objective(0, list_loss="ndcg"), ["objectives[0].list_loss", "'combined_pair'"]),
        (
            objective(1, where=WITHOUT, kind="regression", list_loss="rcr"),
            ["objectives[1]", "list_loss: for kind = 'binary' only", "'regression'"],
        ),
        (objective(0, list_weight=0.5), ["objectives[0]", "list_weight: only with list_loss"]),
        ({"training": {"balancing": "fair"}}, ["training.balancing", "'pcgrad'"]),
        (
            objective(1, where=WITHOUT, after="click"),
            ["objectives[1].after: renamed to conditional_on"],
        ),
        (
            {"models": {"mmoe": {"embedding_width": 8}}},
            ["models.mmoe.embedding_width: renamed to embedding_dim"],
        ),
        (
            {"promotion": {"better_beyond_doubt": True}},
            ["promotion.better_beyond_doubt: renamed to require_significance"],
        ),
        (
            {"promotion": {"max_calibration_error": 0.1}},
            ["promotion.max_calibration_error: renamed to max_calibration_shift"],
        ),
        (
            {"calibration": {"refit_share": 3}},
            ["calibration.refit_share", "less than or equal", "3"],
        ),
        (
            {"calibration": {"refit_share": -0.5}},
            ["calibration.refit_share", "greater than or equal"],
        ),
    ],
)
def test_errors_name_key_found_and_allowed(change, fragments):
    with pytest.raises(ProjectError) as error:
        parse_project(project_text(**change), "project.toml")
    for fragment in ["project.toml", *fragments]:
        assert fragment in str(error.value)


def test_text_that_is_no_toml_is_named():
    with pytest.raises(ProjectError) as error:
        parse_project(project_text() + "epochs =\n", "project.toml")
    for fragment in ["project.toml", "not valid TOML"]:
        assert fragment in str(error.value)


@pytest.mark.parametrize(
    ("change", "fragments"),
    [
        ({"experts": WITHOUT, "expert": 2}, ["models.mmoe.expert", "did you mean expert"]),
        ({"experts": 0}, ["models.mmoe.experts", "0", "at least 1"]),
        ({"experts": WITHOUT, "expert_kinds": ["tree"]}, ["models.mmoe.expert_kinds", "cross"]),
        ({"experts": WITHOUT, "expert_groups": ["user"]}, ["models.mmoe.expert_groups", "all"]),
        ({"preset": "moe"}, ["models.mmoe.preset", "'moe'", "omoe"]),
    ],
)
def test_model_errors(change, fragments):
    project = parse_project(project_text(models={"mmoe": change}), "project.toml")
    with pytest.raises(ProjectError) as error:
        model_specs(project)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_unknown_file(tmp_path: Path):
    with pytest.raises(ProjectError, match="presets: census, kuairand, shop, simulated, streams"):
        load_project(str(tmp_path / "nothing.toml"))


def test_a_saved_models_project_file_may_use_renamed_keys():
    old = {
        "objectives": changed(TINY["objectives"], 1, where=WITHOUT, after="click"),
        "models": {"mmoe": {"embedding_width": 5}},
        "promotion": {"better_beyond_doubt": False, "max_calibration_error": 0.1},
    }
    project = parse_project(project_text(**old), "project.toml", rename=True)
    assert project.objectives[1].conditional_on == "click"
    assert project.models["mmoe"] == TINY["models"]["mmoe"] | {"embedding_dim": 5}
    assert not project.promotion.require_significance


def test_an_objectives_own_list_loss_comes_before_pairs_of_all():
    own = changed(TINY["objectives"], 0, list_loss="rcr", list_weight=0.3)
    found = tasks_of(project(objectives=own, training={"pairwise": 0.1}))
    assert [(t.list_loss, t.list_weight) for t in found] == [("rcr", 0.3), ("pairs", 0.1)]
    none = changed(TINY["objectives"], 0, list_loss="none")
    found = tasks_of(project(objectives=none, training={"pairwise": 0.1}))
    assert [t.list_loss for t in found] == [None, "pairs"]
    assert [t.list_loss for t in tasks_of(project())] == [None, None]
