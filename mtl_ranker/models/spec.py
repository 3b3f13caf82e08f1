"""The specification of a model: its layers, and the settings of towers and embeddings.

Without torch, so that a mistake in the project file is reported before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

EXPERT_KINDS = ("mlp", "tucker", "cross", "fm")  # see `BANKS` in models/experts.py
Mask = tuple[tuple[bool, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """The specification of one layer of E experts and O outputs.

    Attributes:
        visible: [O][E], which experts output o may use.
        reads: [E], which stream expert e reads; all 0 in a first layer, which reads the rows.
        hidden: units of the experts' layers; the last is H.
        gate: softmax, tied (one gate for all outputs), top_k (noisy), or stitch (constants).
        gate_reads: [O], which stream the gate of output o reads; empty: the rows.
        native: [O][E], the native experts of output o, added with learned native weights (AdaTT).
        kinds: kinds of experts, repeated cyclically: mlp, cross, fm or tucker.
        groups: patterns of the features that experts use, repeated cyclically; empty: all.
        top_k: experts per row, for gate = top_k.
        gate_dropout: see SoftmaxGates.
    """

    visible: Mask
    reads: tuple[int, ...]
    hidden: tuple[int, ...] = (64,)
    gate: str = "softmax"
    gate_reads: tuple[int, ...] = ()
    native: Mask = ()
    kinds: tuple[str, ...] = ("mlp",)
    groups: tuple[tuple[str, ...], ...] = ()
    top_k: int = 0
    gate_dropout: float = 0.0

    @property
    def experts(self) -> int:
        return len(self.reads)


@dataclass(frozen=True, kw_only=True)
class RankerSpec:
    """The specification of a model; `presets.py` has those of the published models.

    Attributes:
        layers: mixture layers, the last with one output per objective; none for a linear model.
        tower_hidden: units of the towers' hidden layers.
        embedding_dim: D.
        dropout: on experts' and towers' units.
        members: K members of an ensemble inside the network (TabM); the prediction is their mean.
        balance: weight of the penalty on unevenly used experts.
        l2_weight: weight of the penalty on the distance of experts (Duong et al., ACL 2015).
        unshared: the objectives share nothing, embeddings included; expert t is objective t's.
        linear: T of a linear model, whose logits are linear in embeddings and encoded numbers.
    """

    layers: tuple[LayerSpec, ...]
    tower_hidden: tuple[int, ...] = (16,)
    embedding_dim: int = 8
    dropout: float = 0.1
    members: int = 1
    balance: float = 0.0
    l2_weight: float = 0.0
    unshared: bool = False
    linear: int = 0

    @property
    def objectives(self) -> int:
        return self.linear or len(self.layers[-1].visible)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RankerSpec:
        """The inverse of `dataclasses.asdict`, also after a round trip through JSON."""

        def frozen(value: Any) -> Any:
            return tuple(frozen(v) for v in value) if isinstance(value, list | tuple) else value

        names = {f.name for f in fields(LayerSpec)}
        layers = tuple(
            LayerSpec(**{k: frozen(v) for k, v in layer.items() if k in names})
            for layer in content["layers"]
        )
        rest = {k: frozen(v) for k, v in content.items() if k != "layers"}
        return cls(layers=layers, **rest)
