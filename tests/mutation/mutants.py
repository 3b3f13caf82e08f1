"""Wrong lines that the tests must not let pass, and the tests that find each.

`python -m tests.mutation.mutants` prints the table of docs/architecture.md. Each line is changed in
a temporary copy of the repository, in which its tests must then fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.integration import forks

ROOT = Path(__file__).parents[2]
COPIED = ("mtl_ranker", "flows", "sql", "tests", "benchmarks", "docs", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """A change of one line.

    Attributes:
        what: the mistake, in words.
        file: below `mtl_ranker/`.
        line: regular expression that occurs in exactly one line of the file.
        wrong: what replaces it.
        tests: file below `tests/` that must fail.
        only: names of the tests, as pytest's -k; "" for all of the file.
    """

    what: str
    file: str
    line: str
    wrong: str
    tests: str
    only: str = ""


OFF_POLICY = ("evaluation/off_policy.py", "evaluation/test_off_policy.py")
LOOP = ("training/loop.py", "training/test_loop.py")
BALANCING = ("training/balancing.py", "training/test_balancing.py")
OBJECTIVES = ("models/objectives.py", "models/test_objectives.py")
REQUESTS = ("logs/requests.py", "logs/test_requests.py")
CANDIDATES = ("ranking/candidates.py", "ranking/test_candidates.py")
DRIFT = ("evaluation/drift.py", "evaluation/test_drift.py")


def _in(place: tuple[str, str], what: str, line: str, wrong: str, only: str = "") -> Mutant:
    return Mutant(what, place[0], line, wrong, place[1], only)


MUTANTS = [
    _in(BALANCING, "GradNorm's exponent is 1", r"alpha = 1\.5", "alpha = 1.0", "gradnorm"),
    _in(BALANCING, "GradNorm's exponent is 2", r"alpha = 1\.5", "alpha = 2.0", "gradnorm"),
    _in(
        BALANCING,
        "GradNorm takes the first batch as it is",
        r"labelled = current > 0",
        "labelled = current >= 0",
        "gradnorm",
    ),
    _in(
        BALANCING,
        "`normalised` multiplies by the base losses",
        r"weights / base, base",
        "weights * base, base",
        "normalised",
    ),
    _in(
        LOOP,
        "base losses ignore the rows' weights",
        r"labels, weight = \(prior\.labels, prior\.weight\) if",
        "labels, weight = (prior.labels, None) if",
        "losses_of_constants",
    ),
    _in(
        LOOP,
        "base losses are at the unweighted mean",
        r"base_logits\(prior\.labels, tasks, prior\.weight\)",
        "base_logits(prior.labels, tasks)",
        "losses_of_constants",
    ),
    _in(
        LOOP,
        "batches without labels count as loss 0",
        r"state\.loss / state\.labelled\.clamp\(min=1\)",
        "state.loss / state.batches",
        "train_loss",
    ),
    _in(
        LOOP,
        "early stopping watches the members' mean loss",
        r"return ensemble_losses\(logits, self\.labels, self\.tasks, self\.model\.cutpoints\)",
        "return losses(logits, self.labels, self.tasks, None, self.model.cutpoints)",
        "served_ensemble",
    ),
    _in(
        LOOP,
        "single_task sends gradients along conditional_on",
        r"fixed = logits\.detach\(\)",
        "fixed = logits",
        "single_task",
    ),
    _in(
        LOOP,
        "pairs ignore the rows' weights",
        r"list_losses\(z, batch\.labels, batch\.lists, tasks, batch\.weight\)",
        "list_losses(z, batch.labels, batch.lists, tasks)",
        "weigh_nothing",
    ),
    _in(
        LOOP,
        "embeddings and biases decay",
        r'\{"params": others, "weight_decay": 0\.0\}',
        '{"params": others}',
        "decay",
    ),
    _in(
        LOOP,
        "no id is dropped",
        r"without_ids\(batch, settings\.unknown_rate, seed\)",
        "without_ids(batch, 0.0, seed)",
        "unknown_embedding",
    ),
    _in(
        OBJECTIVES,
        "cut points ignore the rows' weights",
        r"torch\.ones_like\(present\) if weight is None else weight\[rows\]",
        "torch.ones_like(present)",
        "weight_two",
    ),
    Mutant(
        "a checkpoint of another split is resumed",
        "nightly/contenders.py",
        r"rows = \(dataset\.digest, split, settings, ",
        "rows = (dataset.digest, settings, ",
        "nightly/test_suite.py",
        "checkpoint_of_another_split",
    ),
    Mutant(
        "the winner is chosen on the test days",
        "nightly/suite.py",
        r"return criterion\.order\(\[run\.validate_prediction for run in seeds\]\)",
        'return True, max(run.metrics["click"]["auc"] for run in seeds)',
        "nightly/test_suite.py",
        "never_on_test",
    ),
    Mutant(
        "the warm-up is cut from the window that is read",
        "features/days.py",
        r"earliest = min\(\[earliest, \*before\[-split\.warmup_days :\]\]\)",
        "pass",
        "nightly/test_suite.py",
        "warm_up_is_the_logs",
    ),
    Mutant(
        "an objective without labels gets trees",
        "training/boosting.py",
        r" or one_class:",
        ":",
        "training/test_boosting.py",
        "no_trees",
    ),
    _in(
        OFF_POLICY,
        "propensities of items are inverted",
        r"\(order\.new_position == order\.position\) / propensity",
        "(order.new_position == order.position) * propensity",
        "reordered_lists or by_hand",
    ),
    _in(
        OFF_POLICY,
        "propensities of positions are inverted",
        r"return examination\[moved\] / propensity",
        "return propensity / examination[moved]",
        "reordered_lists or by_hand",
    ),
    _in(
        OFF_POLICY,
        "intervals are half as wide again",
        r"half \*= _standard_error",
        "half *= 1.5 * _standard_error",
        "neither_too_rarely",
    ),
    _in(
        OFF_POLICY,
        "intervals are two thirds as wide",
        r"half \*= _standard_error",
        "half *= 0.67 * _standard_error",
        "neither_too_rarely",
    ),
    _in(
        OFF_POLICY,
        "rows of a user count as independent",
        r"_, user = np\.unique\(rewards\.user, return_inverse=True\)",
        "user = np.arange(len(rewards.user))",
        "over_users or neither",
    ),
    _in(
        OFF_POLICY,
        "the reward model has seen the user",
        r"rows = fold != held_out",
        "rows = fold >= 0",
        "other_users",
    ),
    _in(
        OFF_POLICY,
        "weights that cannot be right are accepted",
        r"refused = _unsupported\(weight, user\)",
        "refused = None",
        "refused",
    ),
    Mutant(
        "intervals are far too wide",
        "evaluation/intervals.py",
        r"half = self\._critical\(1 - confidence\) \* self\.standard_error",
        "half = 3 * self._critical(1 - confidence) * self.standard_error",
        "evaluation/test_intervals.py",
        "excludes_zero",
    ),
    *(
        Mutant(
            f"standard errors are {scale} of theirs",
            "evaluation/intervals.py",
            r"return float\(np\.sqrt\(sum\(part\.variance for part in self\._parts\)\)\)",
            f"return {scale} * float(np.sqrt(sum(part.variance for part in self._parts)))",
            "evaluation/test_intervals.py",
            "repeated_nights",
        )
        for scale in (0.7, 1.4)
    ),
    Mutant(
        "gains of blend weights are too certain",
        "evaluation/pareto.py",
        r"users=over_users\(np\.asarray\(by_user\), support\),",
        "users=over_users(0.7 * np.asarray(by_user), support),",
        "evaluation/test_pareto.py",
        "paired_gains",
    ),
    Mutant(
        "a refit replaces its model where no harm is significant",
        "nightly/refitting.py",
        r"elif compared\.lower <= -rule\.refit_margin:",
        "elif compared.blended.high < 0:",
        "nightly/test_suite.py",
        "does_no_harm",
    ),
    Mutant(
        "a back-test's trainings count as one",
        "nightly/backtest.py",
        r"square = sum\(weight\*\*2 for weight in weights\.values\(\)\)",
        "square = sum(abs(weight) for weight in weights.values())",
        "nightly/test_backtest.py",
        "gain",
    ),
    _in(
        DRIFT,
        "a sample's rows are a day's volume",
        r"rows=rows\.height if counted is None else counted",
        "rows=rows.height",
        "volume",
    ),
    _in(
        DRIFT,
        "PSI is not corrected for the number of values",
        r"return max\(0\.0, value - scale",
        "return max(0.0, value - 0 * scale",
        "excess",
    ),
    Mutant(
        "a refit model has the winner's maps in full",
        "nightly/contenders.py",
        r"calibration = run\.artifact\.calibration\.part\(settings\.refit_share\)",
        "calibration = run.artifact.calibration",
        "nightly/test_suite.py",
        "share_of_the_winners_maps",
    ),
    Mutant(
        "drift compares scores of two models",
        "nightly/suite.py",
        r'"validate": winner\.artifact\.predict.*',
        '"validate": winner.validate_prediction,',
        "nightly/test_suite.py",
        "refit_winner",
    ),
    Mutant(
        "a number's every value is a slice",
        "evaluation/slices.py",
        r"n_unique\(\) > MAX_VALUES",
        "n_unique() > 10 * MAX_VALUES",
        "evaluation/test_slices.py",
        "quarters",
    ),
    Mutant(
        "an action counts on its impression's day",
        "logs/actions.py",
        r'otherwise\("known"\)\.alias\("counted"\)',
        'otherwise("impression_day").alias("counted")',
        "features/test_actions.py",
        "wednesday",
    ),
    Mutant(
        "a row has the values of its own day's snapshot",
        "logs/sources.py",
        r"for own in parts if own < day\]",
        "for own in parts if own <= day]",
        "features/test_dated_tables.py",
        "rebuilds_only",
    ),
    Mutant(
        "a row of a table is valid at its end",
        "logs/sources.py",
        r"pl\.col\(TO\) > at\(TO\)",
        "pl.col(TO) >= at(TO)",
        "features/test_dated_tables.py",
        "touch_or_are_empty",
    ),
    Mutant(
        "a late action counts for the values of the day on which it is known",
        "features/aggregates.py",
        r"tables_as_of\(context\.source, own\)",
        "tables_as_of(context.source, day)",
        "features/test_dated_tables.py",
        "late_action",
    ),
    Mutant(
        "what is not finite is a derived feature",
        "features/derived.py",
        r"pl\.when\(number\.is_finite\(\)\)",
        "pl.when(number.is_not_null())",
        "features/test_derived.py",
        "by_hand",
    ),
    Mutant(
        "the age of a time is counted from its date in UTC",
        "features/derived.py",
        r"value = local\.dt\.date\(\)",
        "value = local.cast(pl.Date)",
        "features/test_column_types.py",
        "reach_encoder",
    ),
    Mutant(
        "the weight of a bad objective counts for it",
        "config.py",
        r"else -abs\(given\[o\.name\]\)",
        "else abs(given[o.name])",
        "ranking/test_blend.py",
        "bad_objective",
    ),
    Mutant(
        "a training continues from the weights after the refit",
        "ranking/artifact.py",
        r"found = self if self\.before_refit is None else self\.before_refit",
        "found = replace(self, moments=self.before_refit.moments)",
        "nightly/test_incremental.py",
        "before_the_champions_refit",
    ),
    Mutant(
        "a continued training counts as a full one",
        "nightly/plan.py",
        r"for night in earlier if night\.full",
        "for night in earlier",
        "nightly/test_incremental.py",
        "is_due",
    ),
    Mutant(
        "a checkpoint of another start is resumed",
        "nightly/contenders.py",
        r"contender\.spec, contender\.name, start\)",
        "contender.spec, contender.name)",
        "nightly/test_incremental.py",
        "other_starts",
    ),
    Mutant(
        "new values start at random",
        "training/warm_start.py",
        r"start if after\.max_length is None else RANDOM",
        "RANDOM",
        "training/test_warm_start.py",
        "start_as_they_were",
    ),
    Mutant(
        "a mixture's gradient is of the first output alone",
        "models/gates.py",
        r"of_experts\.addcmul_\(",
        "of_experts.addcmul(",
        "models/test_gates.py",
        "formula",
    ),
    _in(
        REQUESTS,
        "positions of a request begin with 0",
        r"pl\.int_ranges\(1, whole \+ 1\)",
        "pl.int_ranges(0, whole)",
    ),
    Mutant(
        "a click on no item of its request is an impression",
        "logs/contract.py",
        r"Rule\(~pl\.col\(STRAY\),",
        "Rule(pl.col(STRAY) | True,",
        "logs/test_requests.py",
    ),
    Mutant(
        "an action goes to the first item of its request",
        "logs/actions.py",
        r"if first\.height < found\.height:",
        "if False:",
        "logs/test_requests.py",
    ),
    Mutant(
        "a column that one day lacks is missing in its rows",
        "logs/sources.py",
        r"around = \[\*islice\(filter\(of_log.files, before\), 2\)\]",
        "around = [day]",
        "logs/test_changes.py",
    ),
    _in(
        CANDIDATES,
        "context that varies within a request is the user's",
        r"of_item = \(found\[f\"request \{column\}\"\] or 0\.0\) > CONSTANT \* whole",
        "of_item = False",
    ),
    _in(
        CANDIDATES,
        "items of unknown stock are candidates",
        r"table\.filter\(pl\.col\(column\)\.cast\(pl\.Boolean\)\)",
        "table.filter(pl.col(column).cast(pl.Boolean).fill_null(True))",
    ),
]


def copied(folder: Path) -> Path:
    """A copy of what the tests need, in the folder."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "pictures")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy2(source, folder / name)
    return folder


def mutated(text: str, mutant: Mutant) -> str:
    """The file's text with the wrong line. Raises ValueError unless one line matches."""
    found = [line for line in text.splitlines() if re.search(mutant.line, line)]
    if len(found) != 1:
        raise ValueError(f"{mutant.file}: {len(found)} lines match {mutant.line!r}, not one")
    wrong = re.sub(mutant.line, lambda match: mutant.wrong, found[0])
    if wrong == found[0]:
        raise ValueError(f"{mutant.file}: {mutant.wrong!r} changes nothing")
    return text.replace(found[0], wrong, 1)


def run_tests(folder: Path, tests: Sequence[str], only: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy of the repository.

    Args:
        tests: files below `tests/`.
        only: pytest's `-k`; empty for all of them.
    """
    chosen = ["-k", only] if only else []
    files = [f"tests/{file}" for file in tests]
    arguments = ["-x", "-q", *files, *chosen, "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    module = "tests.mutation.child"
    return forks.run(*arguments, env=environment, module=module, cwd=folder, timeout=600)


def table() -> str:
    """The mutants as a table in Markdown."""
    lines = ["| wrong line | file | found by |", "| --- | --- | --- |"]
    lines += [f"| {m.what} | `{m.file}` | `tests/{m.tests}` |" for m in MUTANTS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
