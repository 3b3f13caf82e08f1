"""Presets of the model family: specifications of mixture layers after published models.

A preset takes the number of objectives T and defines the experts, what each reads and which outputs
use it. The settings that all presets have (towers, embeddings, dropout, members, …) are in
`COMMON`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtl_ranker.models.spec import EXPERT_KINDS, LayerSpec, Mask, RankerSpec

COMMON: dict[str, Any] = {
    "tower_hidden": (16,),
    "embedding_dim": 8,
    "dropout": 0.1,
    "members": 1,
    "balance": 0.0,
    "gate_dropout": 0.0,
    "expert_kinds": ("mlp",),
    "expert_groups": (),
}


def single_task(objectives: int, expert_hidden: Sequence[int] = (64,)) -> RankerSpec:
    """T models that share nothing, the reference for the gain of sharing.

    One network with a block for each objective: each has its share of every embedding, and training
    restores each objective's best epoch separately (`training/loop.py`).
    """
    return replace(_expert_per_objective(objectives, expert_hidden), unshared=True)


def shared_bottom(objectives: int, expert_hidden: Sequence[int] = (128,)) -> RankerSpec:
    """One expert that every objective uses (Caruana 1997; Ma et al., eq. 1)."""
    layer = LayerSpec(visible=_all_visible(objectives, 1), reads=(0,), hidden=tuple(expert_hidden))
    return RankerSpec(layers=(layer,))


def omoe(objectives: int, experts: int = 4, expert_hidden: Sequence[int] = (64,)) -> RankerSpec:
    """One gate for all objectives (Ma et al., eq. 5)."""
    layer = LayerSpec(
        visible=_all_visible(objectives, experts),
        reads=(0,) * experts,
        hidden=tuple(expert_hidden),
        gate="tied",
    )
    return RankerSpec(layers=(layer,))


def mmoe(
    objectives: int, experts: int = 4, expert_hidden: Sequence[int] = (64,), layers: int = 1
) -> RankerSpec:
    """Multi-gate mixture-of-experts: one gate per objective (Ma et al., eq. 6 and 7).

    With several layers, each expert of the next layer reads a mixture of the experts below, with a
    gate per expert; the gates of the last layer are the objectives'. All gates read the rows.
    """
    return RankerSpec(
        layers=tuple(
            LayerSpec(
                visible=_all_visible(objectives if depth == layers - 1 else experts, experts),
                reads=_reads(depth, experts),
                hidden=tuple(expert_hidden),
            )
            for depth in range(layers)
        )
    )


def sparse_mmoe(
    objectives: int, experts: int = 8, top_k: int = 2, expert_hidden: Sequence[int] = (64,)
) -> RankerSpec:
    """MMoE with noisy top-k gates: k experts per row and objective (Shazeer et al., ICLR 2017)."""
    layer = LayerSpec(
        visible=_all_visible(objectives, experts),
        reads=(0,) * experts,
        hidden=tuple(expert_hidden),
        gate="top_k",
        top_k=top_k,
    )
    return RankerSpec(layers=(layer,), balance=0.01)


def cgc(
    objectives: int,
    own_experts: int = 1,
    shared_experts: int = 2,
    expert_hidden: Sequence[int] = (64,),
) -> RankerSpec:
    """Customised gate control: task-specific and shared experts (Tang et al., RecSys 2020, 4.2)."""
    return ple(objectives, own_experts, shared_experts, expert_hidden, layers=1)


def ple(
    objectives: int,
    own_experts: int = 1,
    shared_experts: int = 2,
    expert_hidden: Sequence[int] = (64,),
    layers: int = 2,
) -> RankerSpec:
    """Progressive layered extraction: stacked CGC (Tang et al., RecSys 2020, 4.3).

    The gate of objective t weights its own and the shared experts. Below the last layer a further
    gate, over all experts, feeds the shared experts above. Gates read what their experts read.
    """
    own_visible = _own_visible(objectives, own_experts, shared=shared_experts)
    every_expert = (True,) * (objectives * own_experts + shared_experts)
    streams = [t for t in range(objectives) for _ in range(own_experts)]
    streams += [objectives] * shared_experts
    specs = []
    for depth in range(layers):
        last = depth == layers - 1
        # Without shared experts the layers above have no stream besides the objectives'.
        visible = own_visible if last or not shared_experts else (*own_visible, every_expert)
        specs.append(
            LayerSpec(
                visible=visible,
                reads=tuple(streams) if depth else (0,) * len(streams),
                hidden=tuple(expert_hidden),
                gate_reads=tuple(range(len(visible))) if depth else (),
            )
        )
    return RankerSpec(layers=tuple(specs))


def cross_stitch(objectives: int, expert_hidden: Sequence[int] = (64, 32)) -> RankerSpec:
    """A network per objective, mixed by learned constants after every layer (Misra et al. 2016)."""
    return RankerSpec(
        layers=tuple(
            LayerSpec(
                visible=_all_visible(objectives, objectives),
                reads=_reads(depth, objectives),
                hidden=(units,),
                gate="stitch",
            )
            for depth, units in enumerate(expert_hidden)
        )
    )


def l2_constrained(
    objectives: int, expert_hidden: Sequence[int] = (64,), l2_weight: float = 1e-4
) -> RankerSpec:
    """A network per objective, with a penalty on their distance (Duong et al., ACL 2015)."""
    return replace(_expert_per_objective(objectives, expert_hidden), l2_weight=l2_weight)


def tensor_factorisation(objectives: int, expert_hidden: Sequence[int] = (64,)) -> RankerSpec:
    """A network per objective; the weights form one low-rank tensor (Yang & Hospedales 2017)."""
    spec = _expert_per_objective(objectives, expert_hidden)
    return RankerSpec(layers=(replace(spec.layers[0], kinds=("tucker",)),))


def adatt(
    objectives: int,
    own_experts: int = 1,
    shared_experts: int = 1,
    expert_hidden: Sequence[int] = (64,),
    layers: int = 2,
) -> RankerSpec:
    """Adaptive task-to-task fusion (Li et al., KDD 2023, 3.2).

    Every gate weights all experts, those of other objectives too. An output's own ("native")
    experts are added a second time with learned native weights, as a residual.
    """
    modules = objectives + 1 if shared_experts else objectives
    native = [
        tuple(own == t for own in range(objectives) for _ in range(own_experts))
        + (t == objectives,) * shared_experts
        for t in range(modules)
    ]
    streams = [t for t in range(objectives) for _ in range(own_experts)]
    streams += [objectives] * shared_experts
    specs = []
    for depth in range(layers):
        outputs = objectives if depth == layers - 1 else modules
        specs.append(
            LayerSpec(
                visible=_all_visible(outputs, len(streams)),
                reads=tuple(streams) if depth else (0,) * len(streams),
                hidden=tuple(expert_hidden),
                gate_reads=tuple(range(outputs)) if depth else (),
                native=tuple(native[:outputs]),
            )
        )
    return RankerSpec(layers=tuple(specs))


def linear(objectives: int) -> RankerSpec:
    """Logistic regression per objective, and linear regression for numbers.

    Logits are linear in embeddings, whose table the objectives share, and in piecewise-linear
    numbers. There are no experts and no hidden units.
    """
    return RankerSpec(layers=(), tower_hidden=(), dropout=0.0, linear=objectives)


PRESETS: dict[str, Callable[..., RankerSpec]] = {
    preset.__name__: preset
    for preset in (
        single_task,
        shared_bottom,
        omoe,
        mmoe,
        sparse_mmoe,
        cgc,
        ple,
        cross_stitch,
        l2_constrained,
        tensor_factorisation,
        adatt,
        linear,
    )
}


def settings_of(preset: str) -> dict[str, Any]:
    """A preset's own settings, besides `COMMON`: key → default."""
    parameters = inspect.signature(PRESETS[preset]).parameters
    return {key: p.default for key, p in parameters.items() if key != "objectives"}


def make(
    place: str,
    settings: Mapping[str, Any],
    objectives: int,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> RankerSpec:
    """The specification of the settings of a model, such as `{preset = "mmoe", experts = 8}`.

    Raises ValueError naming the key, what was found and what is allowed.

    Args:
        place: of the settings in the project file, for messages.
        objectives: T.
        groups: name → patterns of features, for `expert_groups = ["user", "item", "all"]`.
    """
    overrides = dict(settings)
    name = overrides.pop("preset", place.rsplit(".", 1)[-1])
    if name not in PRESETS:
        raise ValueError(f"{place}.preset: no preset {name!r}; allowed: {', '.join(PRESETS)}")
    defaults = settings_of(name)
    common_keys = {"embedding_dim"} if PRESETS[name] is linear else set(COMMON)
    allowed = defaults | {key: COMMON[key] for key in COMMON if key in common_keys}
    for key, value in overrides.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"{place}.{key}: unknown key{hint}; allowed: preset, {', '.join(allowed)}"
            )
        _check(f"{place}.{key}", value, allowed[key])
    spec = PRESETS[name](objectives, **{k: v for k, v in overrides.items() if k in defaults})
    common = {k: v for k, v in overrides.items() if k in COMMON}
    for kind in common.get("expert_kinds", ()):
        if kind not in EXPERT_KINDS:
            allowed_kinds = ", ".join(EXPERT_KINDS)
            raise ValueError(f"{place}.expert_kinds: no kind {kind!r}; allowed: {allowed_kinds}")
    patterns = {"all": ("*",), **(groups or {})}
    for group in common.get("expert_groups", ()):
        if group not in patterns:
            raise ValueError(
                f"{place}.expert_groups: no group {group!r}; allowed: {', '.join(patterns)}, "
                "from [features.groups]"
            )
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in common.items()
        if key in ("tower_hidden", "embedding_dim", "dropout", "members", "balance")
    }
    if spec.unshared and common.get("expert_groups"):
        raise ValueError(f"{place}.expert_groups: not with {name}, whose experts share nothing")
    layers = list(spec.layers)
    if "gate_dropout" in common:
        layers = [replace(layer, gate_dropout=common["gate_dropout"]) for layer in layers]
    if "expert_kinds" in common:
        layers = [replace(layer, kinds=tuple(common["expert_kinds"])) for layer in layers]
    if common.get("expert_groups"):
        by_expert = tuple(tuple(patterns[group]) for group in common["expert_groups"])
        layers[0] = replace(layers[0], groups=by_expert)
    return replace(spec, layers=tuple(layers), **chosen)


def _check(place: str, value: Any, default: Any) -> None:
    """Raise ValueError unless the value has the type and range of the key."""

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number >= 1

    key = place.rsplit(".", 1)[-1]
    if key in ("expert_kinds", "expert_groups"):
        fits = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        fits, allowed = fits and len(value) > 0, "a list of names"
    elif isinstance(default, tuple):
        fits = isinstance(value, list | tuple) and all(whole(v) for v in value)
        fits = fits and (len(value) > 0 or key == "tower_hidden")
        allowed = "a list of whole numbers of at least 1"
    elif key == "shared_experts":
        fits, allowed = whole(value) or value == 0, "a whole number of at least 0"
    elif isinstance(default, int):
        fits, allowed = whole(value), "a whole number of at least 1"
    else:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
        allowed = "a number from 0 to below 1"
    if not fits:
        raise ValueError(f"{place}: found {value!r} ({type(value).__name__}); allowed: {allowed}")


def _expert_per_objective(objectives: int, expert_hidden: Sequence[int]) -> RankerSpec:
    """One expert per objective, with shared embeddings."""
    layer = LayerSpec(
        visible=_own_visible(objectives, 1), reads=(0,) * objectives, hidden=tuple(expert_hidden)
    )
    return RankerSpec(layers=(layer,))


def _all_visible(outputs: int, experts: int) -> Mask:
    return ((True,) * experts,) * outputs


def _own_visible(objectives: int, experts: int, shared: int = 0) -> Mask:
    """Each objective uses its own `experts` and the shared ones, which come last."""
    return tuple(
        tuple(own == t for own in range(objectives) for _ in range(experts)) + (True,) * shared
        for t in range(objectives)
    )


def _reads(depth: int, experts: int) -> tuple[int, ...]:
    """A first layer reads the rows; above it, expert e reads stream e."""
    return tuple(range(experts)) if depth else (0,) * experts
