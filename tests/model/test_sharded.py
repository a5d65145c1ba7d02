"""Models whose weights are divided over ranks: all shards are in this process, and a gather joins them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from qsparse_moe.ablation.sensitivity.estimate import estimate
from qsparse_moe.model.sharded import (
    ShardedParameter,
    gathered,
    is_sharded,
    shard_module,
    sharing_weights,
)
from qsparse_moe.model.transformer import build_model
from tests.ablation.small_models import config, rows_of

RANKS = 3
MOE = {"num_shared_experts": 1, "num_dense_layers": 1, "backend": "grouped"}


class Ranks:
    """Divides a model of this process over ``RANKS`` ranks, and watches what is gathered."""

    def __init__(self, model):
        self.calls, self.freed, self.most = [], [], 0
        self._gathered = []
        shards = {name: self._shard(name, parameter) for name, parameter in model.named_parameters()}
        by_parameter = {parameter: shards[name] for name, parameter in model.named_parameters()}
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            shard_module(module, {name: by_parameter[parameter] for name, parameter in own.items()})

    def _shard(self, name, parameter):
        flat = parameter.detach().flatten().clone()
        size = -(-len(flat) // RANKS)
        padded = torch.cat((flat, flat.new_full((size * RANKS - len(flat),), 7.0)))

        class Gather:
            def __call__(_, shard):
                assert torch.equal(shard, padded[size : 2 * size])
                self.calls.append(name)
                whole = padded.clone()
                self._gathered.append((len(flat), StorageWeakRef(whole.untyped_storage())))
                self.most = max(self.most, self.num_held())
                return whole

            def free(_, whole):
                # As if it were used again at once.
                self.freed.append(name)
                whole.fill_(-7.0)

        return ShardedParameter(padded[size : 2 * size].clone(), parameter.shape, Gather())

    def num_held(self):
        """Number of elements of gathered parameters whose memory is still in use, also by a graph."""
        return sum(size for size, storage in self._gathered if not storage.expired())


def two_models(**settings):
    made = [build_model(config(MOE, default=0.5, **settings), seed=3).eval() for _ in range(2)]
    return *made, Ranks(made[1])


def logits(model):
    (batch,) = rows_of().batches
    with torch.no_grad():
        return model(batch.tokens_BS, documents_BS=batch.documents_BS)


def test_a_divided_model_computes_the_same_bits_and_holds_the_weights_of_one_module():
    whole, divided, ranks = two_models()
    want, found = logits(whole), logits(divided)
    assert torch.equal(found.logits_BSV, want.logits_BSV)
    assert found.stats.keys() == want.stats.keys()
    assert all(torch.equal(found.stats[name], value) for name, value in want.stats.items())
    assert sorted(ranks.calls) == sorted(name for name, _ in whole.named_parameters()), "each is gathered once"
    largest = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in whole.modules())
    assert ranks.most == largest and not ranks.num_held()
    assert ranks.freed == ranks.calls, "nothing refers to what a module has used"
    assert is_sharded(divided) and not is_sharded(whole)


def test_a_released_parameter_has_its_shape_and_dtype_but_no_values_and_no_memory():
    whole, divided, _ = two_models()
    for (name, want), (_, found) in zip(whole.named_parameters(), divided.named_parameters(), strict=True):
        assert (found.shape, found.dtype, found.device) == (want.shape, want.dtype, want.device), name
        assert found.isnan().all() and found.untyped_storage().nbytes() == found.element_size()


def test_gathered_parameters_stay_for_the_block_also_while_the_module_runs():
    whole, divided, ranks = two_models()
    block = divided.layers[1]
    with gathered(block):
        first = list(ranks.calls)
        for (name, want), (_, found) in zip(whole.layers[1].named_parameters(), block.named_parameters(), strict=True):
            assert torch.equal(found, want), name
        logits(divided)
        with gathered(block.moe.experts):
            pass
        assert torch.equal(block.moe.experts.w_up, whole.layers[1].moe.experts.w_up)
    again = ranks.calls[len(first) :]
    assert first and not any(name.startswith("layers.1.") for name in again)
    assert all(parameter.isnan().all() for parameter in divided.parameters())


def test_weights_are_released_if_a_module_fails():
    _, divided, _ = two_models()
    with pytest.raises(ValueError, match="ids from 0 to 99"), torch.no_grad():
        divided(torch.tensor([[0, 99]]))
    assert all(parameter.isnan().all() for parameter in divided.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_of_another_config_shares_the_shards(tied):
    settings = config(MOE | {"dense_hidden_size": 24}, default=0.5).model_copy(update={"tie_embeddings": tied})
    whole, divided = (build_model(settings, seed=3).eval() for _ in range(2))
    Ranks(divided)
    moe = settings.moe.model_copy(update={"experts_per_token": 1})
    other = settings.model_copy(update={"moe": moe})
    twins = [sharing_weights(model, other) for model in (whole, divided)]
    assert torch.equal(logits(twins[1]).logits_BSV, logits(twins[0]).logits_BSV)
    assert not torch.equal(logits(twins[0]).logits_BSV, logits(whole).logits_BSV)
    assert torch.equal(logits(divided).logits_BSV, logits(whole).logits_BSV)


def test_the_estimate_of_a_divided_model_has_the_same_bits_and_holds_the_weights_of_a_layer():
    whole, divided, ranks = two_models()
    want, found = (estimate(model, rows_of(), (0.25, 0.75), draws=2) for model in (whole, divided))
    for cell, first in want.first.items():
        assert first.any() or want.second[cell].any(), cell
        assert (found.first[cell] == first).all() and (found.second[cell] == want.second[cell]).all(), cell
    layers = [sum(p.numel() for p in block.parameters()) for block in whole.layers]
    rest = sum(p.numel() for p in whole.parameters()) - sum(layers)
    # The graph keeps the head and the last norm; a layer is computed again for its part of the backward pass.
    assert ranks.most < max(layers) + rest < sum(layers)
    gc.collect()
    assert not ranks.num_held() and not ranks.freed and divided.activation_checkpointing == "none"
