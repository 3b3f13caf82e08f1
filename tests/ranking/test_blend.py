"""The blend: values along a chain by hand, recognised conditions, a shop with known truth."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.config import parse_project
from mtl_ranker.errors import ProjectError
from mtl_ranker.nightly.suite import train_suite
from mtl_ranker.ranking.artifact import RankerArtifact
from mtl_ranker.ranking.blend import (
    BlendChoice,
    blend,
    blended,
    chosen_blend,
    conditional,
    conditions,
    factors,
    label_matrix_of_values,
    value_matrix,
)
from tests.nightly.test_suite import LAST, prepared
from tests.projects import TINY, WITHOUT, changed, project, project_text, write_project

SHOP = [
    {"name": "click", "group": "engagement", "label": "click"},
    {"name": "bought", "group": "engagement", "label": "purchase", "where": "click = 1"},
    {
        "name": "stars",
        "group": "satisfaction",
        "kind": "regression",
        "label": "stars",
        "where": "purchase = 1",
    },
    {"name": "returned", "group": "satisfaction", "label": "returned", "where": "purchase = 1"},
]


def shop(objectives=SHOP, **scoring):
    return project(objectives=objectives, scoring=scoring)


PREDICTED = np.array([[0.5, 0.2, 4.0, 0.1], [0.25, 0.8, 2.0, 0.5]])


def test_a_chain_of_two_conditions_by_hand():
    found = value_matrix(shop(), PREDICTED)
    np.testing.assert_allclose(found, [[0.5, 0.1, 0.4, 0.01], [0.25, 0.2, 0.4, 0.1]])


def test_the_weight_of_a_bad_objective_counts_against():
    """Without a weight, with one of either sign, and after a choice of weights was stored."""
    bad = changed(SHOP, 3, good=False)
    for weight, expected in ((None, -1.0), (2.0, -2.0), (-2.0, -2.0), (0.0, 0.0)):
        chosen = shop(bad, weights={} if weight is None else {"returned": weight})
        assert chosen.blend_weights == {
            "click": 1.0, "bought": 1.0, "stars": 1.0, "returned": expected,
        }  # fmt: skip
        assert chosen.bad == {"returned"}
        score = [0.5 + 0.1 + 0.4 + expected * 0.01, 0.25 + 0.2 + 0.4 + expected * 0.1]
        frame = pl.DataFrame(PREDICTED, schema=list(chosen.blend_weights), orient="row")
        assert frame.select(blend(chosen)).to_series().to_list() == pytest.approx(score)
    assert shop(bad).blend_weights == shop(SHOP, weights={"returned": -1.0}).blend_weights


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("weight", [-0.5, 0.5])
def test_a_chosen_blend_keeps_its_signs(good, weight):
    ranker = RankerArtifact(shop(changed(SHOP, 3, good=good)), None, [], None)  # type: ignore[arg-type]
    choice = BlendChoice("weighted_sum", {"click": 1.0, "returned": weight})
    own = ranker.with_blend(choice).project
    assert own.blend_weights["returned"] == weight
    again = replace(ranker, project=own).with_blend(chosen_blend(own))
    assert again.project.blend_weights == own.blend_weights


@pytest.mark.parametrize(
    ("scoring", "expected"),
    [
        ({}, [0.5 + 0.1 + 0.4 + 0.01, 0.25 + 0.2 + 0.4 + 0.1]),
        (
            {"weights": {"click": 0.0, "stars": 2.0, "returned": -3.0}},
            [0.1 + 0.8 - 0.03, 0.2 + 0.8 - 0.3],
        ),
        (
            {"conditional": ["stars", "bought"]},
            [0.5 + 0.2 + 4.0 + 0.01, 0.25 + 0.8 + 2.0 + 0.1],
        ),
        (
            {"blend": "weighted_product", "weights": {"stars": 2.0, "returned": -1.0}},
            [0.5 * 0.1 * 0.4**2 / 0.01, 0.25 * 0.2 * 0.4**2 / 0.1],
        ),
    ],
)
def test_the_score_by_hand_with_negative_weights_and_objectives_that_are_not_chained(
    scoring, expected
):
    chosen = shop(**scoring)
    frame = pl.DataFrame(PREDICTED, schema=["click", "bought", "stars", "returned"], orient="row")
    assert frame.select(blend(chosen)).to_series().to_list() == pytest.approx(expected)
    score = blended(
        chosen.scoring.blend, list(chosen.blend_weights.values()), value_matrix(chosen, PREDICTED)
    )
    score = np.exp(score) if chosen.scoring.blend == "weighted_product" else score
    assert score == pytest.approx(expected)


def test_labels_of_values_are_0_where_the_condition_does_not_hold():
    nan = np.nan
    labels = np.array(
        [[0, nan, nan, nan], [1, 0, nan, nan], [1, 1, 5, 1], [1, 1, nan, 0], [nan, nan, nan, nan]]
    )
    expected = [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 5, 1], [1, 1, nan, 0], [nan] * 4]
    np.testing.assert_array_equal(label_matrix_of_values(shop(), labels), expected)
    unchained = shop(conditional=["bought", "stars", "returned"])
    np.testing.assert_array_equal(label_matrix_of_values(unchained, labels), labels)


@pytest.mark.parametrize(
    ("where", "parent"),
    [
        ('"purchase"=1', "bought"),
        ("(purchase = 1.0)", "bought"),
        ("purchase > 0", "bought"),
        ("purchase = 1 and click = 1", "bought"),
        ("click = 1 and purchase = 1", "bought"),
        ("click = 1", "click"),
        ("purchase = 0", None),
        ("purchase = 1 or click = 1", None),
        ("purchase = 1 and tab = 2", None),
        ("stars > 0", None),
        ("amount > 0", None),
    ],
)
def test_conditions_that_are_another_objectives_label(where, parent):
    found = shop(changed(SHOP, 3, where=where))
    assert conditions(found).get("returned") == parent
    assert conditional(found) == ([] if parent else ["returned"])
    chain = {"bought": ["bought", "click"], "click": ["click"], None: []}[parent]
    assert factors(found)["returned"] == chain


def test_levels_may_be_named_in_a_chain():
    stars = {"name": "stars", "group": "satisfaction", "kind": "ordinal", "label": "stars"}
    stars |= {"levels": [1, 2, 3, 4, 5], "where": "click = 1"}
    assert conditions(shop([SHOP[0], stars])) == {"stars": "click"}


def test_the_condition_of_a_case_label_is_recognised():
    label = "case when amount > 0 then 1 else 0 end"
    bought = changed(SHOP, 1, label=label)
    found = shop(changed(changed(bought, 2, where="amount > 0"), 3, where="amount > 1"))
    assert conditions(found) == {"bought": "click", "stars": "bought"}


def test_an_objective_with_conditional_on_is_of_all_impressions_and_ends_the_chain():
    bought = changed(SHOP, 1, where=WITHOUT, conditional_on="click")
    found = value_matrix(shop(bought), np.array([[0.5, 0.1, 4.0, 0.5]]))
    np.testing.assert_allclose(found, [[0.5, 0.1, 0.4, 0.05]])


def test_objectives_whose_conditions_are_each_other_are_not_chained():
    odd = changed(changed(SHOP, 0, where="purchase = 1"), 2, where=WITHOUT)
    found = conditions(shop(odd))
    assert len(set(found) & {"click", "bought"}) == 1


def test_an_objective_without_a_condition_cannot_be_conditional():
    with pytest.raises(ProjectError) as error:
        parse_project(
            project_text(objectives=SHOP, scoring={"conditional": ["click"]}), "shop.toml"
        )
    for fragment in ["scoring.conditional", "'click'", "['bought', 'stars', 'returned']"]:
        assert fragment in str(error.value)


def test_in_a_shop_with_known_truth_the_chain_is_worth_more():
    """Satisfied buyers are few: what is rarely bought has the best stars."""
    rng = np.random.default_rng(0)
    users, items = 300, 40
    appeal = rng.normal(0, 1, (users, items))
    truth = np.stack(
        [
            1 / (1 + np.exp(1.5 - appeal)),
            1 / (1 + np.exp(1.0 - 0.8 * appeal - rng.normal(0, 0.5, (users, items)))),
            3.0 - 0.8 * appeal + rng.normal(0, 0.5, (users, items)),
            1 / (1 + np.exp(2.0 + rng.normal(0, 1, (users, items)))),
        ],
        axis=-1,
    ).reshape(-1, 4)
    weights = {"click": 0.1, "bought": 1.0, "stars": 0.2, "returned": -1.0}
    # By hand, not by the blend: what an impression is worth on average.
    click, bought, stars, returned = truth.T
    worth = 0.1 * click + click * bought * (1.0 + 0.2 * stars - returned)

    def of_top_lists(**scoring):
        chosen = shop(weights=weights, **scoring)
        score = blended("weighted_sum", list(weights.values()), value_matrix(chosen, truth))
        top = np.argsort(-score.reshape(users, items), axis=1)[:, :5]
        return np.take_along_axis(worth.reshape(users, items), top, 1).mean()

    chained = of_top_lists()
    unchained = of_top_lists(conditional=["bought", "stars", "returned"])
    ideal = -np.sort(-worth.reshape(users, items), axis=1)[:, :5].mean()
    assert chained == pytest.approx(ideal)
    assert unchained < 0.6 * chained


def test_the_tiny_project_chains_its_satisfaction_objective():
    assert factors(project(TINY)) == {"click": [], "long": ["click"]}


def test_an_artifact_of_an_earlier_version_keeps_its_score_and_can_be_given_the_chain(tiny):
    suite = train_suite(prepared(tiny), LAST)
    artifact, frame = suite.winner.artifact, suite.held_out.frame
    folder = artifact.save(tiny / "saved")
    saved = artifact.predict(frame)
    by_hand = (saved["click"] + saved["click"] * saved["long"]).to_numpy()
    np.testing.assert_allclose(saved["score"].to_numpy(), by_hand, rtol=1e-5)
    assert RankerArtifact.load(folder).predict(frame).equals(saved)
    content = json.loads((folder / "model.json").read_text("utf-8"))
    del content["chained_blend"]
    (folder / "model.json").write_text(json.dumps(content), "utf-8")
    old = RankerArtifact.load(folder)
    before = old.predict(frame)
    np.testing.assert_allclose(
        before["score"].to_numpy(), (saved["click"] + saved["long"]).to_numpy(), rtol=1e-5
    )
    again = old.with_blend(BlendChoice("weighted_sum", old.project.blend_weights))
    assert again.predict(frame).equals(saved)


def test_check_says_how_conditional_objectives_enter_the_blend(tiny):
    stars = {"name": "stars", "group": "satisfaction", "kind": "regression", "label": "play"}
    objectives = [*TINY["objectives"], stars | {"where": "play > 5"}]
    config = write_project(tiny, objectives=objectives)
    lines = list(check_project(str(config), tiny))
    assert "    long enters the blend as P(click) x E[long | click]" in lines
    (line,) = [line for line in lines if line.startswith("    stars ")]
    assert "as predicted given its condition, as where = 'play > 5' is not" in line
    unweighted = "warning: scoring.weights: none for stars, a number"
    assert [line for line in lines if line.startswith(unweighted)]
    scoring = {"conditional": ["long"], "weights": {"stars": 0.1}}
    write_project(tiny, objectives=objectives, scoring=scoring)
    lines = list(check_project(str(config), tiny))
    assert not [line for line in lines if line.startswith(("    long ", unweighted))]
