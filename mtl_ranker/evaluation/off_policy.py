"""Off-policy estimates: the value of a new ranking from the log of another policy.

A decision is a list of impressions that one user was shown together, or a single item. The value
of a policy is the mean reward per impression when it makes the decisions. With importance weights
w = π(new) / π(log) of each logged impression, rewards r and a reward model q̂, over N impressions:

    IPS   = Σ w·r / N                          (Horvitz & Thompson 1952)
    SNIPS = Σ w·r / Σ w                        (Swaminathan & Joachims, NeurIPS 2015)
    DR    = (Σ π(new)·q̂ + Σ w·(r − q̂)) / N    (Dudík et al., ICML 2011)

The first sum of DR is over what the new policy shows, and q̂ of a user's rows is fitted on other
users (cross-fitting, Chernozhukov et al. 2018). For lists π is the probability of the item at its
position given the context and the list's items: the estimand is the value under item-position
independence, where the reward of an impression depends on its context, item and position, and not
on the rest of the list (Li et al., KDD 2018, the item-position model).

Intervals are clustered by user: all three are ratios of sums over users, linearised, with
Student's t. Where the log does not support a ranking, it is refused with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from scipy.special import gammaln
from scipy.stats import t as student_t

from mtl_ranker.config import Project
from mtl_ranker.evaluation.intervals import Interval
from mtl_ranker.evaluation.metrics import PredictedRows

FOLDS = 5
MIN_REWARDED = 10  # rows with a reward that carry weight
MEAN_WEIGHT_ERRORS = 4.0  # standard errors by which the mean weight may differ from 1
EXAMINATION_SPREAD = 0.05  # relative, among rows of the same position
ALWAYS = 1 - 1e-6  # a propensity that counts as 1
POSITIONS_APART = 10  # of the reward model; later positions share their coefficients


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One objective's mean reward per impression, as logged and under the new ranking.

    Attributes:
        how: the new ranking, in words.
        rows: logged rows with a label.
        support: effective sample size (Σ w)² / Σ w² (Kish 1965).
        logged: mean reward under the logging policy.
        ips: None if the label is missing on some rows, as the number of labels then depends on what
            was shown.
        snips: None if Σ w does not estimate the number of impressions (`position_weights`) and
            every row has a label; with missing labels the mean over rows with a label.
        dr: None if the label is missing on some rows, or without a reward model.
        refused: why no estimate is given, or None.
    """

    objective: str
    how: str
    rows: int
    support: float
    logged: float
    ips: Interval | None = None
    snips: Interval | None = None
    dr: Interval | None = None
    refused: str | None = None

    def __str__(self) -> str:
        head = f"{self.objective} ({self.how})"
        if self.refused is not None:
            return f"{head}: no estimate, {self.refused}"
        named = (("DR", self.dr), ("SNIPS", self.snips), ("IPS", self.ips))
        estimates = [f"{name} {value}" for name, value in named if value is not None]
        return (
            f"{head}: logged {self.logged:.4f}, this ranking {', '.join(estimates)}, "
            f"effective rows {self.support:,.0f} of {self.rows:,}"
        )


@dataclass(frozen=True)
class RewardModel:
    """The inputs of a linear reward model q̂, for what was logged and for what the policy shows.

    For a single item a logged row has as many shown rows as candidates; for a list that is
    reordered, as many as the list has positions.

    Attributes:
        logged: [N, F], of the logged impressions.
        shown: [M, F], of the impressions of the new policy.
        row: [M], a logged row of the same user for each of them.
        probability: [M], with which the new policy shows each; None for 1.
    """

    logged: np.ndarray
    shown: np.ndarray
    row: np.ndarray
    probability: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class WeightedRewards:
    """Rewards of N logged rows, weighted to stand for another ranking.

    Attributes:
        objective: whose labels the rewards are.
        how: the new ranking, in words.
        reward: [N]; NaN = missing.
        weight: [N], importance weights π(new) / π(log).
        user: [N].
        self_normalising: whether Σ w estimates the number of impressions; otherwise Σ w·r / Σ w is
            no estimate of the mean reward.
        model: for DR, or None.
    """

    objective: str
    how: str
    reward: np.ndarray
    weight: np.ndarray
    user: np.ndarray
    self_normalising: bool = True
    model: RewardModel | None = None


def estimate(rewards: WeightedRewards, min_support: float, confidence: float = 0.95) -> Estimate:
    """IPS, SNIPS and DR, with intervals clustered by user.

    Refused if the effective sample size is below `min_support`, if fewer than `MIN_REWARDED` rows
    with a positive weight have a reward other than zero, or if weights that must average 1
    significantly do not: the propensities are then those of something else, or the log never shows
    a part of what the new policy shows.
    """
    known = ~np.isnan(rewards.reward)
    reward = rewards.reward[known].astype(np.float64)
    _, user = np.unique(rewards.user, return_inverse=True)
    weight = rewards.weight.astype(np.float64)
    labelled, labelled_user = weight[known], user[known]
    total, squared = float(labelled.sum()), float((labelled**2).sum())
    support = total**2 / squared if squared > 0 else 0.0
    rewarded = int(((reward != 0) & (labelled > 0)).sum())
    result = Estimate(
        objective=rewards.objective,
        how=rewards.how,
        rows=len(reward),
        support=support,
        logged=float(reward.mean()) if len(reward) else float("nan"),
    )
    refused = None
    if support < min_support:
        refused = f"support too thin: effective rows {support:,.0f}, at least {min_support:,.0f}"
    elif rewarded < MIN_REWARDED:
        refused = (
            f"support too thin: {rewarded} rows with a reward carry weight, at least {MIN_REWARDED}"
        )
    elif rewards.self_normalising:
        refused = _unsupported(weight, user)
    if refused is not None:
        return replace(result, refused=refused)
    ips = snips = dr = None
    if known.all():
        ips = _mean_over_users(weight * reward, np.ones(len(reward)), user, confidence)
        if rewards.model is not None:
            robust = _doubly_robust(rewards.model, reward, weight, user)
            dr = _mean_over_users(robust, np.ones(len(reward)), user, confidence)
    if rewards.self_normalising or not known.all():
        snips = _mean_over_users(labelled * reward, labelled, labelled_user, confidence)
    return replace(result, ips=ips, snips=snips, dr=dr)


def _unsupported(weight: np.ndarray, user: np.ndarray) -> str | None:
    """Why weights [N] that must average 1 cannot be importance weights, or None."""
    mean = float(weight.mean())
    error = _standard_error(weight - mean, np.ones(len(weight)), user)
    if abs(mean - 1.0) <= MEAN_WEIGHT_ERRORS * error + 1e-9:
        return None
    return (
        f"the log does not support this ranking: its weights average {mean:.3f}, standard error "
        f"{error:.3f}, where 1 is expected of propensities P(item at its position | context) of "
        "everything that the ranking shows (log.propensity, log.propensity_of)"
    )


def _mean_over_users(
    numerator: np.ndarray, denominator: np.ndarray, user: np.ndarray, confidence: float
) -> Interval:
    """Σ numerator / Σ denominator of rows [N], with an interval clustered by user.

    The ratio is linearised. The degrees of freedom of Student's t are 2U / (κ − 1) of the U users'
    contributions with kurtosis κ, at most U − 1 (Satterthwaite 1946: the variance's own variance),
    as a few users often carry most of the weight.
    """
    value = float(numerator.sum() / denominator.sum())
    error = numerator - value * denominator
    by_user = np.bincount(user, weights=error)
    users = len(np.unique(user))
    square = float((by_user**2).sum())
    if square <= 0:
        return Interval(value, value, value)
    kurtosis = users * float((by_user**4).sum()) / square**2
    freedom = max(1.0, min(users - 1.0, 2 * users / max(kurtosis - 1.0, 1e-9)))
    half = float(student_t.ppf((1 + confidence) / 2, freedom))
    half *= _standard_error(error, denominator, user)
    return Interval(value, value - half, value + half)


def _standard_error(error: np.ndarray, denominator: np.ndarray, user: np.ndarray) -> float:
    """Of a ratio of sums over users, whose linearised errors of rows are given [N]."""
    users = len(np.unique(user))
    square = float((np.bincount(user, weights=error) ** 2).sum())
    return float(np.sqrt(square * users / max(users - 1, 1)) / denominator.sum())


def _doubly_robust(
    model: RewardModel, reward: np.ndarray, weight: np.ndarray, user: np.ndarray
) -> np.ndarray:
    """Terms [N] whose mean is DR: q̂ of what is shown instead, and w·(r − q̂)."""
    fold = np.random.default_rng(0).permutation(int(user.max()) + 1)[user] % FOLDS
    shown_fold = fold[model.row]
    logged, shown = np.zeros(len(reward)), np.zeros(len(model.row))
    for held_out in range(FOLDS):
        rows = fold != held_out
        x = model.logged[rows].astype(np.float64)
        gram = x.T @ x
        gram += np.eye(len(gram)) * (1e-6 * np.trace(gram) / len(gram) + 1e-12)
        coefficients = np.linalg.solve(gram, x.T @ reward[rows])
        logged[~rows] = model.logged[~rows] @ coefficients
        shown[shown_fold == held_out] = model.shown[shown_fold == held_out] @ coefficients
    if model.probability is not None:
        shown = shown * model.probability
    return np.bincount(model.row, weights=shown, minlength=len(reward)) + weight * (reward - logged)


@dataclass(frozen=True)
class Reordering:
    """The shown lists of N impressions (`reordered`), each reordered by a score.

    Attributes:
        position: [N], as logged.
        new_position: [N], of the item in its list's new order, among the list's positions.
        in_list: [N], number of items in the row's list.
        list_number: [N], of the row's list, from 0.
    """

    position: np.ndarray
    new_position: np.ndarray
    in_list: np.ndarray
    list_number: np.ndarray


def reordered(
    frame: pl.DataFrame, score: np.ndarray, lists: np.ndarray, requests: bool = False
) -> Reordering:
    """Every shown list in the order of the score.

    What was shown together is a run of rising positions within a list, or, with ids of requests,
    the list itself. Equal scores are in the order of item ids, so that the new order does not
    depend on the logged one.

    Args:
        frame: item_id, timestamp and position of N impressions.
        score: [N].
        lists: [N], equal for rows of the same list.
        requests: the lists are of `log.request`.
    """
    # Only distances within a list matter, so whole positions may start at 0 or 1.
    rows = frame.select("item_id", "timestamp", "position").with_columns(
        pl.Series("score", score),
        pl.Series("list", lists),
        pl.int_range(pl.len()).alias("row"),
    )
    rows = rows.sort("list", "timestamp", "position")
    starts = (pl.col("position") <= pl.col("position").shift(1)).fill_null(True)
    run = pl.lit(0) if requests else starts.over("list").cum_sum().over("list")
    rows = rows.with_columns(run.alias("run"))
    shown_list = ["list", "run"]
    best_first = rows.sort(
        *shown_list, "score", "item_id", descending=[False, False, True, False]
    ).select(pl.col("row").alias("moved"))
    rows = rows.sort(*shown_list, "position").with_columns(
        best_first["moved"],
        pl.len().over(shown_list).alias("in_list"),
        pl.struct(shown_list).rle_id().alias("number"),
    )
    place = rows["row"].to_numpy()
    position, new_position = np.zeros(len(score), np.int64), np.zeros(len(score), np.int64)
    in_list, number = np.zeros(len(score), np.int64), np.zeros(len(score), np.int64)
    logged = rows["position"].cast(pl.Int64).to_numpy()
    position[place], in_list[place] = logged, rows["in_list"].to_numpy()
    number[place] = rows["number"].to_numpy()
    new_position[rows["moved"].to_numpy()] = logged
    return Reordering(position, new_position, in_list, number)


def position_weights(order: Reordering, propensity: np.ndarray) -> np.ndarray:
    """Weights [N] of rows whose propensity is the examination probability of their position.

    A row that moves to position q is examined with the mean propensity that the log has at q, so
    w = propensity(q) / propensity(row) (position-based model, Joachims et al., WSDM 2017). A label
    other than zero needs examination. Weights do not average 1, and as w·q̂ of any model that is
    proportional to examination equals q̂ at q, DR equals IPS.

    Args:
        propensity: [N].
    """
    _, code = np.unique(np.r_[order.position, order.new_position], return_inverse=True)
    logged, moved = code[: len(propensity)], code[len(propensity) :]
    examination = np.bincount(logged, weights=propensity) / np.bincount(logged)
    return examination[moved] / propensity


def item_weights(order: Reordering, propensity: np.ndarray) -> np.ndarray:
    """Weights [N] of rows whose propensity is P(item at its position | context, list's items).

    The new order shows an item at its logged position or does not: w = 1 / propensity or 0.

    Args:
        propensity: [N].
    """
    return (order.new_position == order.position) / propensity


def randomised(order: Reordering, propensity: np.ndarray) -> np.ndarray:
    """Which rows [N] are in a list whose order was random.

    A list whose items all have propensity 1, as a list of one item, had one order only. Which lists
    are randomised must not depend on what they hold, as where a share of users explores.

    Args:
        propensity: [N].
    """
    least = np.ones(int(order.list_number.max(initial=-1)) + 1)
    np.minimum.at(least, order.list_number, propensity)
    return least[order.list_number] < ALWAYS


def reordering_model(order: Reordering, prediction: np.ndarray) -> RewardModel:
    """q̂ = a_k + b_k · prediction at position k; positions from the tenth on share a and b.

    Args:
        prediction: [N], of the item whatever its position.
    """
    first = int(order.position.min())

    def inputs(position: np.ndarray) -> np.ndarray:
        index = np.minimum(position - first, POSITIONS_APART - 1)
        by_position = np.eye(int(min(order.position.max() - first, POSITIONS_APART - 1)) + 1)[index]
        return np.concatenate([by_position, by_position * prediction[:, None]], 1)

    rows = np.arange(len(prediction))
    return RewardModel(inputs(order.position), inputs(order.new_position), rows)


def best_of_weights(lists: np.ndarray, score: np.ndarray, candidates: int) -> np.ndarray:
    """Weights [N] of random exposures for a policy that shows the best of some random candidates.

    The policy draws `candidates` = m items as the random exposures were drawn, and shows the one
    with the highest score. Of a list with n ≥ m random exposures, the row at rank j is the best of
    C(n − j, m − 1) of the C(n, m) sets of m rows, so w = n · C(n − j, m − 1) / C(n, m), and Σ w is
    the number of rows (a U-statistic, Hoeffding 1948). Rows with equal scores share their weight.
    Lists with fewer than m rows have weight 0: leave them out.

    Args:
        lists, score: [N], of random exposures.
    """
    rows = pl.DataFrame({"list": lists, "score": score}).with_row_index("row")
    rows = rows.with_columns(
        pl.col("score").rank("ordinal", descending=True).over("list").alias("rank"),
        pl.len().over("list").alias("n"),
    )
    n, rank = rows["n"].to_numpy().astype(np.float64), rows["rank"].to_numpy().astype(np.float64)
    usable = n - rank >= candidates - 1
    weight = np.zeros(len(score))
    below, size = n[usable] - rank[usable], n[usable]
    logarithm = _log_choose(below, candidates - 1) - _log_choose(size, candidates)
    weight[usable] = size * np.exp(logarithm)
    shared = rows.with_columns(pl.Series("weight", weight))
    return shared.select(pl.col("weight").mean().over("list", "score")).to_series().to_numpy()


def _log_choose(n: np.ndarray, k: int) -> np.ndarray:
    return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)


def off_policy(
    project: Project, frame: pl.DataFrame, predicted: PredictedRows, score: np.ndarray
) -> list[Estimate]:
    """Every objective's estimates for the ranking by `score`, as far as the log's columns allow.

    Args:
        frame: N held-out rows with user_id, item_id, timestamp and, where the log has them,
            position, propensity and the random-exposure flag.
        predicted: labels and predictions of the N rows.
        score: [N].
    """
    if frame.is_empty():
        return []
    settings, confidence = project.off_policy, project.promotion.confidence
    estimates = []
    for policy in _policies(project, frame, score, predicted.lists):
        rows = policy.rows
        for t, objective in enumerate(project.objectives):
            rewards = WeightedRewards(
                objective=objective.name,
                how=policy.how,
                reward=predicted.labels[rows, t],
                weight=policy.weight,
                user=predicted.user[rows],
                self_normalising=policy.self_normalising,
                model=(
                    None
                    if policy.order is None or not policy.self_normalising
                    else reordering_model(policy.order, predicted.prediction[rows, t])
                ),
            )
            estimated = estimate(rewards, settings.min_support, confidence)
            if policy.refused is not None:
                estimated = replace(
                    estimated, ips=None, snips=None, dr=None, refused=policy.refused
                )
            estimates.append(estimated)
    return estimates


@dataclass(frozen=True)
class _Policy:
    """A ranking, and the logged rows from which it can be estimated.

    Attributes:
        rows: [N] booleans.
        weight: importance weights of those rows.
        self_normalising: see `WeightedRewards`.
        order: of those rows, if the ranking reorders shown lists.
        refused: why it cannot be estimated, or None.
    """

    how: str
    rows: np.ndarray
    weight: np.ndarray
    self_normalising: bool = True
    order: Reordering | None = None
    refused: str | None = None


def _policies(
    project: Project, frame: pl.DataFrame, score: np.ndarray, lists: np.ndarray
) -> list[_Policy]:
    """The rankings that the log's columns name, refused ones included."""
    policies = []
    if "propensity" in frame.columns:
        policies.append(_from_propensities(project, frame, score, lists))
    flag = project.log.random_exposure
    if flag is not None:
        random = (frame[flag].cast(pl.Float64) > 0).fill_null(False).to_numpy()
        candidates = max(2, round(1 / project.off_policy.keep))
        _, code, count = np.unique(lists[random], return_inverse=True, return_counts=True)
        usable = random.copy()
        usable[random] = count[code] >= candidates
        weight = best_of_weights(lists[usable], score[usable], candidates)
        how = f"its best of {candidates} random items"
        refused: str | None = None
        if not usable.any():
            refused = (
                f"no list has {candidates} random exposures (log.random_exposure = {flag!r}, "
                f"off_policy.keep = {project.off_policy.keep:g})"
            )
        policies.append(_Policy(how, usable, weight, refused=refused))
    return policies


def _from_propensities(
    project: Project, frame: pl.DataFrame, score: np.ndarray, lists: np.ndarray
) -> _Policy:
    how, rows = "reordered within its lists", np.ones(frame.height, bool)
    propensity = frame["propensity"].cast(pl.Float64).to_numpy()
    if "position" not in frame.columns or frame["position"].null_count():
        no_position = (
            "log.propensity needs log.position on every row: the probability of having been shown "
            "at all does not determine what another ranking would have shown"
        )
        return _Policy(how, rows, np.ones(len(score)), refused=no_position)
    order = reordered(frame, score, lists, project.log.request is not None)
    refused = None
    if order.in_list.max() == 1:
        refused = "every list has one item, so that there is no other order"
    if project.log.propensity_of == "examination":
        weight = position_weights(order, propensity)
        refused = refused or _no_examination(order, propensity)
        return _Policy(how, rows, weight, False, order, refused)
    random = randomised(order, propensity)
    if not random.any():
        refused = refused or (
            "every propensity is 1: no list was randomised, so that the log supports no other "
            "order than its own ([scoring.exploration])"
        )
    elif not random.all():
        how = f"{how} that were randomised"
        rows, propensity = random, propensity[random]
        order = reordered(
            frame.filter(pl.Series(random)),
            score[random],
            lists[random],
            project.log.request is not None,
        )
    return _Policy(how, rows, item_weights(order, propensity), order=order, refused=refused)


def _no_examination(order: Reordering, propensity: np.ndarray) -> str | None:
    """Why propensities [N] are no examination probabilities of positions, or None."""
    _, code = np.unique(order.position, return_inverse=True)
    mean = np.bincount(code, weights=propensity) / np.bincount(code)
    spread = float(np.sqrt(((propensity / mean[code] - 1) ** 2).mean()))
    if spread > EXAMINATION_SPREAD:
        return (
            f"propensities of the same position differ by {spread:.0%} (relative standard "
            f"deviation; at most {EXAMINATION_SPREAD:.0%}), but a position's examination is the "
            "same for all items (log.propensity, log.propensity_of)"
        )
    if mean.max() <= mean.min() * (1 + 1e-6):
        return (
            f"the propensity is {mean[0]:g} at every position, so that no order is better than "
            "another (log.propensity, log.propensity_of)"
        )
    return None
