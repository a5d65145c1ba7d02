"""Compute the logits of evaluation batches as generation does: the first token by prefill, the others one by one.

B sequences, S tokens per sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from qsparse_moe.data.batch import Batch
from qsparse_moe.inference.cached_model import prefill
from qsparse_moe.inference.engine import DecodeEngine, EngineSettings, resolve_engine
from qsparse_moe.inference.kv_cache import KeyValueCache
from qsparse_moe.inference.weights import use_weights
from qsparse_moe.model.output import ModelOutput
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.training.evaluate import Forward


class _Segment(NamedTuple):
    """Tokens that attend to each other: a sequence, or one document in it."""

    sequence: int
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def decoding_forward(model: Transformer, engine: str = "auto", weights: str = "auto", head: str = "auto") -> Forward:
    """Return a function that computes the logits of a batch with prefill and decode.

    Args:
        model: in evaluation mode; it is converted to ``weights`` and ``head`` in place.
        engine: see ``resolve_engine``.
        weights: number format of the weights; see ``weights.use_weights``.
        head: number format of the output head.

    Raises:
        ConfigError: ``weights`` or ``head`` does not fit the model.
        BackendUnavailable: the engine cannot run here.
    """
    return engine_forward(
        model, resolve_engine(engine, model, settings=EngineSettings(*use_weights(model, weights, head)))
    )


def engine_forward(model: Transformer, engine: DecodeEngine) -> Forward:
    """Return a function that computes the logits of a batch token by token with ``engine``, built for ``model``."""

    def forward(batch: Batch) -> ModelOutput:
        return ModelOutput(decoded_logits(model, engine, batch), None, {}, {})

    return forward


@torch.inference_mode()
def decoded_logits(model: Transformer, engine: DecodeEngine, batch: Batch) -> Tensor:
    """Return ``(B, S, V)`` fp32 on the model's device: the logits after each token, computed token by token.

    If attention stays inside a document, every document of a sequence is decoded as a sequence of its own.
    """
    device = model.embedding.weight.device
    logits_BSV = torch.zeros(*batch.tokens_BS.shape, model.head.out_features, device=device)
    # Together at most as many cache slots as the batch has tokens, so that short documents do not multiply the memory.
    for segments in _groups(_segments(batch), batch.tokens_BS.numel()):
        _decode_group(model, engine, batch.tokens_BS, segments, logits_BSV)
    return logits_BSV


def _decode_group(
    model: Transformer, engine: DecodeEngine, tokens_BS: Tensor, segments: list[_Segment], logits_BSV: Tensor
) -> None:
    """Fill in the logits of some segments, the longest first."""
    weight = model.embedding.weight
    cache = KeyValueCache.allocate(
        model.config,
        batch=len(segments),
        # The first segment is the longest.
        capacity=segments[0].length,
        dtype=engine.cache_dtype or weight.dtype,
        device=weight.device,
    )
    sequences, begins = (torch.tensor([getattr(one, name) for one in segments]) for name in ("sequence", "begin"))
    for offset in range(segments[0].length):
        going = sum(one.length > offset for one in segments)
        sequences, begins = sequences[:going], begins[:going]
        tokens = tokens_BS[sequences, begins + offset]
        if offset == 0:
            logits = prefill(model, [[token] for token in tokens.tolist()], cache)
        else:
            # The longest come first, so the segments that have ended are always the last ones.
            cache.keep(range(going))
            logits = engine.decode(tokens, cache)
        logits_BSV[sequences, begins + offset] = logits.to(logits_BSV.device)


def _segments(batch: Batch) -> list[_Segment]:
    num_sequences, length = batch.tokens_BS.shape
    if batch.documents_BS is None:
        return [_Segment(sequence, 0, length) for sequence in range(num_sequences)]
    found = []
    for sequence, documents_S in enumerate(batch.documents_BS):
        changes = (documents_S[1:] != documents_S[:-1]).nonzero()[:, 0] + 1
        edges = [0, *changes.tolist(), length]
        found += [_Segment(sequence, begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    return found


def _groups(segments: list[_Segment], most_slots: int) -> Iterator[list[_Segment]]:
    """Yield segments to decode together, the longest first, with at most ``most_slots`` cache slots per group."""
    group: list[_Segment] = []
    for segment in sorted(segments, key=lambda one: -one.length):
        if group and (len(group) + 1) * group[0].length > most_slots:
            yield group
            group = []
        group.append(segment)
    yield group
