"""A challenger must be significantly better, worse on no objective, and calibrated."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import r2_score

from mtl_ranker.evaluation.metrics import gauc
from mtl_ranker.features.days import split_days
from mtl_ranker.logs.sources import open_context
from mtl_ranker.models.objectives import Task
from mtl_ranker.nightly.build import build_split
from mtl_ranker.nightly.popularity import fit_base_rate, fit_popularity
from mtl_ranker.nightly.promotion import (
    Baseline,
    ChallengerEvidence,
    Evidence,
    accept_by_hand,
    below,
    compare_artifacts,
    compare_models,
    decide,
    decide_first,
    label_definitions,
)
from tests import projects
from tests.conftest import FIRST, tiny_events, write_day
from tests.projects import TINY, write_project

UNBOUNDED = {"max_calibration_ratio": 1e6, "max_calibration_shift": 1e6}
TASKS = [Task("click", "binary"), Task("long", "binary")]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.05, 0.95, (3000, 2))
    labels = (rng.random((3000, 2)) < truth).astype(float)
    return truth, labels, rng.integers(0, 500, 3000), rng


def decision_on(labels, user, challenger, champion, seeds=((), ()), lists=None, **rule):
    """Without lists each row is its own, so that models are compared over rows."""
    project = projects.project(promotion=rule)
    evidence = Evidence(
        tasks=TASKS,
        labels=labels,
        user=user,
        lists=np.arange(len(user)) if lists is None else lists,
        challenger=challenger,
        champion=champion,
        challenger_seeds=seeds[0],
        champion_seeds=seeds[1],
    )
    return decide(project, evidence)


def blurred(truth, rng, amount):
    return np.clip(truth + rng.normal(0, amount, truth.shape), 0.01, 0.99)


def test_better_is_promoted_and_worse_is_not(rows):
    truth, labels, user, rng = rows
    weak = blurred(truth, rng, 0.4)
    assert decision_on(labels, user, truth, weak).promoted
    decision = decision_on(labels, user, weak, truth)
    assert not decision.promoted
    assert "significantly worse on click, long" in decision.reason


def test_equal_is_kept(rows):
    truth, labels, user, _ = rows
    decision = decision_on(labels, user, truth, truth)
    assert not decision.promoted
    assert "not significant" in decision.reason


def test_one_worse_objective_is_enough_to_refuse(rows):
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.5)
    champion[:, 1] = truth[:, 1]
    challenger = truth.copy()
    challenger[:, 1] = blurred(truth, rng, 0.2)[:, 1]
    decision = decision_on(labels, user, challenger, champion)
    assert not decision.promoted
    assert "long" in decision.reason


def test_uncalibrated_is_refused(rows):
    truth, labels, user, rng = rows
    decision = decision_on(labels, user, truth**4, blurred(truth, rng, 0.5))
    assert not decision.promoted
    assert "not calibrated on click: its predictions are 0." in decision.reason
    assert "allowed 0.67 to 1.50 (promotion.max_calibration_ratio)" in decision.reason


def test_the_order_within_lists_decides_and_log_loss_is_the_guard(rows):
    """A level per list changes AUC over rows and not the order; wrong levels are refused."""
    truth, labels, user, rng = rows
    level = rng.uniform(0.3, 1.0, 500)[user, None]
    champion = blurred(truth, rng, 0.3)
    found = decision_on(labels, user, truth * level, champion, lists=user, **UNBOUNDED)
    for t, name in enumerate(("click", "long")):
        one, other = (gauc(labels[:, t], p[:, t], user) for p in (truth * level, champion))
        assert found.differences[name].value == pytest.approx(one - other)
    assert found.differences["click"].low > 0
    wrong = truth**3  # the order of the truth, with other levels
    refused = decision_on(labels, user, wrong, truth, lists=user, **UNBOUNDED)
    assert refused.differences["click"].value == 0.0
    assert not refused.promoted
    assert "significantly worse on click (log loss +" in refused.reason


def test_one_wild_prediction_does_not_hide_a_worse_number(rows):
    """Its R² is about -10,000 with an interval that wide; it counts as -1, with the champion's."""
    truth, _, user, rng = rows
    tasks = [TASKS[0], Task("seconds", "regression")]
    labels = np.c_[rng.random(len(user)) < truth[:, 0], truth[:, 1] + rng.normal(0, 0.1, len(user))]
    champion = np.c_[blurred(truth, rng, 0.4)[:, 0], truth[:, 1]]
    challenger = truth.copy()
    challenger[7, 1] = 1_500.0
    evidence = Evidence(
        tasks=tasks,
        labels=labels,
        user=user,
        lists=np.arange(len(user)),
        challenger=challenger,
        champion=champion,
    )
    found = compare_models(evidence, 0.95)
    r2 = r2_score(labels[:, 1], champion[:, 1])
    assert found.differences["seconds"].value == pytest.approx(-1.0 - r2)
    assert found.worse == ["seconds"]
    assert found.blended.high < 0


def first_on(labels, user, challenger, baselines, **rule):
    """The decision on a first model; the fallback is of other rows, only its identity counts."""
    project = projects.project(promotion=rule)
    rows = pl.DataFrame({"item_id": [1], "label_click": [1], "label_long": [0]})
    fallback = fit_popularity(project, rows.lazy(), None)
    evidence = ChallengerEvidence(
        tasks=TASKS, labels=labels, user=user, lists=np.arange(len(user)), challenger=challenger
    )
    found = [Baseline(name, fallback, prediction) for name, prediction in baselines.items()]
    return decide_first(project, evidence, found), fallback


def test_the_first_model_must_beat_every_baseline(rows):
    truth, labels, user, rng = rows
    rate = np.broadcast_to(labels.mean(0), labels.shape)
    weak = 0.5 + 0.2 * (blurred(truth, rng, 0.5) - 0.5)  # its levels are right
    decision, _ = first_on(labels, user, truth, {"the base rate": rate, "item popularity": weak})
    assert decision.promoted
    assert decision.fallback is None
    assert "differs from the base rate's by +" in decision.reason
    assert " and from item popularity's by +" in decision.reason
    assert decision.against == "item popularity"  # of the differences
    for gain in (decision.blended, *decision.differences.values()):
        assert gain.note == ""  # of this training, so over users only
        assert gain.low > 0
    decision, fallback = first_on(
        labels, user, weak, {"the base rate": rate, "item popularity": truth}
    )
    assert not decision.promoted
    assert decision.fallback is fallback
    assert "not better than item popularity" in decision.reason
    assert "not better than the base rate" not in decision.reason


def test_the_decision_on_a_first_model_names_objectives_that_are_not_counted(rows):
    truth, labels, user, _ = rows
    labels[:, 1] = np.nan  # as those of a day whose labels are not final
    rate = np.broadcast_to([[0.5, 0.5]], labels.shape)
    for challenger, promoted in ((truth, True), (1 - truth, False)):
        decision, _ = first_on(labels, user, challenger, {"the base rate": rate}, **UNBOUNDED)
        assert decision.promoted == promoted
        assert decision.reason.endswith(
            "; not counted: long (0 positives of 0 users; it takes 10 of 10)"
        ), decision.reason


def test_a_first_model_below_the_base_rate_is_refused(rows):
    truth, labels, user, _ = rows
    rate = np.broadcast_to(labels.mean(0), labels.shape)
    decision, fallback = first_on(labels, user, 1 - truth, {"the base rate": rate})
    assert decision.fallback is fallback
    assert "significantly worse on click, long" in decision.reason


def test_the_base_rate_serves_where_popularity_is_worse_than_it(rows):
    truth, labels, user, _ = rows
    project = projects.project()
    few = pl.DataFrame({"item_id": [1], "label_click": [1], "label_long": [0]}).lazy()
    popularity, base = fit_popularity(project, few, None), fit_base_rate(project, few, None)
    rate = np.broadcast_to(labels.mean(0), labels.shape)
    evidence = ChallengerEvidence(
        tasks=TASKS, labels=labels, user=user, lists=np.arange(len(user)), challenger=1 - truth
    )
    for of_popularity, expected in ((1 - truth, base), (truth, popularity), (rate, popularity)):
        baselines = [
            Baseline("the base rate", base, rate),
            Baseline("item popularity", popularity, of_popularity),
        ]
        decision = decide_first(project, evidence, baselines)
        assert decision.fallback is expected
    assert decision.reason.endswith("; item popularity becomes champion")


def test_what_is_significantly_worse_than_a_baseline_is_named(rows):
    truth, labels, user, rng = rows
    project = projects.project()
    few = pl.DataFrame({"item_id": [1], "label_click": [1], "label_long": [0]}).lazy()
    popularity = Baseline("item popularity", fit_popularity(project, few, None), truth)
    rate = np.broadcast_to(labels.mean(0), labels.shape)
    base = Baseline("the base rate", fit_base_rate(project, few, None), rate)
    evidence = ChallengerEvidence(
        tasks=TASKS,
        labels=labels,
        user=user,
        lists=np.arange(len(user)),
        challenger=0.5 + 0.2 * (blurred(truth, rng, 0.4) - 0.5),
    )
    (found,) = below(project, evidence, [base, popularity])
    assert found.startswith(
        "it is significantly worse than item popularity on click, long, the ble"
    )


def test_a_difference_that_may_be_chance_is_not_below_a_baseline(rows):
    truth, labels, user, rng = rows
    one, other = (0.5 + 0.2 * (blurred(truth, rng, 0.3) - 0.5) for _ in range(2))
    project = projects.project()
    few = pl.DataFrame({"item_id": [1], "label_click": [1], "label_long": [0]}).lazy()
    artifact, lists = fit_popularity(project, few, None), np.arange(len(user))
    for challenger, baseline in ((one, other), (other, one)):  # one of them is lower
        evidence = ChallengerEvidence(
            tasks=TASKS, labels=labels, user=user, lists=lists, challenger=challenger
        )
        assert below(project, evidence, [Baseline("item popularity", artifact, baseline)]) == []


@pytest.fixture
def examples(tiny):
    """Clicks depend on the item alone."""
    for n in range(6):
        day = FIRST + timedelta(days=n)
        clicks = (pl.col("i") < 6).cast(pl.Int64)
        write_day(tiny, day, tiny_events(day, rows=120, shift=n).with_columns(click=clicks))
    write_project(tiny, promotion=UNBOUNDED)
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    build_split(context, FIRST + timedelta(days=5))
    days = split_days(context.project, context.workspace.days("events"), FIRST + timedelta(days=5))
    return context, context.workspace.scan("examples", days.train)


def test_a_later_challenger_must_not_be_worse_than_item_popularity(examples):
    """It beats a champion that has every item the wrong way round, and has two items wrong."""
    context, rows = examples
    wrong = pl.col("item_id").cast(pl.Int64).is_in([0, 11])
    challenger, champion = (
        fit_popularity(
            context.project,
            rows.with_columns(
                pl.when(which)
                .then(1 - pl.col("label_click"))
                .otherwise("label_click")
                .alias("label_click")
            ),
            None,
        )
        for which in (wrong, pl.lit(True))
    )
    right = fit_popularity(context.project, rows, None)
    last = FIRST + timedelta(days=5)
    better = compare_artifacts(context, last, right, champion)
    assert better.promoted, better.reason
    decision = compare_artifacts(context, last, challenger, champion)
    assert not decision.promoted
    assert decision.differences["click"].low > 0
    assert decision.reason.startswith(
        "kept the champion: it is significantly worse than item popularity on click"
    )
    accepted = accept_by_hand(context, last, challenger)
    assert accepted.promoted
    assert accepted.reason.startswith(
        "promoted: accepted by hand; warning: it is significantly worse than item popularity on "
    )
    assert accept_by_hand(context, last, right).reason == "promoted: accepted by hand"


def swapped(rows):
    """Examples with the opposite clicks."""
    return rows.with_columns(label_click=1 - pl.col("label_click"))


def test_a_champion_without_a_seed_is_compared_without_a_spread(examples):
    """Of the same two rankers, one that was trained would have the spread of the other."""
    context, rows = examples
    right, wrong = (fit_popularity(context.project, each, None) for each in (rows, swapped(rows)))
    measures = ({"auc": value, "gauc": value} for value in (0.80, 0.85, 0.90))
    seeds = [{"click": each, "long": each} for each in measures]
    challenger, last = replace(right, fixed=False, seed_metrics=seeds), FIRST + timedelta(days=5)
    fixed, trained = (
        compare_artifacts(context, last, challenger, replace(wrong, fixed=fixed)).blended
        for fixed in (True, False)
    )
    assert fixed.value == pytest.approx(trained.value, rel=0.05)
    assert fixed.high - fixed.low < 0.9 * (trained.high - trained.low)


def test_an_objective_that_only_the_challenger_has_must_be_calibrated(examples):
    """It is far better on clicks than the champion, and predicts a tenth of the long views."""
    context, rows = examples
    project, last = projects.project(), FIRST + timedelta(days=5)
    few = pl.when(pl.int_range(pl.len()) % 10 == 0).then("label_long").otherwise(0)
    right, wrong = (
        fit_popularity(project, each, None) for each in (rows, rows.with_columns(label_long=few))
    )
    one = projects.project(objectives=TINY["objectives"][:1])
    champion = fit_popularity(one, swapped(rows).drop("label_long"), None)
    context = replace(context, project=project)
    assert compare_artifacts(context, last, right, champion).promoted
    decision = compare_artifacts(context, last, wrong, champion)
    assert not decision.promoted
    assert list(decision.differences) == ["click"]
    assert decision.reason.startswith(
        "kept the champion: it is not calibrated on long: its predictions are 0."
    )


def test_a_first_model_that_cannot_be_judged_is_refused(rows):
    truth, labels, user, _ = rows
    unlabelled = np.full_like(labels, np.nan)
    rate = np.full_like(labels, 0.5)
    decision, fallback = first_on(unlabelled, user, truth, {"the base rate": rate})
    assert decision.fallback is fallback
    assert "no objective has enough labels" in decision.reason


def test_objectives_count_by_weight_over_the_width_of_their_intervals(rows):
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.6)
    challenger = blurred(truth, rng, 0.45)
    labels = labels.copy()
    labels[rng.random(len(user)) > 0.05, 1] = np.nan  # few labels: a wide interval
    decision = decision_on(labels, user, challenger, champion)
    gains = [decision.differences[name] for name in ("click", "long")]
    widths = np.array([gain.high - gain.low for gain in gains])
    assert widths[1] > 2 * widths[0]
    expected = np.average([gain.value for gain in gains], weights=1 / widths)
    assert decision.blended.value == pytest.approx(expected, rel=0.02)
    assert abs(decision.blended.value - np.mean([g.value for g in gains])) > 0.005


def spread(*values):
    """Metrics of trainings with other seeds, equal for both objectives."""
    return [{task.name: {"auc": value} for task in TASKS} for value in values]


def test_a_gain_within_the_spread_of_seeds_is_luck(rows):
    truth, labels, user, rng = rows
    weak = blurred(truth, rng, 0.2)
    alone = decision_on(labels, user, truth, weak)
    assert alone.promoted  # over users the gain of about 0.03 is certain
    assert "one seed: no verdict on the model" in alone.reason
    strict = decision_on(labels, user, truth, weak, require_spread=projects.WITHOUT)  # default
    assert not strict.promoted
    assert "promotion.require_spread" in strict.reason
    narrow, wide = spread(0.80, 0.801, 0.802), spread(0.74, 0.80, 0.86)
    for known in ((narrow, narrow), (narrow, ()), ((), narrow)):
        decision = decision_on(labels, user, truth, weak, known, require_spread=True)
        assert decision.promoted
        assert "one seed" not in decision.reason
    for known in ((wide, wide), (wide, ()), ((), wide), (narrow, wide)):
        assert not decision_on(labels, user, truth, weak, known).promoted


def test_an_objective_with_few_positives_neither_vetoes_nor_supports(rows):
    truth, labels, user, rng = rows
    labels[:, 1] = 0
    labels[[3, 50, 700], 1] = 1
    weak = blurred(truth, rng, 0.3)
    worst = np.where(labels[:, 1] == 1, 0.01, truth[:, 1])  # its three positives come last
    promoted = decision_on(labels, user, np.c_[truth[:, 0], worst], weak, **UNBOUNDED)
    assert promoted.promoted
    assert "not counted: long (3 positives of 3 users; it takes 10 of 10)" in promoted.reason
    best = np.where(labels[:, 1] == 1, 0.99, weak[:, 1])
    same = np.c_[weak[:, 0], best]
    assert not decision_on(labels, user, same, weak, **UNBOUNDED).promoted


@pytest.mark.parametrize("significance", [True, False])
def test_without_any_objective_to_compare_the_champion_stays(rows, significance):
    truth, labels, user, rng = rows
    labels[:] = 0
    decision = decision_on(
        labels,
        user,
        truth,
        blurred(truth, rng, 0.3),
        require_significance=significance,
        **UNBOUNDED,
    )
    assert not decision.promoted
    assert "no objective can be compared" in decision.reason
    assert "0 positives of 0 users" in decision.reason


def test_each_condition_on_the_first_model_refuses_it_alone(rows):
    """A lower blend without a worse objective, and a worse objective."""
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.5)
    slightly = np.clip(champion + rng.normal(0, 0.03, champion.shape), 0.01, 0.99)
    lower, _ = first_on(labels, user, slightly, {"item popularity": champion}, **UNBOUNDED)
    if lower.blended.value > 0:
        lower, _ = first_on(labels, user, champion, {"item popularity": slightly}, **UNBOUNDED)
    assert all(each.high > 0 for each in lower.differences.values())
    assert lower.blended.value < 0
    assert lower.fallback is not None
    tolerant, _ = first_on(
        labels, user, slightly, {"item popularity": champion}, tolerance=1.0, **UNBOUNDED
    )
    assert tolerant.promoted
    mixed = np.c_[truth[:, 0], 1 - truth[:, 1]]
    rare = labels.copy()
    rare[rng.random(len(user)) > 0.1, 1] = np.nan
    worse, _ = first_on(rare, user, mixed, {"item popularity": champion}, **UNBOUNDED)
    assert worse.fallback is not None
    assert worse.blended.value > 0
    assert worse.reason == (
        "not promoted: it is significantly worse than item popularity on long, although its "
        f"blended quality is higher ({worse.blended.signed}); item popularity becomes champion"
    )


def test_a_tolerance_lets_a_slightly_worse_challenger_pass(rows):
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.5)
    challenger = np.clip(champion + rng.normal(0, 0.03, champion.shape), 0.01, 0.99)
    strict = decision_on(
        labels, user, challenger, champion, require_significance=False, **UNBOUNDED
    )
    assert not strict.promoted
    loose = {"require_significance": False, "tolerance": 0.5, **UNBOUNDED}
    assert decision_on(labels, user, challenger, champion, **loose).promoted


def test_an_objective_that_hardly_changes_hides_no_loss_on_another(rows):
    """All of the weight is on `long`, of which one prediction in a thousand changes."""
    truth, labels, user, rng = rows
    champion = blurred(truth, rng, 0.5)
    challenger = champion.copy()
    challenger[:, 0] = np.clip(champion[:, 0] + rng.normal(0, 0.1, len(user)), 0.01, 0.99)
    some = np.arange(0, len(user), 1000)
    challenger[some, 1] = truth[some, 1]
    tolerant = {"require_significance": False, **UNBOUNDED}
    decision = decision_on(labels, user, challenger, champion, tolerance=0.002, **tolerant)
    click = decision.differences["click"]
    assert click.value < -0.002 < 0 < click.high
    assert decision.blended.low > -0.002
    assert not decision.promoted
    assert decision.reason.startswith(
        f"kept the champion: the challenger's AUC of click differs by {click.signed}, "
        "below -0.002 (promotion.tolerance)"
    )
    assert "long" not in decision.reason
    passed = decision_on(labels, user, challenger, champion, tolerance=0.1, **tolerant)
    assert passed.promoted
    assert decision.blended.value < 0
    assert passed.reason.startswith(
        f"promoted: blended quality differs by {decision.blended.signed} and no objective"
    )


@pytest.mark.parametrize("unknown", [(0, "long"), (1, "long"), (0, "click")])
def test_a_spread_that_is_unknown_for_one_objective_is_the_other_models(rows, unknown):
    truth, labels, user, rng = rows
    weak = blurred(truth, rng, 0.2)
    seed, name = unknown
    gaps = spread(0.80, 0.801)
    gaps[seed] = gaps[seed] | {name: {"auc": float("nan")}}
    known = decision_on(labels, user, truth, weak, (gaps, spread(0.79, 0.791)))
    assert known.promoted
    assert "one seed" not in known.reason
    alone = decision_on(labels, user, truth, weak, (gaps, ()))
    assert "one seed" in alone.reason


def test_predictions_that_are_no_numbers_are_refused(rows):
    truth, labels, user, rng = rows
    broken = truth.copy()
    broken[17, 1] = np.nan
    decision = decision_on(labels, user, broken, blurred(truth, rng, 0.4))
    assert not decision.promoted
    assert "its predictions of long are not all finite numbers" in decision.reason


def with_play(**settings):
    """A ranker with the objectives click and play, the latter with these settings."""
    play = {"name": "play", "group": "satisfaction", "label": "play", "kind": "ordinal"} | settings
    project = projects.project(objectives=[TINY["objectives"][0], play])
    rows = pl.DataFrame({"item_id": [1, 2], "label_click": [1, 0], "label_play": [0, 1]})
    return fit_popularity(project, rows.lazy(), None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"kind": "regression"}, {"kind": "watch_time"}),
        ({"kind": "regression"}, {"kind": "regression", "label": "play / 60"}),
        ({"kind": "regression"}, {"kind": "regression", "where": "click = 1"}),
        ({"kind": "regression"}, {"kind": "regression", "transform": "log1p"}),
        ({"levels": 3}, {"levels": 4}),
    ],
)
def test_other_labels_are_not_compared(one, other):
    first, second = label_definitions(with_play(**one)), label_definitions(with_play(**other))
    assert first["click"] == second["click"]
    assert first["play"] != second["play"]
    assert label_definitions(with_play(**one, weight=3.0)) == first


LIKE = {"name": "like", "path": "likes", "window": "3h"}
LIKED = {"name": "liked", "group": "satisfaction", "label": '"like"'}


def of_likes(**like):
    """A ranker with the objectives click and liked, whose action has these settings."""
    project = projects.project(
        log={"actions": [LIKE | like]}, objectives=[TINY["objectives"][0], LIKED]
    )
    rows = pl.DataFrame({"item_id": [1, 2], "label_click": [1, 0], "label_liked": [0, 1]})
    return fit_popularity(project, rows.lazy(), None)


@pytest.mark.parametrize(
    "change",
    [
        {"window": "1h"},
        {"value": "play"},
        {"value": "play", "reduce": "last"},
        {"arrived": "got"},
        {"user": "fan"},
        {"timestamp": "sent"},
    ],
)
def test_a_label_whose_action_is_read_otherwise_is_not_compared(change):
    one, other = label_definitions(of_likes()), label_definitions(of_likes(**change))
    assert one["click"] == other["click"]
    assert one["liked"] != other["liked"]


def test_a_label_whose_action_moved_is_the_same():
    moved = of_likes(path="archive/likes", format="parquet", organic=True, window="180m")
    assert label_definitions(of_likes()) == label_definitions(moved)
    elsewhere = of_likes()
    actions = [*elsewhere.project.log.actions]
    actions.append(actions[0].model_copy(update={"name": "share"}))
    log = elsewhere.project.log.model_copy(update={"actions": actions})
    more = replace(elsewhere, project=elsewhere.project.model_copy(update={"log": log}))
    assert label_definitions(elsewhere) == label_definitions(more)


def test_the_decision_names_a_label_whose_action_has_another_window(tiny):
    for n in range(6):
        day = FIRST + timedelta(days=n)
        likes = tiny_events(day, shift=n).filter(pl.col("i") < 6).with_columns(pl.col("ts") + 1)
        folder = tiny / "likes" / f"date={day}"
        folder.mkdir(parents=True)
        likes.write_parquet(folder / "part-0.parquet")
    last = FIRST + timedelta(days=5)
    objectives = [TINY["objectives"][0], LIKED]
    write_project(tiny, log={"actions": [LIKE]}, objectives=objectives, promotion=UNBOUNDED)
    context = open_context(str(tiny / "project.toml"), tiny, tiny / "ws")
    build_split(context, last)
    challenger, same, champion = of_likes(), of_likes(path="old"), of_likes(window="1h")
    compared = compare_artifacts(context, last, challenger, same)
    assert list(compared.differences) == ["click", "liked"]
    decision = compare_artifacts(context, last, challenger, champion)
    assert list(decision.differences) == ["click"]
    assert decision.reason.endswith(
        "; compared on click only, as not both have liked with the same label"
    )


def test_a_champion_without_a_seed_has_no_spread(rows):
    truth, labels, user, rng = rows
    evidence = {
        "tasks": TASKS,
        "labels": labels,
        "user": user,
        "lists": np.arange(len(user)),
        "challenger": truth,
        "champion": blurred(truth, rng, 0.4),
        "challenger_seeds": spread(0.80, 0.805, 0.81),
    }
    project = projects.project()
    trained, fixed = (
        decide(project, Evidence(**evidence, champion_fixed=fixed)).blended
        for fixed in (False, True)
    )
    assert fixed.high - fixed.low < trained.high - trained.low
    assert fixed.value == pytest.approx(trained.value, rel=0.05)
