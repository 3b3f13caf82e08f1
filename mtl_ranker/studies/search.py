"""A search over hyperparameters with Optuna (TPE), the same for every model of a study.

optuna is optional: `pip install 'mtl_ranker[studies]'`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna

SEED = 1_000  # of the trainings of a search; the final ones take others


@dataclass(frozen=True)
class Uniform:
    """Values from `low` to `high`, both included; integers where both ends are integers."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Space:
    """Hyperparameters to search.

    Attributes:
        parameters: name → a range, or a tuple of choices. The order is the order of sampling, and
            so part of what a seed reproduces.
        first: values of the first trial; what is left out is sampled.
    """

    parameters: Mapping[str, Uniform | tuple[Any, ...]]
    first: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """What every model of a comparison is given.

    Attributes:
        trials: trainings of its search.
        seeds: of its final trainings, with the best hyperparameters.
        epochs: of each training of a network, at most. Boosted trees have early stopping alone.
    """

    trials: int
    seeds: Sequence[int]
    epochs: int = 12


@dataclass(frozen=True)
class Best:
    """The hyperparameters with the highest value."""

    parameters: dict[str, Any]
    value: float


def search(
    space: Space, objective: Callable[[dict[str, Any], int], float], trials: int, seed: int = 0
) -> Best:
    """Maximise `objective(hyperparameters, number of the trial)`; reproducible by its seed."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=4)
    )
    if space.first:
        study.enqueue_trial(dict(space.first))
    study.optimize(lambda trial: objective(_suggest(trial, space), trial.number), trials)
    return Best(study.best_params, study.best_value)


def _suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, values in space.parameters.items():
        if not isinstance(values, Uniform):
            found[name] = trial.suggest_categorical(name, list(values))
        elif isinstance(values.low, int) and isinstance(values.high, int):
            found[name] = trial.suggest_int(name, values.low, values.high, log=values.log)
        else:
            found[name] = trial.suggest_float(name, values.low, values.high, log=values.log)
    return found
