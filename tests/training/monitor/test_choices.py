"""Agreement of the experts that tokens choose in two evaluations."""

import logging

import pytest
import torch

from qsparse_moe.config.schema import ModelConfig, MoEConfig
from qsparse_moe.model.transformer import build_model
from qsparse_moe.moe.router import UNUSED
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.monitor.choices import ChoiceAgreement, num_common

ALONE = Distributed(0, 1, 0, torch.device("cpu"))
MODEL = ModelConfig(num_layers=3, hidden_size=16, num_heads=2, vocab_size=32, moe=MoEConfig(num_dense_layers=1))


def test_choices_count_whatever_their_order():
    one = torch.tensor([[0, 1], [2, 3], [4, 5]])
    other = torch.tensor([[1, 0], [3, 7], [6, 7]])
    assert num_common(one, other) == 3


def test_choices_that_are_not_used_do_not_count_and_a_layer_without_experts_has_no_fraction():
    memory, counts_T = ChoiceAgreement([], ALONE), torch.tensor([True, True])
    # Three choices are used now, of which the earlier evaluation has two; in the second layer there are none.
    before = [[torch.tensor([[0, 1], [2, UNUSED]])], [torch.tensor([[0, 1], [2, 3]])]]
    now = [[torch.tensor([[1, UNUSED, UNUSED], [3, 2, UNUSED]])], [torch.empty(2, 0, dtype=torch.int16)]]
    assert memory.compare(before, counts_T) is None
    first, second = memory.compare(now, counts_T).tolist()
    assert first == pytest.approx(2 / 3) and second != second


def test_the_agreement_is_a_fraction_of_the_counted_tokens():
    memory = ChoiceAgreement([], ALONE)
    counts_T = torch.tensor([True, True, False])
    first = [[torch.tensor([[0, 1]]), torch.tensor([[2, 3], [4, 5]])]]
    second = [[torch.tensor([[0, 1]]), torch.tensor([[3, 6], [7, 0]])]]
    assert memory.compare(first, counts_T) is None
    assert memory.compare(second, counts_T).tolist() == [0.75]
    assert memory.compare(second, counts_T).tolist() == [1.0]


def test_every_layer_has_its_own_fraction_of_the_choices_of_all_ranks():
    class Two(Distributed):
        """The other rank has 5 and 1 common choices in the two layers, of 6."""

        def all_reduce(self, tensor):
            assert tensor.dtype == torch.float64
            return tensor + torch.tensor([[5.0, 1.0], [6.0, 6.0]])

    memory = ChoiceAgreement([], Two(0, 2, 0, torch.device("cpu")))
    counts_T = torch.tensor([True, False, True, True])
    before = [[torch.tensor([[0, 1], [2, 3]]), torch.tensor([[4, 5], [6, 7]])]] * 2
    after = [
        [torch.tensor([[1, 0], [2, 3]]), torch.tensor([[4, 0], [1, 2]])],
        [torch.tensor([[0, 7], [2, 3], [5, 4]]), torch.tensor([[7, 6]])],
    ]
    memory.compare(before, counts_T)
    # 3 and 5 of 6 choices of this rank; the second token does not count.
    assert memory.compare(after, counts_T).tolist() == [8 / 12, 6 / 12]
    assert [choices.tolist() for choices in memory.state_dict()["choices"]] == [
        [[1, 0], [4, 0], [1, 2]], [[0, 7], [5, 4], [7, 6]],
    ]  # fmt: skip


def test_every_router_has_a_hook_during_the_evaluation_only():
    model, tokens_BS = build_model(MODEL, seed=0).eval(), torch.randint(0, 32, (2, 8))
    memory = ChoiceAgreement(model.routers(), ALONE)
    for expected in (None, [1.0, 1.0]):
        with memory.record() as seen:
            model(tokens_BS[:1])
            model(tokens_BS[1:])
        found = memory.compare(seen, torch.ones(16, dtype=torch.bool))
        assert (found if found is None else found.tolist()) == expected
    assert [choices.shape for choices in seen[0]] == [(8, 2), (8, 2)]
    assert {choices.dtype for layer in seen for choices in layer} == {torch.int16}, "2 bytes per choice"
    with pytest.raises(RuntimeError), memory.record():
        raise RuntimeError
    assert all(router.hook is None for router in model.routers())
    torch.nn.init.normal_(model.routers()[0].weight)
    with memory.record() as seen:
        model(tokens_BS)
    agreement_L = memory.compare(seen, torch.ones(16, dtype=torch.bool))
    assert 0 <= agreement_L[0] < 1


def test_model_without_experts_has_none():
    model = build_model(MODEL.model_copy(update={"moe": MoEConfig(num_dense_layers=3)}))
    memory = ChoiceAgreement(model.routers(), ALONE)
    for _ in range(2):
        with memory.record() as seen:
            model(torch.zeros(1, 4, dtype=torch.long))
        assert memory.compare(seen, torch.ones(4, dtype=torch.bool)) is None


def test_choices_of_a_checkpoint_are_compared_only_on_the_same_sequences_of_all_ranks(caplog):
    counts_T = torch.tensor([True, True])
    chosen = [[torch.tensor([[0, 1], [2, 3]])]]

    class OtherRankDiffers(Distributed):
        def all_gather(self, value):
            return [value, False]

    two = OtherRankDiffers(0, 2, 0, torch.device("cpu"))
    first = ChoiceAgreement([], ALONE, sequences=7)
    first.compare(chosen, counts_T)
    for distributed, sequences, want in ((ALONE, 7, [1.0]), (ALONE, 8, None), (two, 7, None)):
        resumed = ChoiceAgreement([], distributed, sequences=sequences)
        with caplog.at_level(logging.INFO):
            resumed.load_state_dict(first.state_dict())
        assert ("training.evaluation_rows" in caplog.text) == (want is None)
        found = resumed.compare(chosen, counts_T)
        assert (found if found is None else found.tolist()) == want
        caplog.clear()
