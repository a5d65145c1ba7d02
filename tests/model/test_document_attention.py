"""Attention inside of documents: the same values and gradients as with a mask of whole sequences, without its size."""

from __future__ import annotations

import inspect
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from qsparse_moe.errors import BackendUnavailable
from qsparse_moe.model import document_attention
from qsparse_moe.model.document_attention import DocumentAttention, resolve_document_backend
from qsparse_moe.model.documents import BlockSizes, bands, document_mask, document_offsets
from tests.model.small_model import RECOMPUTED, make, tokens

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
# The lengths of the documents of every sequence, 13 tokens each.
PACKED = {
    "one per sequence": [[13], [13]],
    "different borders": [[4, 9], [1, 5, 7], [13]],
    "one token each": [[1] * 13],
    "one token at the end": [[12, 1], [12, 1]],
    "short ones share a block": [[2, 2, 1, 6, 1, 1], [3, 3, 3, 3, 1]],
}


def ids(lengths_B):
    """Ids that fall and repeat: only their borders matter."""
    return torch.stack(
        [
            torch.cat([torch.full((length,), 7 - number % 2) for number, length in enumerate(lengths)])
            for lengths in lengths_B
        ]
    )


def heads(num_sequences, length, dtype=torch.float64, *, grouped=False, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(num_sequences, count, length, 8, generator=generator).to(device, dtype).requires_grad_()
        for count in (4, *([2, 2] if grouped else [4, 4]))
    ]


def with_gradients(attend, parts):
    """The output, and the gradients of queries, keys, and values for a random one of the output."""
    output = attend(*parts)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, parts, upstream)]


def masked(documents, scale):
    """The definition: scores of all pairs of tokens, in the dtype of the queries."""

    def attend(query, key, value):
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
        scores = query @ key.mT * scale
        # By hand from the borders, and not by the mask of the package.
        numbers = torch.ones_like(documents).bool()
        numbers[:, 1:] = documents[:, 1:] != documents[:, :-1]
        numbers = numbers.cumsum(1)
        allowed = (numbers[:, :, None] == numbers[:, None]) & torch.ones(scores.shape[-2:]).bool().tril()
        weights = scores.masked_fill(~allowed[:, None].to(scores.device), -torch.inf).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)

    return attend


@pytest.fixture
def small_blocks(monkeypatch):
    """Sequences of more than six tokens are divided, into blocks of at most five."""
    sizes = dict.fromkeys(document_attention._SIZES, BlockSizes(6, 5))
    monkeypatch.setattr(document_attention, "_SIZES", sizes)


@pytest.mark.parametrize("grouped", [False, True], ids=["equal heads", "grouped queries"])
@pytest.mark.parametrize("case", PACKED)
def test_values_and_all_gradients_are_those_of_the_mask(case, grouped, small_blocks):
    documents, parts = ids(PACKED[case]), heads(len(PACKED[case]), 13, grouped=grouped)
    found = with_gradients(DocumentAttention(documents, 0.3, "blocks"), parts)
    for got, want in zip(found, with_gradients(masked(documents, 0.3), parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[[100, 57], [157]], [[300, 1, 60, 60, 60, 60, 20], [61] * 9 + [12]]])
def test_the_error_at_real_sizes_is_that_of_plain_products(lengths, dtype):
    documents, wide = ids(lengths), heads(2, sum(lengths[0]), torch.float64)
    parts = [part.detach().to(dtype).requires_grad_() for part in wide]
    exact = with_gradients(masked(documents, 0.3), [part.detach().double().requires_grad_() for part in parts])
    plain, found = (
        with_gradients(attend, parts) for attend in (masked(documents, 0.3), DocumentAttention(documents, 0.3, "auto"))
    )
    for want, rounded, got in zip(exact, plain, found, strict=True):
        error, allowed = (got - want).abs().max(), 2 * (rounded - want).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * want.abs().max()


def test_a_row_of_up_to_the_limit_is_one_block_and_longer_ones_are_divided():
    documents = ids([[100, 1, 20, 8, 150, 1, 100], [380]])
    whole = bands(documents[:, :256], BlockSizes(256, 128), torch.float32)
    assert [(band.num_sequences, band.lengths) for band in whole] == [(2, [256])]
    first, second = bands(documents, BlockSizes(256, 128), torch.float32)
    assert (first.num_sequences, first.lengths, second.lengths) == (1, [121, 8, 150, 101], [380])
    assert [mask is None for mask in first.masks] == [False, True, True, False] and second.masks == [None]
    # 100 + 1 + 20: the last token of the block attends to the twenty of its own document.
    assert first.masks[0][0, 0, 120].eq(0).nonzero().flatten().tolist() == list(range(101, 121))
    assert document_offsets(documents).tolist() == [0, 100, 101, 121, 129, 279, 280, 380, 760]


def test_an_id_that_comes_back_is_another_document():
    mask = document_mask(torch.tensor([[3, 3, 5, 3]]))
    assert mask.int().tolist() == [[[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]]


class Elements(TorchDispatchMode):
    """Counts the elements of every tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple) else (result,):
            if isinstance(part, torch.Tensor):
                self.total += part.numel()
                self.largest = max(self.largest, part.numel())
        return result


def elements(attend_of, lengths):
    parts = heads(1, sum(lengths), torch.float32)
    with Elements() as counted:
        with_gradients(attend_of(ids([lengths])), parts)
    return counted


@pytest.mark.parametrize("lengths", [[1024], [512, 512], [16] * 64], ids=["one", "two", "many"])
def test_memory_is_linear_in_the_length(lengths):
    """Twice as many tokens in twice as long documents, or in twice as many of them."""
    twice = [2 * length for length in lengths] if len(lengths) < 3 else lengths * 2
    blocks = [elements(lambda documents: DocumentAttention(documents, 0.3, "auto"), x) for x in (lengths, twice)]
    whole = [elements(lambda documents: masked(documents, 0.3), x) for x in (lengths, twice)]
    assert blocks[1].largest <= 2 * blocks[0].largest and blocks[1].total <= 2.05 * blocks[0].total
    # The same count sees the mask of whole sequences.
    assert whole[1].largest == 4 * whole[0].largest


@pytest.mark.parametrize("recompute", RECOMPUTED)
def test_recomputed_layers_and_evaluation_attend_inside_of_documents(recompute, small_blocks):
    model, documents = make(num_kv_heads=2), ids(PACKED["different borders"])
    batch = tokens(3, 13)

    def step():
        model.zero_grad()
        output = model(batch, batch, documents_BS=documents)
        output.loss.backward()
        return [output.logits_BSV.detach(), *(parameter.grad for parameter in model.parameters())]

    want = step()
    model.activation_checkpointing = recompute
    assert all(map(torch.equal, step(), want))
    alone = [model.eval()(row[None]).logits_BSV for row in batch[0].split([4, 9])]
    torch.testing.assert_close(torch.cat(alone, 1), want[0][:1], rtol=1e-4, atol=1e-5)


REAL = document_attention.find_varlen_attn()


def by_sequence(
    query, key, value, offsets, offsets_of_keys, longest, longest_key, *, scale, window_size, enable_gqa=False
):
    """The result of varlen_attn, by one product per sequence."""
    assert offsets is offsets_of_keys and offsets.dtype == torch.int32 and window_size == (-1, 0)
    assert longest == longest_key == int(offsets.diff().max())
    parts = zip(*(x.transpose(0, 1).split(offsets.diff().tolist(), 1) for x in (query, key, value)), strict=True)
    mixed = [
        F.scaled_dot_product_attention(*(x[None] for x in part), is_causal=True, scale=scale, enable_gqa=enable_gqa)[0]
        for part in parts
    ]
    return torch.cat(mixed, 1).transpose(0, 1)


def as_in_2_11(query, key, value, offsets, ends, longest, longest_key, *, scale, window_size):
    """The arguments of torch 2.11, which has none for grouped queries."""
    return by_sequence(query, key, value, offsets, ends, longest, longest_key, scale=scale, window_size=window_size)


@pytest.mark.parametrize("function", [by_sequence, as_in_2_11])
@pytest.mark.parametrize("grouped", [False, True], ids=["equal heads", "grouped queries"])
def test_varlen_receives_the_documents_and_returns_the_order_of_the_output(grouped, function, monkeypatch):
    monkeypatch.setattr(document_attention, "find_varlen_attn", lambda: function)
    documents, parts = ids(PACKED["different borders"]), heads(3, 13, grouped=grouped)
    prepared = document_attention._prepare_varlen(documents, parts[0])
    found = with_gradients(lambda *heads: prepared(*heads, 0.3), parts)
    for got, want in zip(found, with_gradients(masked(documents, 0.3), parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_varlen_of_the_installed_torch_takes_these_arguments():
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(REAL).parameters else {}
    inspect.signature(REAL).bind(*range(7), scale=0.3, window_size=(-1, 0), **options)


@pytest.fixture
def cuda(monkeypatch):
    """A machine with a GPU that runs flash attention, as far as the choice asks."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    resolve_document_backend.cache_clear()
    yield monkeypatch
    resolve_document_backend.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "channels", "change", "reason"),
    [
        (torch.bfloat16, 64, None, None),
        (torch.float16, 256, None, None),
        (torch.float32, 64, None, "flash attention computes in bf16 or fp16, and the queries are in float32"),
        (torch.bfloat16, 36, None, r"the channels per head \(36\) must be a multiple of 8 and at most 256"),
        (torch.bfloat16, 264, None, r"the channels per head \(264\) must be"),
        (torch.bfloat16, 64, (torch.version, "hip", "7.0"), "it needs a CUDA device"),
        (
            torch.bfloat16,
            64,
            (document_attention, "find_varlen_attn", lambda: None),
            "has no torch.nn.attention.varlen",
        ),
        (torch.bfloat16, 64, (torch.cuda, "get_device_capability", lambda device: (7, 5)), "compute capability 8.0"),
        (
            torch.bfloat16,
            64,
            (torch.backends.cuda, "is_flash_attention_available", lambda: False),
            "this build of PyTorch has no flash attention",
        ),
    ],
)
def test_varlen_is_chosen_on_cuda_and_a_reason_is_logged_if_not(dtype, channels, change, reason, cuda, caplog):
    if change is not None:
        cuda.setattr(*change)
    with caplog.at_level(logging.INFO):
        chosen = resolve_document_backend("auto", CUDA, dtype, channels)
        resolve_document_backend("auto", CUDA, dtype, channels)
    assert chosen.name == ("varlen" if reason is None else "blocks") and len(caplog.records) == 1
    if reason is None:
        assert caplog.messages == ["model.attention_backend=auto: using varlen"]
        return
    with pytest.raises(BackendUnavailable, match=f"'varlen'.* cannot run here: varlen: .*{reason}.*Set it to auto"):
        resolve_document_backend("varlen", CUDA, dtype, channels)


def test_a_model_that_names_varlen_is_refused_on_a_cpu_when_it_is_built():
    with pytest.raises(
        BackendUnavailable, match=r"model.attention_backend \('varlen'\) cannot run here: varlen: it needs"
    ):
        make(attention_backend="varlen")


def test_a_version_of_varlen_without_a_window_is_not_used(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, is_causal=False: None)
    assert document_attention.find_varlen_attn() is None


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [False, True], ids=["equal heads", "grouped queries"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "varlen"), (torch.float32, "blocks")])
def test_on_cuda_values_and_gradients_are_those_of_the_mask(dtype, name, grouped):
    documents = ids([[300, 1, 60, 60, 60, 60, 20], [61] * 9 + [12]])
    assert resolve_document_backend("auto", CUDA, dtype, 8).name == name
    parts = heads(2, 561, dtype, grouped=grouped, device="cuda")
    exact = with_gradients(masked(documents, 0.3), [part.detach().double().requires_grad_() for part in parts])
    plain = with_gradients(masked(documents, 0.3), parts)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = with_gradients(DocumentAttention(documents, 0.3, "auto"), parts)
    # One head's scores of all pairs of a sequence would take as much.
    assert torch.cuda.max_memory_allocated() - before < 561 * 561 * 4 * dtype.itemsize
    for want, rounded, got in zip(exact, plain, found, strict=True):
        error, allowed = (got - want).abs().max(), 3 * (rounded - want).abs().max()
        assert error <= allowed + torch.finfo(dtype).eps * want.abs().max()


def test_a_block_that_neighbouring_documents_fill_exactly_holds_them_both():
    lengths = [3, 5, 8, 4, 4, 1, 9]
    documents_BS = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    (band,) = bands(documents_BS, BlockSizes(block=8, whole=8), torch.float32)
    assert band.lengths == [8, 8, 8, 1, 9]
    assert [mask is None for mask in band.masks] == [False, True, False, True, True]
