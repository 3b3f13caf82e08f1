"""Off-policy estimates: the value of a new ranking from the log of another policy.

Importance weights w = π(new) / π(log) turn rewards under the logging policy into an estimate for
another ranking: IPS = mean(w·r) (Horvitz & Thompson 1952), SNIPS = Σ w·r / Σ w (Swaminathan &
Joachims, NeurIPS 2015). Where few rows carry the weight, no estimate is given.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.evaluation.influence import Clusters
from mtl_ranker.evaluation.intervals import Interval, bootstrap, interval


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
        refused: why no estimate is given, or None.
    """

    objective: str
    how: str
    rows: int
    support: float
    logged: float
    ips: Interval | None = None
    snips: Interval | None = None
    refused: str | None = None

    def __str__(self) -> str:
        head = f"{self.objective} ({self.how})"
        if self.refused is not None:
            return f"{head}: no estimate, {self.refused}"
        estimates = [f"SNIPS {self.snips}"] if self.snips is not None else []
        estimates += [f"IPS {self.ips}"] if self.ips is not None else []
        return (
            f"{head}: logged {self.logged:.4f}, this ranking {', '.join(estimates)}, "
            f"effective rows {self.support:,.0f} of {self.rows:,}"
        )


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
    """

    objective: str
    how: str
    reward: np.ndarray
    weight: np.ndarray
    user: np.ndarray
    self_normalising: bool = True


def estimate(
    rewards: WeightedRewards,
    min_support: float,
    confidence: float = 0.95,
    resamples: int = 200,
) -> Estimate:
    """IPS and SNIPS, with intervals from resampling users.

    Refused if the effective sample size is below `min_support`, or if fewer than ten rows with a
    positive weight have a reward other than zero.
    """
    known = ~np.isnan(rewards.reward)
    reward = rewards.reward[known].astype(np.float64)
    weight, user = rewards.weight[known], rewards.user[known]
    total, squared = float(weight.sum()), float((weight**2).sum())
    support = total**2 / squared if squared > 0 else 0.0
    rewarded = int(((reward != 0) & (weight > 0)).sum())
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
    elif rewarded < 10:
        refused = f"support too thin: {rewarded} rows with a reward carry weight, at least 10"
    if refused is not None:
        return replace(result, refused=refused)
    clusters = Clusters.of(user)
    columns = (np.ones(len(reward)), weight * reward, weight)
    sums = np.stack([clusters.sums(column) for column in columns], 1)
    impressions, weighted_reward, total_weight = bootstrap(sums, lambda draws: draws, resamples).T
    ips = snips = None
    if known.all():
        ips = interval(float((weight * reward).mean()), weighted_reward / impressions, confidence)
    if rewards.self_normalising or not known.all():
        value = float((weight * reward).sum() / total)
        snips = interval(value, weighted_reward / total_weight, confidence)
    return replace(result, ips=ips, snips=snips)


def position_weights(frame: pl.DataFrame, score: np.ndarray) -> np.ndarray:
    """Weights [N] of rows whose propensity is the examination probability of their position.

    Each shown list (a run of rising positions of one user) is reordered by the score. A row that
    moves to position q is examined with the mean propensity that the log has at q, so
    w = propensity(q) / propensity(row) (position-based model, Joachims et al., WSDM 2017).

    Args:
        frame: user_id, timestamp, position and propensity of N impressions.
        score: [N].
    """
    # Only distances within a list matter, so whole positions may start at 0 or 1.
    rows = frame.select("user_id", "timestamp", "position", "propensity").with_columns(
        pl.Series("score", score), pl.int_range(pl.len()).alias("row")
    )
    rows = rows.sort("user_id", "timestamp", "position")
    rows = rows.with_columns(
        ((pl.col("position") <= pl.col("position").shift(1)).fill_null(True))
        .over("user_id")
        .cum_sum()
        .over("user_id")
        .alias("list")
    )
    shown_list = ["user_id", "list"]
    rows = rows.with_columns(
        pl.col("score").rank("ordinal", descending=True).over(shown_list).alias("new_rank"),
        pl.col("position").rank("ordinal").over(shown_list).alias("old_rank"),
    )
    positions = rows.select(
        *shown_list, pl.col("old_rank").alias("new_rank"), pl.col("position").alias("new_position")
    )
    examination = rows.group_by("position").agg(pl.col("propensity").mean().alias("examination"))
    examination = examination.rename({"position": "new_position"})
    rows = rows.join(positions, on=[*shown_list, "new_rank"], how="left")
    rows = rows.join(examination, on="new_position", how="left")
    weights = np.zeros(len(score))
    weights[rows["row"].to_numpy()] = (rows["examination"] / rows["propensity"]).to_numpy()
    return weights


def shown_weights(propensity: np.ndarray, score: np.ndarray, keep: float) -> np.ndarray:
    """Weights [N] of rows whose propensity is the probability of having been shown at all.

    For a policy that shows the share `keep` with the highest scores: 1 / propensity for those rows,
    0 for others.
    """
    return (score >= np.quantile(score, 1.0 - keep)) / propensity


def random_weights(random: np.ndarray, score: np.ndarray, keep: float) -> np.ndarray:
    """Weights [N] of randomly exposed rows for a policy that shows the best share `keep` of them.

    Random exposures are equally likely, so rows with the highest scores have w = 1 / keep. Other
    rows, and rows that were not exposed at random, have 0.

    Args:
        random: [N] booleans.
        score: [N].
    """
    weights = np.zeros(len(score))
    if random.any():
        chosen = score[random] >= np.quantile(score[random], 1.0 - keep)
        weights[np.flatnonzero(random)[chosen]] = 1.0 / max(float(chosen.mean()), 1e-12)
    return weights


def off_policy(
    project: Project, frame: pl.DataFrame, labels: np.ndarray, score: np.ndarray
) -> list[Estimate]:
    """Every objective's estimates for the ranking by `score`, as far as the log's columns allow.

    Args:
        frame: N held-out rows with user_id and, where the log has them, position, propensity and
            the random-exposure flag.
        labels: [N, T].
        score: [N].
    """
    if frame.is_empty():
        return []
    settings, confidence = project.off_policy, project.promotion.confidence
    policies: list[_Policy] = []
    all_rows = np.ones(frame.height, bool)
    if "propensity" in frame.columns and "position" in frame.columns:
        weight = position_weights(frame, score)
        policies.append(_Policy("reordered within its lists", all_rows, weight, False))
    elif "propensity" in frame.columns:
        weight = shown_weights(frame["propensity"].to_numpy(), score, settings.keep)
        policies.append(_Policy(f"showing its best {settings.keep:.0%}", all_rows, weight))
    flag = project.log.random_exposure
    if flag is not None:
        random = (frame[flag].cast(pl.Float64) > 0).fill_null(False).to_numpy()
        weight = random_weights(random, score, settings.keep)[random]
        how = f"its best {settings.keep:.0%} of random exposures"
        policies.append(_Policy(how, random, weight))
    user = frame["user_id"].to_numpy()
    return [
        estimate(
            WeightedRewards(
                objective=objective.name,
                how=policy.how,
                reward=labels[policy.rows, t],
                weight=policy.weight,
                user=user[policy.rows],
                self_normalising=policy.self_normalising,
            ),
            settings.min_support,
            confidence,
            project.promotion.bootstrap,
        )
        for policy in policies
        for t, objective in enumerate(project.objectives)
    ]


@dataclass(frozen=True)
class _Policy:
    """A ranking that can be estimated from some of the logged rows.

    Attributes:
        rows: [N] booleans.
        weight: importance weights of those rows.
        self_normalising: see `WeightedRewards`.
    """

    how: str
    rows: np.ndarray
    weight: np.ndarray
    self_normalising: bool = True
