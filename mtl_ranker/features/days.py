"""Which days a run reads: its split, and the history in the windows before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from mtl_ranker.config import Project
from mtl_ranker.errors import ProjectError
from mtl_ranker.logs.actions import end_of, final_day, reach
from mtl_ranker.logs.contract import label_actions


@dataclass(frozen=True)
class SplitDays:
    """The days of one training, each list ascending."""

    train: list[date]
    validate: list[date]
    test: list[date]

    @property
    def all(self) -> list[date]:
        """Training, validation and test days."""
        return [*self.train, *self.validate, *self.test]


def span(days: Sequence[date]) -> str:
    """`first..last`, or the day if there is only one."""
    return str(days[0]) if len(days) == 1 else f"{days[0]}..{days[-1]}"


def days_named(days: Sequence[date]) -> str:
    """`day D` or `days first..last`."""
    return f"day{'s' if len(days) > 1 else ''} {span(days)}"


def last_final_day(project: Project, day: date) -> date:
    """The last test day of a training on `day`: the last one whose labels are final.

    That is `day` without `training.immature = "wait"`, and where no label reads an action.
    """
    actions = label_actions(project) if project.training.immature == "wait" else []
    last = day
    while final_day(project, actions, last) > day:
        last -= timedelta(days=1)
    return last


def open_labels(project: Project, tested: date, day: date) -> str:
    """Why a training on `day` does not test on a day later than `tested`, as a sentence."""
    late = [
        f"{action.name} ({action.window})"
        for action in label_actions(project)
        if final_day(project, [action], tested + timedelta(days=1)) > day
    ]
    return (
        f"labels of later days may change after {day}, by the windows of {', '.join(late)} in "
        "[[log.actions]]"
    )


def split_days(project: Project, available: list[date], day: date) -> SplitDays:
    """The days of a training on `day`: training, then validation, then test days.

    They end with `last_final_day`. The log's first days, the warm-up, are no training days. Raises
    ProjectError naming the part that would be empty, or the objective that has no final label on
    any training day and would have positives only.
    """
    night = day
    split, day = project.split, last_final_day(project, day)
    test_start = day - timedelta(days=split.test_days - 1)
    test = [d for d in available if test_start <= d <= day]
    validate_start = test_start - timedelta(days=split.validate_days)
    validate = [d for d in available if validate_start <= d < test_start]
    train_start = validate_start - timedelta(days=split.train_days)
    warmup = set(available[: split.warmup_days])
    train = [d for d in available if train_start <= d < validate_start and d not in warmup]
    for name, days, start, end in (
        ("test", test, test_start, day),
        ("validate", validate, validate_start, test_start - timedelta(days=1)),
        ("train", train, train_start, validate_start - timedelta(days=1)),
    ):
        if not days:
            have = f"{available[0]} to {available[-1]}" if available else "none"
            warmed = f" after {split.warmup_days} warm-up days" if name == "train" else ""
            raise ProjectError(
                f"split.{name}_days: no day of the log lies in {start}..{end}{warmed}, so the "
                f"{name} part is empty; days found: {have}"
            )
    _check_final_labels(project, train, night)
    return SplitDays(train, validate, test)


def _check_final_labels(project: Project, train: Sequence[date], night: date) -> None:
    """Raise ProjectError for an objective whose labels on all training days may still change.

    With `training.immature = "positives"` its negatives, or all its labels, would be missing.
    """
    if project.training.immature != "positives":
        return
    earliest, ends = end_of(project.log, train[0] - timedelta(days=1)), end_of(project.log, night)
    for index, objective in enumerate(project.objectives):
        actions = label_actions(project, [objective])
        longest = max(actions, key=lambda action: action.span, default=None)
        if longest is not None and earliest + longest.span >= ends:
            raise ProjectError(
                f"objectives[{index}] ({objective.name}): none of the training {days_named(train)} "
                f"has final labels at the end of {night}: {longest.name} has "
                f'window = "{longest.window}", so those of {train[0]} are final on '
                f"{final_day(project, actions, train[0])}"
            )


def needed_days(project: Project, available: list[date], day: date) -> list[date]:
    """Days that a training on `day` reads: its split and the longest window before it.

    With actions these are all days from the first one on whose impressions actions in a window may
    belong to, up to `day`.

    At least the log's `warmup_days` days before the split are among them, so that the warm-up that
    `split_days` leaves out is the log's and not the window's.
    """
    split = project.split
    rows = split.test_days + split.validate_days + split.train_days
    first = last_final_day(project, day) - timedelta(days=rows - 1)
    before = [d for d in available if d < first]
    earliest = first - timedelta(days=project.features.windows[-1])
    if split.warmup_days:
        earliest = min([earliest, *before[-split.warmup_days :]])
    earliest -= timedelta(days=_reach(project))
    return [d for d in available if earliest <= d <= day]


def needed_history(project: Project, available: list[date], days: list[date]) -> list[date]:
    """`days` and the earlier days of the log in their windows, ascending.

    With actions also the days before them whose impressions have actions in the windows.
    """
    longest = project.features.windows[-1] + _reach(project)
    return [d for d in available if any(0 <= (day - d).days <= longest for day in days)]


def _reach(project: Project) -> int:
    """Days that an impression's actions may come after it; 0 without actions."""
    return max((reach(project.log, action) for action in project.log.actions), default=0)


def days_between(available: list[date], first: date, last: date) -> list[date]:
    """The log's days `first`..`last`. Raises ProjectError when there is none."""
    days = [d for d in available if first <= d <= last]
    if not days:
        have = f"{available[0]} to {available[-1]}" if available else "none"
        raise ProjectError(f"--from {first} --to {last}: no day of the log; days found: {have}")
    return days
