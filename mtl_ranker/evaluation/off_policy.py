"""What the ranking would have been worth, from a log that another policy made.

Importance weights w = π(new) / π(log) turn rewards under the logging policy into an estimate for
another ranking: IPS = mean(w·r) (Horvitz & Thompson 1952), SNIPS = Σ w·r / Σ w (Swaminathan &
Joachims, NeurIPS 2015). Where few rows carry the weight, no number is printed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl

from mtl_ranker.config import Project
from mtl_ranker.evaluation.intervals import Interval, interval, user_draws


@dataclass(frozen=True)
class Estimate:
    """One objective's value under the new ranking and under the log, per impression.

    Attributes:
        ips: None where the label is missing on some rows, as their number then depends on what was
            shown.
        snips: None where Σ w does not count what would have been shown (`position_weights`) and
            every row has its label; the mean over rows with a label elsewhere.
        support: effective sample size (Σ w)² / Σ w² (Kish 1965).
        refused: why no number is given, or None.
    """

    objective: str
    how: str
    rows: int
    support: float
    logged: float
    ips: Interval | None
    snips: Interval | None
    refused: str | None = None

    def __str__(self) -> str:
        head = f"{self.objective} ({self.how})"
        if self.refused is not None:
            return f"{head}: no estimate, {self.refused}"
        found = [f"SNIPS {self.snips}"] if self.snips is not None else []
        found += [f"IPS {self.ips}"] if self.ips is not None else []
        return (
            f"{head}: logged {self.logged:.4f}, this ranking {', '.join(found)}, "
            f"effective rows {self.support:,.0f} of {self.rows:,}"
        )


def estimate(
    objective: str,
    how: str,
    reward: np.ndarray,
    weight: np.ndarray,
    user: np.ndarray,
    min_support: float,
    confidence: float = 0.95,
    resamples: int = 200,
    shares: bool = True,
) -> Estimate:
    """IPS and SNIPS of rewards [N] under weights [N], intervals by drawing users anew.

    `shares`: Σ w counts what the ranking would have shown, without which Σ w·r / Σ w is no value
    of it. Refused when the effective sample size is below `min_support`, or fewer than ten rewards
    that carry weight differ from zero.
    """
    known = ~np.isnan(reward)
    reward, weight, user = reward[known].astype(np.float64), weight[known], user[known]
    total, squared = float(weight.sum()), float((weight**2).sum())
    support = total**2 / squared if squared > 0 else 0.0
    rewarded = int(((reward != 0) & (weight > 0)).sum())
    logged = float(reward.mean()) if len(reward) else float("nan")
    refused = None
    if support < min_support:
        refused = f"support too thin: effective rows {support:,.0f}, at least {min_support:,.0f}"
    elif rewarded < 10:
        refused = f"support too thin: {rewarded} rows with a reward carry weight, at least 10"
    if refused is not None:
        return Estimate(objective, how, len(reward), support, logged, None, None, refused)
    draws = user_draws(user, resamples).astype(np.float64)
    count = draws.sum(1)
    earned, mass = draws @ (weight * reward), draws @ weight
    ips = snips = None
    if known.all():
        ips = interval(float((weight * reward).mean()), earned / count, confidence)
    if shares or not known.all():
        snips = interval(float((weight * reward).sum() / total), earned / mass, confidence)
    return Estimate(objective, how, len(reward), support, logged, ips, snips)


def position_weights(frame: pl.DataFrame, score: np.ndarray) -> np.ndarray:
    """Weights of rows whose propensity is that of having been looked at in their position.

    Each shown list (a run of rising positions of one user) is put in the order of the score; a row
    that moves to position q is then looked at with the mean propensity that the log has at q, so
    w = propensity(q) / its own (the position-based model, Joachims et al., WSDM 2017).

    Args:
        frame: user_id, timestamp, position, propensity of N impressions.
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
        .alias("shown")
    )
    seat = ["user_id", "shown"]
    rows = rows.with_columns(
        pl.col("score").rank("ordinal", descending=True).over(seat).alias("place"),
        pl.col("position").rank("ordinal").over(seat).alias("seat"),
    )
    seats = rows.select(*seat, pl.col("seat").alias("place"), pl.col("position").alias("moved_to"))
    looked = rows.group_by("position").agg(pl.col("propensity").mean().alias("looked_at"))
    rows = rows.join(seats, on=[*seat, "place"], how="left")
    rows = rows.join(looked.rename({"position": "moved_to"}), on="moved_to", how="left")
    weights = (rows["looked_at"] / rows["propensity"]).to_numpy()
    made = np.zeros(len(score))
    made[rows["row"].to_numpy()] = weights
    return made


def shown_weights(propensity: np.ndarray, score: np.ndarray, keep: float) -> np.ndarray:
    """Weights of rows whose propensity is that of having been shown at all, for a policy that
    shows the best `keep` share: 1 / propensity there, 0 elsewhere.
    """
    return (score >= np.quantile(score, 1.0 - keep)) / propensity


def random_weights(random: np.ndarray, score: np.ndarray, keep: float) -> np.ndarray:
    """Weights of rows that were exposed at random: a policy that shows the best `keep` share.

    Among random exposures every row was equally likely, so showing those whose score is in the
    upper `keep` share has w = 1 / keep there and 0 elsewhere; rows not exposed at random have 0.

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
    """Every objective's estimates that the log's columns allow, for the ranking by `score`.

    Args:
        frame: N held-out rows with user_id and, where the log has them, position, propensity and
            the random-exposure flag.
        labels: [N, T].
        score: [N].
    """
    if frame.is_empty():
        return []
    settings, confidence = project.off_policy, project.promotion.confidence
    # In words, the rows, the weights of those rows, and whether they are shares.
    ways: list[tuple[str, np.ndarray, np.ndarray, bool]] = []
    everything = np.ones(frame.height, bool)
    if "propensity" in frame.columns and "position" in frame.columns:
        ways.append(
            ("reordered within its lists", everything, position_weights(frame, score), False)
        )
    elif "propensity" in frame.columns:
        weights = shown_weights(frame["propensity"].to_numpy(), score, settings.keep)
        ways.append((f"showing its best {settings.keep:.0%}", everything, weights, True))
    flag = project.log.random_exposure
    if flag is not None:
        random = (frame[flag].cast(pl.Float64) > 0).fill_null(False).to_numpy()
        weights = random_weights(random, score, settings.keep)[random]
        ways.append((f"its best {settings.keep:.0%} of random exposures", random, weights, True))
    user = frame["user_id"].to_numpy()
    return [
        estimate(
            objective.name,
            how,
            labels[rows, t],
            weights,
            user[rows],
            settings.min_support,
            confidence,
            project.promotion.bootstrap,
            shares,
        )
        for how, rows, weights, shares in ways
        for t, objective in enumerate(project.objectives)
    ]
