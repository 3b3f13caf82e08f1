"""The model family as presets: the same expert layer, wired differently.

A preset takes the number of objectives T and returns a specification. What differs is only which
experts an objective may listen to, and whether the gates are tied.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtl_ranker.models.ranker import RankerSpec


def single_task(
    objectives: int,
    expert_hidden: Sequence[int] = (64,),
    tower_hidden: Sequence[int] = (16,),
    embedding_width: int = 8,
    dropout: float = 0.1,
) -> RankerSpec:
    """Each objective has its own expert and shares only the embeddings' table."""
    own = tuple(tuple(e == t for e in range(objectives)) for t in range(objectives))
    return _spec(own, False, expert_hidden, tower_hidden, embedding_width, dropout)


def shared_bottom(
    objectives: int,
    expert_hidden: Sequence[int] = (128,),
    tower_hidden: Sequence[int] = (16,),
    embedding_width: int = 8,
    dropout: float = 0.1,
) -> RankerSpec:
    """One expert that every objective listens to (Caruana 1997; Ma et al., eq. 1)."""
    return _spec(
        ((True,),) * objectives, False, expert_hidden, tower_hidden, embedding_width, dropout
    )


def omoe(
    objectives: int,
    experts: int = 4,
    expert_hidden: Sequence[int] = (64,),
    tower_hidden: Sequence[int] = (16,),
    embedding_width: int = 8,
    dropout: float = 0.1,
) -> RankerSpec:
    """One gate for all objectives (Ma et al., eq. 5)."""
    every = ((True,) * experts,) * objectives
    return _spec(every, True, expert_hidden, tower_hidden, embedding_width, dropout)


def mmoe(
    objectives: int,
    experts: int = 4,
    expert_hidden: Sequence[int] = (64,),
    tower_hidden: Sequence[int] = (16,),
    embedding_width: int = 8,
    dropout: float = 0.1,
) -> RankerSpec:
    """Multi-gate mixture-of-experts: one gate per objective (Ma et al., eq. 6 and 7)."""
    every = ((True,) * experts,) * objectives
    return _spec(every, False, expert_hidden, tower_hidden, embedding_width, dropout)


PRESETS: dict[str, Callable[..., RankerSpec]] = {
    preset.__name__: preset for preset in (single_task, shared_bottom, omoe, mmoe)
}


def make(place: str, settings: Mapping[str, Any], objectives: int) -> RankerSpec:
    """The specification of `{preset = "mmoe", experts = 8}`; `place` names it in an error.

    Raises ValueError naming the key, what was found and what is allowed.
    """
    overrides = dict(settings)
    name = overrides.pop("preset", place.rsplit(".", 1)[-1])
    if name not in PRESETS:
        raise ValueError(f"{place}.preset: no preset {name!r}; allowed: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    parameters = inspect.signature(preset).parameters
    allowed = [p for p in parameters if p != "objectives"]
    for key, value in overrides.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{place}.{key}: unknown key{hint}; allowed: preset, {', '.join(allowed)}"
            )
        _check(f"{place}.{key}", value, parameters[key].default)
    return preset(objectives, **overrides)


def _check(place: str, value: Any, default: Any) -> None:
    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 1

    if isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and all(whole(v) for v in value)
        fits = fits and (len(value) > 0 or place.endswith("tower_hidden"))
        allowed = "a list of whole numbers of at least 1"
    elif isinstance(default, int):
        fits, allowed = whole(value), "a whole number of at least 1"
    else:
        fits = isinstance(value, int | float) and 0 <= value < 1
        allowed = "a number from 0 to below 1"
    if not fits:
        raise ValueError(f"{place}: found {value!r} ({type(value).__name__}); allowed: {allowed}")


def _spec(
    visible: tuple[tuple[bool, ...], ...],
    tied: bool,
    expert_hidden: Sequence[int],
    tower_hidden: Sequence[int],
    embedding_width: int,
    dropout: float,
) -> RankerSpec:
    return RankerSpec(
        visible, tied, tuple(expert_hidden), tuple(tower_hidden), embedding_width, dropout
    )
