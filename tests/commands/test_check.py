"""What `mtl-ranker check` says of logs and project files that a night would stumble over.

Each case either runs through `check` and a night, or has a message that names the place, what was
found and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from mtl_ranker.commands.check import check_project
from mtl_ranker.errors import ProjectError
from tests.conftest import FIRST, tiny_events, write_day
from tests.nights import run_night
from tests.projects import TINY, changed, write_project

LAST = FIRST + timedelta(days=5)
Settings = dict[str, Any]


def checked(folder: Path) -> str:
    return "\n".join(check_project(str(folder / "project.toml"), folder))


def every_day(folder: Path, *columns: pl.Expr) -> None:
    for n in range(6):
        day = FIRST + timedelta(days=n)
        write_day(folder, day, tiny_events(day, shift=n).with_columns(*columns))


def items(folder: Path, **columns: Any) -> Settings:
    """An item table of items 0..12 with a key `i`, and its settings."""
    pl.DataFrame({"i": range(13), **columns}).write_parquet(folder / "items.parquet")
    return {"path": "items.parquet", "key": "i", "columns": list(columns)}


def features(**more: Any) -> Settings:
    return {"features": {**more, "entities": [["user_id"], ["item_id"]]}}


TAGS = [["a", "b"] if n % 3 else [] for n in range(12)] + [None]


@pytest.mark.parametrize("key", ["label", "where"])
def test_a_keyword_of_sql_as_a_column_names_the_objective(tmp_path, key):
    """`order` unquoted; before the blend's conditions are compared."""
    every_day(tmp_path, pl.col("click").alias("order"))
    text = "order" if key == "label" else "order = 1"
    write_project(tmp_path, objectives=changed(TINY["objectives"], 1, **{key: text}))
    with pytest.raises(ProjectError, match=rf"objectives\[1\] \(long\)\.{key}: 'order.* no SQL"):
        checked(tmp_path)


# Cases that work. Each makes the log and returns the changes of the project file.


def native_list_in_lists(folder):
    return {
        "log": {"items": items(folder, tags=TAGS)},
        **features(
            lists=[{"column": "tags"}], histories=[{"signal": "click", "columns": ["tags"]}]
        ),
    }


def native_list_of_whole_numbers_in_the_log(folder):
    every_day(folder, pl.concat_list("i", pl.col("u")).cast(pl.List(pl.Int16)).alias("page"))
    log = {"context": ["tab", "page"]}
    return {"log": log, **features(lists=[{"column": "page"}])}


def boolean_categorical(folder):
    known = [True, False, None] * 4 + [True]
    columns = [{"column": "tab"}, {"column": "fresh"}]
    return {
        "log": {"items": items(folder, fresh=known)},
        "features": {"categoricals": columns, "numerics": ["fresh"]},
    }


def boolean_context_as_key_and_label(folder):
    every_day(folder, pl.col("tab") == "home", pl.col("click") == 1)
    label = "case when click then 1 else 0 end"
    return {"objectives": [{**TINY["objectives"][0], "label": label}]}


def missing_whole_numbers_in_the_first_rows(folder):
    """MLflow refuses missing whole numbers in columns whose type is in the signature."""
    columns = [{"column": "tab"}, {"column": "shelf"}]
    return {
        "log": {"items": items(folder, shelf=[None, 3] * 6 + [None])},
        "features": {"categoricals": columns},
    }


def nulls_only_in_one_of_four_files(folder):
    for part in range(1, 4):
        frame = tiny_events(LAST, shift=20 + part).with_columns(pl.col("ts") + part)
        if part == 2:
            frame = frame.with_columns(pl.lit(None).alias("tab"), pl.lit(None).alias("play"))
        frame.write_parquet(folder / "log" / f"date={LAST}" / f"part-{part}.parquet")
    return {}


def nulls_only_on_the_first_days(folder):
    for n in range(3):
        day = FIRST + timedelta(days=n)
        write_day(folder, day, tiny_events(day, shift=n).with_columns(tab=pl.lit(None)))
    return {}


def columns_named_event_and_day(folder):
    every_day(folder, pl.lit("buy").alias("event"), pl.col("play").alias("day"))
    label = "case when event = 'buy' and day > 10 then 1 else 0 end"
    objectives = [{**TINY["objectives"][0], "label": label}]
    columns = [{"column": "tab"}, {"column": "event"}]
    log = {"context": ["tab", "event"]}
    return {"log": log, "objectives": objectives, "features": {"categoricals": columns}}


def wider_ids_in_a_table(folder):
    settings = items(folder, colour=["red"] * 13)
    frame = pl.read_parquet(folder / "items.parquet")
    extra = pl.DataFrame({"i": [2**40], "colour": ["blue"]})
    pl.concat([frame, extra]).write_parquet(folder / "items.parquet")
    columns = [{"column": "tab"}, {"column": "colour"}]
    return {"log": {"items": settings}, "features": {"categoricals": columns}}


def text_ids_in_a_table_that_are_numbers(folder):
    settings = items(folder, colour=["red"] * 13)
    frame = pl.read_parquet(folder / "items.parquet").cast({"i": pl.String})
    frame.write_parquet(folder / "items.parquet")
    columns = [{"column": "tab"}, {"column": "colour"}]
    return {"log": {"items": settings}, "features": {"categoricals": columns}}


def no_label_on_the_last_day(folder):
    write_day(folder, LAST, tiny_events(LAST, shift=5).with_columns(click=0))
    return {}


WORKS: list[Callable[[Path], Settings]] = [
    native_list_in_lists,
    native_list_of_whole_numbers_in_the_log,
    boolean_categorical,
    boolean_context_as_key_and_label,
    missing_whole_numbers_in_the_first_rows,
    nulls_only_in_one_of_four_files,
    nulls_only_on_the_first_days,
    columns_named_event_and_day,
    wider_ids_in_a_table,
    text_ids_in_a_table_that_are_numbers,
    no_label_on_the_last_day,
]


@pytest.mark.slow
@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.__name__)
def test_check_accepts_it_and_the_night_runs(tiny, case):
    write_project(tiny, **case(tiny))
    lines = checked(tiny)
    assert "candidates of" in lines.splitlines()[-1] or "warning" in lines
    night = run_night(tiny)
    assert night.ranked.users == 11
    assert night.ranked.rows == night.ranked.candidates


@pytest.mark.slow
def test_objectives_without_labels_on_the_last_day_are_left_out_of_its_verdicts(tiny):
    """The validation day has no positive `long`; the test day has one class of `click`, no `long`.

    One of the models shares nothing and keeps each objective's best epoch.
    """
    day = LAST - timedelta(days=1)
    write_day(tiny, day, tiny_events(day, shift=4).with_columns(play=0.0))
    models = {"single_task": {"preset": "single_task"}, "mmoe": {"preset": "mmoe"}}
    more = {"name": "play", "group": "engagement", "kind": "regression", "label": "play"}
    objectives = [*TINY["objectives"], more]
    write_project(tiny, **no_label_on_the_last_day(tiny), models=models, objectives=objectives)
    night = run_night(tiny)
    assert night.suite.unlabelled == [
        "validate day 2026-03-06: objectives[1] (long): all 16 labels are 0; left out of the "
        "verdicts",
        "validate day 2026-03-06: objectives[2] (play): all 40 labels are 0; left out of the "
        "verdicts",
        "test day 2026-03-07: objectives[0] (click): all 40 labels are 0; left out of the verdicts",
        "test day 2026-03-07: objectives[1] (long): no row has this label; left out of the "
        "verdicts",
    ]
    assert all(problem in night.page for problem in night.suite.unlabelled)
    assert {gain.objective for gain in night.suite.gains} == {"play"}
    compared = night.decision.differences.items()
    assert {name for name, each in compared if not np.isnan(each.low)} == {"play"}
    assert "not counted: click (0 positives of 0 users" in night.decision.reason
    assert night.decision.blended.value == 0.0


@pytest.mark.slow
def test_a_night_with_booleans_lists_and_missing_values(tiny):
    """Several cases at once, as each night takes seconds."""
    known = [True, False, None] * 4 + [True]
    settings = items(tiny, fresh=known, tags=TAGS, shelf=[None, 3] * 6 + [None])
    columns = [{"column": c} for c in ("tab", "fresh", "shelf")]
    write_project(
        tiny,
        log={"items": settings},
        features={"categoricals": columns, "lists": [{"column": "tags"}], "numerics": ["fresh"]},
    )
    checked(tiny)
    assert run_night(tiny).ranked.users == 11


# Cases that are refused: the changes of the project file, and the sentence.


def list_of_floats_as_numeric(folder):
    every_day(folder, pl.concat_list(pl.col("play"), pl.col("play")).alias("vector"))
    return {"log": {"context": ["tab", "vector"]}, **features(numerics=["vector"])}


def text_in_a_numeric(folder):
    return features(numerics=["tab"])


def list_as_a_categorical(folder):
    categoricals = [{"column": "tab"}, {"column": "tags"}]
    return {"log": {"items": items(folder, tags=TAGS)}, **features(categoricals=categoricals)}


def list_as_a_key(folder):
    return {
        "log": {"items": items(folder, tags=TAGS)},
        "features": {"entities": [["user_id"], ["item_id"], ["tags"]]},
    }


def dates_as_a_categorical(folder):
    settings = items(folder, made=[FIRST] * 13)
    categoricals = [{"column": "tab"}, {"column": "made"}]
    return {"log": {"items": settings}, **features(categoricals=categoricals)}


def text_in_lists(folder):
    return features(lists=[{"column": "tab"}])


def named_like_a_generated_feature(folder):
    every_day(folder, pl.lit(0.5).alias("user_click_rate_3d"))
    return {"log": {"context": ["tab", "user_click_rate_3d"]}}


def a_tables_column_named_like_a_generated_feature(folder):
    return {"log": {"items": items(folder, item_days_since=[1.0] * 13)}}


def a_key_named_like_an_objective(folder):
    every_day(folder, pl.col("tab").alias("long"))
    context = {"context": ["tab", "long"]}
    return {"log": context, "features": {"entities": [["user_id"], ["item_id"], ["long"]]}}


def text_ids_in_a_table(folder):
    settings = items(folder, colour=["red"] * 13)
    frame = pl.read_parquet(folder / "items.parquet")
    frame.with_columns(i="m" + pl.col("i").cast(pl.String)).write_parquet(folder / "items.parquet")
    return {"log": {"items": settings}}


def fractional_ids_in_a_table(folder):
    settings = items(folder, colour=["red"] * 13)
    frame = pl.read_parquet(folder / "items.parquet")
    frame.with_columns(i=pl.col("i") + 0.5).write_parquet(folder / "items.parquet")
    return {"log": {"items": settings}}


def stars(folder, share):
    """Stars of 1 to 5, five-star ones on a share of a day's 40 rows."""
    for n in range(6):
        day = FIRST + timedelta(days=n)
        k = pl.int_range(pl.len())
        value = pl.when(k < share * 40).then(5).otherwise(1 + k % 4)
        write_day(folder, day, tiny_events(day, shift=n).with_columns(value.alias("stars")))
    more = {"name": "stars", "group": "satisfaction", "kind": "ordinal", "label": "stars"}
    return {"objectives": [TINY["objectives"][0], {**more, "levels": 5}]}


def stars_from_one_to_five(folder):
    return stars(folder, 0.25)


def no_candidates_folder(folder):
    return {"scoring": {"candidates": "candidates"}}


def no_candidate_set_in_the_folder(folder):
    (folder / "candidates" / "date=2026-03-08").mkdir(parents=True)
    return {"scoring": {"candidates": "candidates"}}


def candidates(folder, **columns):
    place = folder / "candidates" / "date=2026-03-08"
    place.mkdir(parents=True)
    pl.DataFrame(columns).write_parquet(place / "a.parquet")
    return {"scoring": {"candidates": "candidates"}}


def candidates_without_items(folder):
    return candidates(folder, u=[1, 2])


def candidates_of_another_type(folder):
    return candidates(folder, u=[1.0, 1.9], i=[1, 2])


def a_group_without_features(folder):
    model = {"preset": "mmoe", "experts": 2, "expert_groups": ["nothing"]}
    return {"models": {"mmoe": model}, "features": {"groups": {"nothing": ["zzz_*"]}}}


def texts_that_share_with_whole_numbers(folder):
    pl.DataFrame({"u": range(60), "likes": "1,2"}).write_parquet(folder / "users.parquet")
    pl.DataFrame({"i": range(60), "kind": range(60)}).write_parquet(folder / "items.parquet")
    features = {
        "categoricals": [{"column": "kind", "share": "kinds"}],
        "lists": [{"column": "likes", "share": "kinds"}],
    }
    users = {"path": "users.parquet", "key": "u", "lists": {"likes": ","}}
    items = {"path": "items.parquet", "key": "i", "columns": ["kind"]}
    return {"log": {"users": users, "items": items}, "features": features}


def a_bad_day_in_the_middle(folder):
    day = FIRST + timedelta(days=2)
    write_day(folder, day, tiny_events(day).with_columns(ts=pl.lit(None, pl.Int64)))
    return {}


def another_type_on_an_earlier_day(folder):
    day = FIRST + timedelta(days=1)
    write_day(folder, day, tiny_events(day).with_columns(pl.col("tab").str.len_chars()))
    return {}


def a_label_that_never_occurs(folder):
    every_day(folder, pl.lit(0).alias("click"))
    return {"objectives": [TINY["objectives"][0]]}


REFUSED: list[tuple[Callable[[Path], Settings], str]] = [
    (
        list_of_floats_as_numeric,
        r"features.numerics \(vector\): is List\(Float64\); allowed: a num",
    ),
    (
        text_in_a_numeric,
        r"features.numerics \(tab\): is String; allowed: a number, a Bool",
    ),
    (list_as_a_categorical, r"features.categoricals \(tags\): is List\(String\); .*features.lists"),
    (list_as_a_key, r"features.entities \(tags\): is List\(String\); allowed: one value per row"),
    (dates_as_a_categorical, r"features.categoricals \(made\): is Date; allowed: text, a number"),
    (
        texts_that_share_with_whole_numbers,
        r"features.lists \(likes\): is List\(String\), but features.categoricals \(kind\) is "
        r"Int64, and both have share = 'kinds'; allowed: values of one type",
    ),
    (text_in_lists, r"features.lists \(tab\): is String; allowed: a list of text"),
    (
        named_like_a_generated_feature,
        r"column 'user_click_rate_3d' of the log \(log\) has the name of a generated column",
    ),
    (
        a_tables_column_named_like_a_generated_feature,
        r"column 'item_days_since' of log.items \(items.parquet\) has the name of a generated",
    ),
    (
        a_key_named_like_an_objective,
        r"objectives\[1\].name: 'long' is the name of another column of the ranking",
    ),
    (
        text_ids_in_a_table,
        r"items.parquet: key 'i' \(log.items.key\) is String and holds \['m0', 'm1', 'm2'\], but "
        r"'i' in the log is Int64; allowed: ids of one kind",
    ),
    (
        fractional_ids_in_a_table,
        r"key 'i' \(log.items.key\) is Float64 and holds \[0.5, 1.5, 2.5\]",
    ),
    (
        stars_from_one_to_five,
        r"25.0% of the rows break the contract; allowed: log.max_bad_share = 5.0%\n"
        r" +10  label of stars not in 0..4: 5.0\n"
        r".*quarantined whole, with its other labels; .*levels = 5 allows 0 to 4; for values from "
        r"1 to 5, write levels = \[1, 2, 3, 4, 5\]",
    ),
    (
        no_candidates_folder,
        r"candidates: not found \(scoring.candidates = 'candidates'\); allowed:",
    ),
    (no_candidate_set_in_the_folder, r"candidates: no folder date=YYYY-MM-DD with a Parquet file"),
    (candidates_without_items, r"column 'i' \(the item\) is missing; it has: u"),
    (candidates_of_another_type, r"column 'user_id' is Float64 and holds \[1.9\], but it is Int64"),
    (a_group_without_features, r"zzz_\*"),
    (
        a_bad_day_in_the_middle,
        r"2026-03-04\): 40 of 40 rows break the contract \(timestamp missing",
    ),
    (
        another_type_on_an_earlier_day,
        r"2026-03-03\): column 'tab' is Int64, but it is String in the",
    ),
    (a_label_that_never_occurs, r"objectives\[0\] \(click\), train days .* never occurs \(all 0\)"),
]


@pytest.mark.parametrize(("case", "words"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_check_refuses_it_with_a_sentence(tiny, case, words):
    write_project(tiny, **case(tiny))
    with pytest.raises(ProjectError) as error:
        checked(tiny)
    assert re.search(words, str(error.value)), str(error.value)
    assert len(str(error.value)) < 1_000


# Cases that run, with a warning.


def few_stars_of_five(folder):
    return stars(folder, 0.025)


def null_unless_clicked(folder):
    dwell = pl.when(pl.col("click") == 1).then(pl.col("play"))
    every_day(folder, dwell.alias("dwell"))
    return {"log": {"context": ["tab", "dwell"]}}


def reveals_as_text(folder):
    every_day(
        folder, pl.when(pl.col("click") == 1).then(pl.lit("x")).otherwise(pl.lit("y")).alias("z")
    )
    return {"log": {"context": ["tab", "z"]}}


def not_tomorrows_candidates(folder):
    candidates(folder, u=[1, 2], i=[1, 2])
    (folder / "candidates" / "date=2026-03-08").rename(folder / "candidates" / "date=2026-03-07")
    return {"scoring": {"candidates": "candidates"}}


WARNED: list[tuple[Callable[[Path], Settings], str]] = [
    (
        few_stars_of_five,
        r" 1  label of stars not in 0..4: 5.0\nwarning: .*levels = 5 allows 0 to 4",
    ),
    (
        null_unless_clicked,
        r"absence of 'dwell' predicts objectives\[0\] \(click\) with an AUC of 1.0",
    ),
    (reveals_as_text, r"the value of 'z' predicts objectives\[0\] \(click\) with an AUC of 1.000"),
    (
        no_label_on_the_last_day,
        r"test day 2026-03-07: objectives\[0\] \(click\): all 40 labels are 0",
    ),
    (
        no_label_on_the_last_day,
        r"test day 2026-03-07: objectives\[1\] \(long\): no row has this label",
    ),
    (not_tomorrows_candidates, r"has no set for 2026-03-08, which a night on the last day ranks"),
]


@pytest.mark.parametrize(("case", "words"), WARNED, ids=lambda x: getattr(x, "__name__", ""))
def test_check_warns(tiny, case, words):
    write_project(tiny, **case(tiny))
    lines = checked(tiny)
    assert re.search(words, lines), lines
    assert "candidates of" in lines


def test_check_warns_of_nothing_in_a_sound_project(tiny):
    """The log has 40 rows a day: the surface alternates and predicts neither label."""
    assert "warning" not in checked(tiny)


def test_tables_without_dates_are_said_once(tiny):
    write_project(tiny, log={"items": items(tiny, price=1.5)})
    assert checked(tiny).count("log.items: without dates (partition or valid_from); the cur") == 1
    dated = {"path": "dated", "key": "i", "columns": ["price"], "partition": "date"}
    folder = tiny / "dated" / f"date={LAST - timedelta(days=2)}"
    folder.mkdir(parents=True)
    (tiny / "items.parquet").rename(folder / "part-0.parquet")
    write_project(tiny, log={"items": dated})
    said = checked(tiny)
    assert "without dates" not in said
    assert f"ok  items table: 13 rows; snapshots: 1, {LAST - timedelta(days=2)}" in said
    assert f"warning: log.items: the first snapshot is of {LAST - timedelta(days=2)}, so" in said


def test_an_entity_with_two_keys_is_named(tiny):
    write_project(tiny, features={"entities": [["user_id"], ["tab"]]})
    assert "tab (tab) has 2 keys on the last day" in checked(tiny)
