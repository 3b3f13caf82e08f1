"""The models against naive loops over the papers' equations, with the same weights."""

from __future__ import annotations

import doctest
import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from mtl_ranker.models.embedding import FeatureEmbedding, PiecewiseLinear, RowInput
from mtl_ranker.models.experts import MultilayerBank, TuckerBank
from mtl_ranker.models.gates import FixedGates, SoftmaxGates, StitchGates, TopKGates
from mtl_ranker.models.presets import (
    PRESETS,
    adatt,
    cgc,
    cross_stitch,
    l2_constrained,
    linear,
    make,
    mmoe,
    omoe,
    ple,
    shared_bottom,
    single_task,
    sparse_mmoe,
    tensor_factorisation,
)
from mtl_ranker.models.ranker import Ranker
from mtl_ranker.models.spec import LayerSpec, RankerSpec

B = 32
NAMES = ["user_city", "item_kind", "item_tags", "user_age", "item_age"]


def make_ranker(spec: RankerSpec, **more) -> Ranker:
    numerics = PiecewiseLinear([[0.0, 0.5, 1.0], [-1.0, 1.0]], [True, False])
    width = 4 * (spec.objectives if spec.unshared else 1)
    embedding = FeatureEmbedding([5, 3], [(4, 2)], numerics, width, NAMES)
    return Ranker(spec, embedding, **more).eval()


def make_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    categorical = torch.stack(
        [torch.randint(0, 5, (B,), generator=rng), torch.randint(0, 3, (B,), generator=rng)], 1
    )
    bags = torch.randint(0, 4, (B, 2), generator=rng)
    numeric = torch.randn(B, 2, generator=rng)
    numeric[0, 0] = float("nan")
    return categorical, bags, numeric


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.where(np.isinf(z), 0.0, np.exp(z - z.max()))
    return e / e.sum()


def naive_expert(bank, e: int, x: np.ndarray) -> np.ndarray:
    """Expert e of a bank on one input, by its paper's equation."""
    kind = type(bank).__name__
    if kind in ("MultilayerBank", "TuckerBank"):
        for layer in range(len(bank.biases)):
            if kind == "TuckerBank":
                core = array(bank.cores[layer])
                outer, inner, mix = (array(m) for m in bank.modes[layer])
                w = np.zeros((len(outer), len(inner)))
                for a in range(core.shape[0]):
                    for b in range(core.shape[1]):
                        for c in range(core.shape[2]):
                            w += core[a, b, c] * mix[e, c] * np.outer(outer[:, a], inner[:, b])
            else:
                w = array(bank.weights[layer])[e]
                if layer == 0 and bank.mask is not None:
                    w = w * array(bank.mask)[e]
            x = np.maximum(w @ x + array(bank.biases[layer])[e], 0)
        return x
    if bank.mask is not None:
        x = x * array(bank.mask)[e]
    if kind == "CrossBank":
        h = x
        for down, up, shift in zip(bank.down, bank.up, bank.shift, strict=True):
            h = x * (array(up)[e] @ (array(down)[e] @ h) + array(shift)[e]) + h
        return np.maximum(array(bank.last.weight)[e] @ h + array(bank.last.bias)[e], 0)
    v = array(bank.factors)[e]
    pooled = np.zeros(v.shape[1])
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            pooled += x[i] * x[j] * v[i] * v[j]
    return np.maximum(array(bank.last.weight)[e] @ pooled + array(bank.last.bias)[e], 0)


def naive_gates(layer, o: int, streams: list[np.ndarray], row: np.ndarray) -> np.ndarray:
    """Expert weights of output o, for one row."""
    gates, spec = layer.gates, layer.spec
    inputs = streams[spec.gate_reads[o]] if spec.gate_reads else row
    if isinstance(gates, FixedGates):
        weights = array(gates.visible)[o].astype(float)
    elif isinstance(gates, StitchGates):
        weights = array(gates.weight)[o]
    else:
        z = array(gates.weight)[0 if spec.gate == "tied" else o] @ inputs
        z = np.where(array(gates.visible)[o] > 0, z, -np.inf)
        if isinstance(gates, TopKGates):
            z = np.where(z >= np.sort(z)[-spec.top_k], z, -np.inf)
        weights = softmax(z)
    if layer.native is not None:
        weights = weights + array(layer.native)[o] * array(layer.native_mask)[o]
    return weights


def naive(ranker: Ranker, rows: tuple[torch.Tensor, ...]) -> np.ndarray:
    """y_k = h^k(Σ_i g^k(x)_i f_i(x)), one row, layer, expert and objective at a time, in NumPy."""
    inputs = array(ranker.embedding(*rows).row())
    out = np.zeros((len(inputs), ranker.spec.objectives))
    for b, row in enumerate(inputs):
        streams = [row] if ranker.layers else [row] * ranker.spec.objectives
        for layer in ranker.layers:
            place = {}
            kinds = [layer.spec.kinds[e % len(layer.spec.kinds)] for e in range(layer.spec.experts)]
            for bank, kind in zip(layer.banks, dict.fromkeys(kinds), strict=True):
                place |= {
                    e: (bank, n) for n, e in enumerate(e for e, k in enumerate(kinds) if k == kind)
                }
            outputs = [
                naive_expert(*place[e], streams[layer.spec.reads[e]]) for e in range(len(kinds))
            ]
            weights = [naive_gates(layer, o, streams, row) for o in range(len(layer.spec.visible))]
            streams = [sum(w[e] * outputs[e] for e in range(len(outputs))) for w in weights]
        for k, h in enumerate(streams):
            layers = list(zip(ranker.towers.weights, ranker.towers.biases, strict=True))
            for depth, (w, c) in enumerate(layers):
                h = array(w[k]) @ h + array(c[k])
                h = np.maximum(h, 0) if depth < len(layers) - 1 else h
            out[b, k] = h[0]
    return out


GROUPS = {"user": ("user_*",), "item": ("item_*",)}
SPECS = {
    "single_task": single_task(3, [8]),
    "shared_bottom": shared_bottom(3, [8, 6]),
    "omoe": omoe(3, 4, [8, 6]),
    "mmoe": mmoe(3, 4, [8]),
    "mmoe deep": mmoe(2, 5, [8, 8]),
    "mmoe stacked": mmoe(3, 4, [8], layers=3),
    "sparse_mmoe": sparse_mmoe(3, 6, 2, [8, 6]),
    "cgc": cgc(3, 2, 2, [8]),
    "ple": ple(3, 2, 1, [8], layers=3),
    "cross_stitch": cross_stitch(3, [8, 6]),
    "l2_constrained": l2_constrained(3, [8]),
    "tensor_factorisation": tensor_factorisation(3, [8, 6]),
    "adatt": adatt(3, 2, 2, [8], layers=2),
    "adatt-sp": adatt(3, 1, 0, [8], layers=2),
    "linear": linear(3),
    "kinds": make("m", {"preset": "mmoe", "experts": 5, "expert_kinds": ["mlp", "cross", "fm"]}, 3),
    "groups": make("m", {"preset": "mmoe", "expert_groups": ["user", "item", "all"]}, 3, GROUPS),
    "kinds and groups": make(
        "m",
        {"preset": "mmoe", "expert_kinds": ["fm", "cross"], "expert_groups": ["user", "all"]},
        3,
        GROUPS,
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_equals_the_equations_in_loops(name):
    torch.manual_seed(1)
    ranker, rows = (
        make_ranker(replace(SPECS[name], tower_hidden=(4,) if SPECS[name].layers else ())),
        make_rows(),
    )
    with torch.no_grad():  # as after some training: no gate at its symmetric start
        for parameter in ranker.layers.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    np.testing.assert_allclose(array(ranker(*rows))[0], naive(ranker, rows), atol=1e-5)


def test_mmoe_with_one_expert_is_shared_bottom():
    torch.manual_seed(1)
    bottom = make_ranker(shared_bottom(3, [8]))
    one = make_ranker(mmoe(3, 1, [8]))
    one.load_state_dict(bottom.state_dict())
    torch.testing.assert_close(one(*make_rows()), bottom(*make_rows()))


def test_omoe_is_mmoe_with_tied_gates():
    torch.manual_seed(1)
    single = make_ranker(omoe(3, 4, [8]))
    many = make_ranker(mmoe(3, 4, [8]))
    state = single.state_dict()
    state["layers.0.gates.weight"] = state["layers.0.gates.weight"].repeat(3, 1, 1)
    many.load_state_dict(state)
    torch.testing.assert_close(many(*make_rows()), single(*make_rows()))


@pytest.mark.parametrize("layers", [1, 2])
def test_ple_without_shared_experts_is_single_task(layers):
    torch.manual_seed(1)
    alone = make_ranker(ple(3, 1, 0, [8], layers=layers))
    single = make_ranker(replace(single_task(3, [8] * layers), unshared=False))
    state = {k: v for k, v in alone.state_dict().items() if "layers" not in k}
    state |= {k: v for k, v in single.state_dict().items() if "gates" in k}
    for depth in range(layers):
        for part in ("weights", "biases"):
            state[f"layers.0.banks.0.{part}.{depth}"] = alone.state_dict()[
                f"layers.{depth}.banks.0.{part}.0"
            ]
    single.load_state_dict(state)
    torch.testing.assert_close(single(*make_rows()), alone(*make_rows()))


def test_one_layer_of_ple_is_cgc():
    assert ple(3, 2, 2, layers=1) == cgc(3, 2, 2)


def test_sparse_gating_of_all_experts_is_dense():
    torch.manual_seed(1)
    sparse = make_ranker(sparse_mmoe(3, 4, 4, [8]))
    torch.nn.init.normal_(sparse.layers[0].gates.weight)
    dense = make_ranker(mmoe(3, 4, [8]))
    state = {k: v for k, v in sparse.state_dict().items() if "noise" not in k}
    dense.load_state_dict(state)
    torch.testing.assert_close(dense(*make_rows()), sparse(*make_rows()))


def test_sparse_gating_computes_only_the_chosen_experts():
    """An expert with NaN weights has no effect on rows for which no gate selects it."""
    torch.manual_seed(1)
    ranker = make_ranker(sparse_mmoe(2, 6, 2, [8]))
    torch.nn.init.normal_(ranker.layers[0].gates.weight)
    weights = ranker.expert_weights(*make_rows())[0]
    assert ((weights > 0).sum(-1) == 2).all()
    untouched = (weights[:, :, 0] == 0).all(1)
    assert 0 < untouched.sum() < B
    with torch.no_grad():
        ranker.layers[0].banks[0].weights[0][0] = float("nan")
    assert torch.isfinite(ranker(*make_rows())[0, untouched]).all()
    assert torch.isnan(ranker(*make_rows())[0, ~untouched]).any()


def test_permuting_experts_and_gates_changes_nothing():
    torch.manual_seed(1)
    ranker = make_ranker(mmoe(2, 4, [8]))
    before = ranker(*make_rows())
    order = torch.tensor([2, 0, 3, 1])
    layer = ranker.layers[0]
    with torch.no_grad():
        for parameters in (layer.banks[0].weights, layer.banks[0].biases):
            for parameter in parameters:
                parameter.copy_(parameter[order].clone())
        layer.gates.weight.copy_(layer.gates.weight[:, order].clone())
    torch.testing.assert_close(ranker(*make_rows()), before)


def test_single_task_objectives_have_no_parameter_in_common():
    torch.manual_seed(1)
    ranker = make_ranker(single_task(3, [8]))
    ranker(*make_rows())[..., 1].sum().backward()
    axes = ranker.objective_axes()
    for name, parameter in ranker.named_parameters():
        has_gradient = [part.abs().sum() > 0 for part in parameter.grad.chunk(3, axes[name])]
        assert has_gradient == [False, True, False], name


@pytest.mark.parametrize("name", SPECS)
def test_every_expert_starts_different_and_gets_a_gradient(name):
    torch.manual_seed(1)
    ranker = make_ranker(SPECS[name]).train()
    ranker(*make_rows()).square().sum().backward()
    for layer in ranker.layers:
        for bank in layer.banks:
            weights = list(bank.parameters())
            if isinstance(bank, MultilayerBank):
                weights = bank.layer_weights()
            first = weights[0]
            if first.shape[0] > 1:
                assert torch.pdist(first.flatten(1)).min() > 1e-3
            if not isinstance(bank, TuckerBank):
                gradient = next(iter(bank.parameters())).grad
                assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_members_are_different_networks_that_share_the_first_product():
    torch.manual_seed(1)
    ranker = make_ranker(replace(mmoe(2, 3, [8]), members=4))
    rows = make_rows()
    logits = ranker(*rows)
    assert logits.shape == (4, B, 2)
    assert torch.pdist(logits.flatten(1)).min() > 1e-3
    bank, layer = ranker.layers[0].banks[0], ranker.layers[0]
    x = ranker.embedding(*rows).row()
    for m in range(4):
        product = torch.einsum("bi,ehi->ebh", x, bank.weights[0])
        h = torch.relu(product * bank.signs[:, m].mT + bank.biases[0][:, m].mT)
        gate = torch.softmax(torch.einsum("bi,oei->obe", x, layer.gates.weight), -1)
        mixture = torch.einsum("obe,ebh->obh", gate, h)
        tower = [
            torch.relu(
                mixture[t] @ ranker.towers.weights[0][t * 4 + m].T
                + ranker.towers.biases[0][t * 4 + m]
            )
            @ ranker.towers.weights[1][t * 4 + m].T
            + ranker.towers.biases[1][t * 4 + m]
            for t in range(2)
        ]
        torch.testing.assert_close(logits[m], torch.cat(tower, 1), atol=1e-5, rtol=1e-4)


def test_experts_see_only_their_group_of_features():
    torch.manual_seed(1)
    spec = make("m", {"preset": "mmoe", "expert_groups": ["user", "item"]}, 1, GROUPS)
    layer = make_ranker(spec).layers[0]
    embedding = make_ranker(spec).embedding
    row = embedding(*make_rows()).row()
    changed = row.clone()
    changed[:, embedding.columns_of(("item_*",))] += 1.0
    empty = torch.zeros(B, 0)
    one, two = (layer.banks[0](RowInput(x, empty)) for x in (row, changed))
    torch.testing.assert_close(one[[0, 2]], two[[0, 2]])
    assert (one[[1, 3]] - two[[1, 3]]).abs().max() > 0
    with pytest.raises(ValueError, match="match none of the features"):
        embedding.columns_of(("nothing_*",))


def test_a_position_bias_is_added_only_for_known_positions():
    torch.manual_seed(1)
    ranker = make_ranker(mmoe(2, 3, [8]), positions=5)
    torch.nn.init.normal_(ranker.position_bias.logits.weight)
    rows = make_rows()
    unknown, third = torch.full((B,), -1), torch.full((B,), 2)
    plain = ranker(*rows)
    assert (ranker(*rows, third) - plain).abs().min() > 0
    torch.testing.assert_close(
        ranker(*rows, third) - plain, ranker.position_bias.logits.weight[3].expand(1, B, 2)
    )
    with torch.no_grad():
        ranker.position_bias.logits.weight[0] = 0.0
    torch.testing.assert_close(ranker(*rows, unknown), plain)
    ranker.position_bias.train()
    ranker.position_bias.dropout = 1.0
    torch.testing.assert_close(ranker(*rows, third), plain)


def test_gates_are_distributions_over_visible_experts():
    torch.manual_seed(1)
    visible = ((True, True, False), (False, True, True))
    ranker = make_ranker(
        RankerSpec(layers=(LayerSpec(visible=visible, reads=(0, 0, 0), hidden=(8,)),))
    )
    weights = ranker.expert_weights(*make_rows())[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, 2))
    assert (weights[:, 0, 2] == 0).all()
    assert (weights[:, 1, 0] == 0).all()


def test_gate_dropout_leaves_a_distribution():
    gates = SoftmaxGates(4, torch.ones(2, 3, dtype=torch.bool), [0, 0], dropout=0.5).train()
    weights = gates(RowInput(torch.randn(200, 4), torch.zeros(200, 0))).weights
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 1, 200))
    assert ((weights == 0).sum(2) == 2).float().mean() > 0.3


@pytest.mark.slow
def test_top_k_load_is_the_chance_of_being_kept():
    """Against a simulation of the noise (Shazeer et al., eq. 8), averaged over the noise."""
    torch.manual_seed(0)
    gates = TopKGates(3, torch.ones(1, 4, dtype=torch.bool), [0], k=2).train()
    torch.nn.init.normal_(gates.weight)
    x = RowInput(torch.randn(1, 3), torch.zeros(1, 0))
    loads = torch.stack([gates(x).load for _ in range(2000)]).mean(0)[0]
    kept = torch.stack([(gates(x).weights[0, 0, :, 0] > 0).float() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(loads, kept, atol=0.05, rtol=0)


def test_ablated_experts_get_no_weight():
    torch.manual_seed(1)
    ranker = make_ranker(mmoe(2, 3, [8]))
    rows = make_rows()
    ablated = ranker.trace(*rows, ablated={0: [1]})
    weights = ablated.gates[0].weights
    assert (weights[:, :, 1] == 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 1, B))
    with torch.no_grad():
        ranker.layers[0].banks[0].weights[0][1] += 5.0
    torch.testing.assert_close(ranker.trace(*rows, ablated={0: [1]}).logits, ablated.logits)


def test_l2_penalty_is_the_sum_over_pairs_of_experts():
    torch.manual_seed(1)
    ranker = make_ranker(l2_constrained(3, [8], l2_weight=0.5))
    bank = ranker.layers[0].banks[0]
    expected = sum(
        float((p[s] - p[t]).detach().square().sum())
        for p in (*bank.weights, *bank.biases)
        for s in range(3)
        for t in range(s)
    )
    penalty = ranker.penalty(ranker.trace(*make_rows())).detach()
    assert float(penalty) == pytest.approx(0.5 * expected, rel=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_export_and_json_round_trip_give_the_same_scores(name):
    import json
    from dataclasses import asdict

    torch.manual_seed(1)
    ranker, rows = make_ranker(SPECS[name]), make_rows()
    assert RankerSpec.from_dict(json.loads(json.dumps(asdict(SPECS[name])))) == SPECS[name]
    program = torch.export.export(ranker, rows)
    torch.testing.assert_close(program.module()(*rows), ranker(*rows))


def test_every_preset_is_tested_and_documented():
    assert set(PRESETS) <= {name.split(" ")[0] for name in SPECS}
    for preset in PRESETS.values():
        assert preset.__doc__


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "mmo"}, "no preset 'mmo'"),
        ({"preset": "mmoe", "expert": 3}, "did you mean experts"),
        ({"preset": "mmoe", "experts": 0}, "whole number of at least 1"),
        ({"preset": "mmoe", "expert_kinds": ["tree"]}, "no kind 'tree'; allowed: mlp"),
        ({"preset": "mmoe", "expert_groups": ["users"]}, "no group 'users'; allowed: all"),
        ({"preset": "ple", "shared_experts": -1}, "at least 0"),
        ({"preset": "mmoe", "gate_dropout": 1.0}, "below 1"),
    ],
)
def test_settings_of_a_model_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        make("models.m", settings, 2)


@pytest.mark.parametrize("name", ["embedding", "experts", "gates", "towers", "trees"])
def test_docstring_examples_run(name):
    module = importlib.import_module(f"mtl_ranker.models.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
