"""Experts made of a dense network of a few numbers: which slice each has, its noise, and the rows of the router."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.interop.upcycling import UpcycledWeights, upcycled_for_run
from qsparse_moe.interop.upcycling_rules import Upcycling, upcycling_of

WIDTH, HIDDEN, LAYERS = 4, 6, 2


def model(**moe):
    sizes = {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": 2, "vocab_size": 9, "init_std": 0.5}
    return ModelConfig.model_validate(sizes | {"moe": moe})


DENSE = model(num_dense_layers=LAYERS, dense_hidden_size=HIDDEN)


def source_of(dtype=torch.float32):
    tensors = {"embedding.weight": torch.ones(9, WIDTH)}
    for layer in range(LAYERS):
        for place, (name, shape) in enumerate({"w_gate": (4, 6), "w_up": (4, 6), "w_down": (6, 4)}.items()):
            values = torch.arange(24.0).view(shape) + 1000 * layer + 100 * place
            tensors[f"layers.{layer}.dense.{name}"] = values.to(dtype)
    return SimpleNamespace(
        kind="run", path=Path("dense"), step=7, model_file="f", model=DENSE, tokenizer="bytes",
        shapes={name: tuple(value.shape) for name, value in tensors.items()}, tensor=tensors.__getitem__,
        checksums=lambda part, parts: {"sum": part + 10 * parts},
    )  # fmt: skip


def experts(hidden=3, *, number=4, per_token=2, dtype=torch.float32, **options):
    moe = {"num_experts": number, "experts_per_token": per_token, "expert_hidden_size": hidden}
    moe |= {"bias_update_rate": options.pop("bias", 0.0), "num_dense_layers": options.pop("num_dense", 0)}
    return UpcycledWeights(source_of(dtype), model(**moe), **options)


def test_an_expert_is_a_slice_of_a_copy_and_its_features_are_columns_of_gate_and_up_and_rows_of_down():
    made, dense = experts(), source_of()
    for name in ("w_gate", "w_up"):
        whole, matrix = made.tensor(f"layers.1.moe.experts.{name}"), dense.tensor(f"layers.1.dense.{name}")
        assert torch.equal(whole, torch.stack([matrix[:, :3], matrix[:, 3:], matrix[:, :3], matrix[:, 3:]]))
    down = dense.tensor("layers.0.dense.w_down")
    assert torch.equal(made.tensor("layers.0.moe.experts.w_down"), torch.stack([down[:3], down[3:]] * 2))
    copies = experts(HIDDEN, number=3).tensor("layers.0.moe.experts.w_down")
    assert torch.equal(copies, torch.stack([down] * 3))
    assert torch.equal(made.tensor("embedding.weight"), torch.ones(9, WIDTH))


def test_shapes_are_those_of_experts_and_routers_where_a_layer_has_them():
    made = experts(bias=0.1, num_dense=1)
    assert made.shapes == {
        "embedding.weight": (9, 4),
        "layers.0.dense.w_gate": (4, 6),
        "layers.0.dense.w_up": (4, 6),
        "layers.0.dense.w_down": (6, 4),
        "layers.1.moe.experts.w_gate": (4, 4, 3),
        "layers.1.moe.experts.w_up": (4, 4, 3),
        "layers.1.moe.experts.w_down": (4, 3, 4),
        "layers.1.moe.router.weight": (4, 4),
        "layers.1.moe.router.expert_bias": (4,),
    }
    assert made.tensor("layers.1.moe.router.expert_bias").tolist() == [0.0] * 4
    assert "layers.1.moe.router.expert_bias" not in experts().shapes
    assert (made.kind, made.step, made.model_file, made.model, made.tokenizer) == ("run", 7, "f", DENSE, "bytes")
    assert made.checksums(part=1, parts=2) == {"sum": 21}


def test_slices_of_a_copy_have_equal_router_rows_and_copies_layers_and_seeds_have_others():
    made = experts(seed=3)
    rows = made.tensor("layers.0.moe.router.weight")
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3]) and not torch.equal(rows[1], rows[2])
    assert torch.equal(rows, experts(seed=3).tensor("layers.0.moe.router.weight"))
    assert not torch.equal(rows, made.tensor("layers.1.moe.router.weight"))
    assert not torch.equal(rows, experts(seed=4).tensor("layers.0.moe.router.weight"))
    many = experts(HIDDEN, number=4000).tensor("layers.0.moe.router.weight")
    assert float(many.std()) == pytest.approx(0.5, rel=0.03) and float(many.mean()) == pytest.approx(0.0, abs=0.02)


def test_noise_is_relative_to_the_mean_square_of_the_matrix_of_an_expert_and_reaches_its_share():
    name = "layers.1.moe.experts.w_up"
    plain = experts(number=2000, per_token=2).tensor(name)
    noisy = experts(number=2000, per_token=2, noise=0.1, noise_share=0.25).tensor(name)
    difference = noisy - plain
    changed = difference != 0
    assert float(changed.float().mean()) == pytest.approx(0.25, abs=0.02)
    for half in (0, 1):
        own = difference[half::2][changed[half::2]]
        rms = float(plain[half].square().mean().sqrt())
        assert float(own.std()) == pytest.approx(0.1 * rms, rel=0.05)
    assert not torch.equal(difference[0], difference[2]), "each expert has its own"
    again = experts(number=2000, per_token=2, noise=0.1, noise_share=0.25)
    assert torch.equal(again.tensor(name), noisy)
    assert again.tensor("layers.0.moe.experts.w_up").shape == plain.shape
    everywhere = experts(noise=0.1).tensor(name)
    assert bool((everywhere != experts().tensor(name)).all())
    half_precision = experts(noise=0.1, dtype=torch.bfloat16).tensor(name)
    assert half_precision.dtype == torch.bfloat16


def test_a_run_makes_experts_only_where_it_has_some_and_the_weights_have_none():
    source = source_of()
    dense_run = SimpleNamespace(model=DENSE, training=SimpleNamespace(seed=5))
    assert upcycled_for_run(source, dense_run) is source
    with_experts = model(num_experts=2, expert_hidden_size=HIDDEN, router="softmax_topk_renormalized")
    has_some = SimpleNamespace(model=with_experts)
    run = SimpleNamespace(model=with_experts, training=SimpleNamespace(seed=5))
    assert upcycled_for_run(has_some, run) is has_some
    made = upcycled_for_run(source, run)
    router = "layers.0.moe.router.weight"
    want = UpcycledWeights(source, with_experts, seed=5).tensor(router)
    assert torch.equal(made.tensor(router), want)


def test_the_experts_of_an_import_are_a_model_with_their_number_and_the_factor_that_keeps_the_sum():
    cut = Upcycling(8, 4, "slices", 2, noise=0.5, noise_share=1.0)
    made = cut.model(DENSE)
    moe = made.moe
    assert (moe.num_experts, moe.experts_per_token, moe.expert_hidden_size) == (8, 4, 3)
    assert (moe.router, moe.router_scaling_factor) == ("softmax_topk_renormalized", 2.0)
    assert (moe.num_dense_layers, moe.dense_hidden_size, made.hidden_size) == (0, None, WIDTH)
    assert Upcycling(4, 4).model(DENSE).moe.expert_hidden_size == HIDDEN
    assert [Upcycling(6, 3, how).num_slices for how in ("copies", "slices")] == [1, 3]


def test_options_of_an_import_take_their_defaults_where_they_are_none():
    assert upcycling_of(None, noise=None, slices=None) is None
    assert upcycling_of(4, experts_per_token=None, noise=None) == Upcycling(4, 2)
    found = upcycling_of(4, experts_per_token=4, upcycle="slices", noise=0.1, noise_share=0.25)
    assert found == Upcycling(4, 4, "slices", None, 0.1, 0.25)
