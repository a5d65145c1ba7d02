"""Initial weights of a run from a trained model, which are compared with the run before anything is written."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsparse_moe.config.problems import show
from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import vocab_size
from qsparse_moe.data.tokenizer import load_tokenizer
from qsparse_moe.errors import CheckpointError, ConfigError, DataError
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.nn.runtime import choices_unlogged
from qsparse_moe.runs.find import naming_init_from
from qsparse_moe.runs.folder import settings_by_path
from qsparse_moe.training.checkpoint.state import differing_shapes, restore_weights, stored_shapes
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.protocol import Engine
from qsparse_moe.training.named_tensors import NamedTensors, OpenWeights, num_not_finite

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Every implementation computes the same function of the same weights.
_IMPLEMENTATIONS = {"attention_backend", "moe.backend", "sparsity.backend"}
_PLAN = "sparsity."

Changes = dict[str, tuple[Any, Any]]
"""Settings of ``model`` by their path below it: the values of the weights and of the run."""


class InitialWeights:
    """Weights that fit the run, checked by ``read_initial_weights``."""

    def __init__(self, init_from: str, kind: str, source: NamedTensors, digest: str, changes: Changes) -> None:
        self._init_from, self._kind, self._source = init_from, kind, source
        self._digest, self._changes = digest, changes

    @property
    def names(self) -> Collection[str]:
        """The names of the tensors."""
        return self._source.shapes.keys()

    def fill(self, name: str, start: int, out: Tensor) -> None:
        """See ``WeightSource``.

        Raises:
            CheckpointError: a value is not finite, or the tensor is not of a floating-point dtype.
        """
        out.copy_(self._values(name, start, start + len(out)))

    def buffer(self, name: str) -> Tensor:
        """Return a buffer of the model's state; it raises as ``fill`` does."""
        shape = list(self._source.shapes[name])
        return self._values(name, 0, math.prod(shape)).view(shape)

    def restore_masters(self, engine: Engine) -> None:
        """Set the fp32 weights of an engine that was built with the weights, perhaps rounded to bf16."""
        restore_weights(engine, self._source.read)

    def describe(self) -> dict[str, Any]:
        """Return the manifest's entry: where the weights come from, and which settings of the model have changed."""
        return {
            "path": self._init_from,
            "kind": self._kind,
            "folder": str(self._source.path.absolute()),
            "step": self._source.step,
            "digest": self._digest,
            "changed_settings": {f"model.{path}": list(values) for path, values in self._changes.items()},
        }

    def _values(self, name: str, start: int, stop: int) -> Tensor:
        with naming_init_from(self._init_from):
            # No rank needs to check another one's values.
            value = self._source.read(name, start, stop)
            if value.dtype not in _DTYPES:
                raise CheckpointError(
                    f"{self._source.path}: {name} has the dtype {value.dtype}, which must be fp32, bf16, or fp16; name "
                    "weights that were not quantized"
                )
            num_bad = num_not_finite(value)
            if num_bad:
                raise CheckpointError(
                    f"{self._source.path}: {num_bad} of {value.numel()} values of {name} are not finite, and all must "
                    "be; name an earlier checkpoint"
                )
            return value


def read_initial_weights(
    config: RunConfig, init_from: str, distributed: Distributed, open_weights: OpenWeights
) -> InitialWeights:
    """Open what ``init_from`` names and check that it is intact and fits the run. All ranks must call it together.

    The tokenizer, the vocabulary, and the name and shape of every tensor must be those of the run's model. Nothing is
    written, and no weight is kept in memory.

    Args:
        config: the run, with ``model.vocab_size`` set.
        init_from: ``training.init_from``.
        distributed: the ranks, which divide the files among them to verify them.
        open_weights: opens the folder.

    Raises:
        CheckpointError: the folder cannot be read, or a file is damaged.
        ConfigError: the weights do not fit; the message names what differs, with both values.
    """
    # Rank 0 chooses the checkpoint for all: another one may be saved while the ranks start.
    kind, path = distributed.on_rank_zero(lambda: _kind_and_path(open_weights(init_from)))
    opened: list[NamedTensors] = []

    def open_and_check() -> None:
        opened.append(open_weights(str(path)))
        _check_fit(config, init_from, opened[0], distributed.device)

    distributed.on_every_rank(open_and_check)
    source = opened[0]
    with naming_init_from(init_from):
        parts = distributed.on_every_rank(lambda: source.checksums(part=distributed.rank, parts=distributed.world_size))
    changes = changed_settings(source.model, config.model)
    if distributed.rank == 0:
        _log(init_from, source, changes)
    return InitialWeights(init_from, kind, source, _digest(parts), changes)


def _kind_and_path(source: NamedTensors) -> tuple[str, Path]:
    return source.kind, source.path


def _digest(parts: Sequence[Mapping[str, int]]) -> str:
    """Return a digest of all files, whichever rank has read them."""
    checksums = {name: checksum for part in parts for name, checksum in part.items()}
    lines = "".join(f"{name} {checksums[name]:08x}\n" for name in sorted(checksums))
    return hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()


def changed_settings(before: ModelConfig, now: ModelConfig) -> Changes:
    """Return the settings of ``now`` that are not those of ``before``, without the choice of implementations."""
    ours, theirs = (settings_by_path(config.model_dump(mode="json")) for config in (now, before))
    return {
        path: (theirs.get(path), ours.get(path))
        for path in sorted(ours.keys() | theirs.keys())
        if ours.get(path) != theirs.get(path) and path not in _IMPLEMENTATIONS
    }


def _format_changes(changes: Changes) -> str:
    """Return the changes apart from those of S, which changes in most runs that start from weights."""
    return ", ".join(
        f"model.{path} ({show(before)} there, {show(now)} here)"
        for path, (before, now) in changes.items()
        if not path.startswith(_PLAN)
    )


def _log(init_from: str, source: NamedTensors, changes: Changes) -> None:
    others = _format_changes(changes)
    logger.info(
        "starting from the weights of %s after step %d (training.init_from=%s)%s",
        source.path,
        source.step,
        init_from,
        f"; settings that differ: {others}" if others else "",
    )


def _check_fit(config: RunConfig, init_from: str, source: NamedTensors, device: torch.device) -> None:
    _check_tokenizer(config.data.tokenizer, init_from, source)
    ours, theirs = vocab_size(config.model), vocab_size(source.model)
    if ours != theirs:
        raise ConfigError(
            f"model.vocab_size ({ours}) must be that of the weights of training.init_from ({init_from}), {theirs}; set "
            f"model.vocab_size={theirs}"
        )
    _check_shapes(config.model, init_from, source, device)
    heads, their_heads = config.model.num_heads, source.model.num_heads
    # The matrices of 2 heads of 20 channels and of 4 heads of 10 have the same shapes.
    if heads != their_heads:
        raise ConfigError(
            f"model.num_heads ({heads}) must be that of the weights of training.init_from ({init_from}), "
            f"{their_heads}, whose matrices have the same shapes and another meaning; set model.num_heads={their_heads}"
        )


def _check_tokenizer(name: str, init_from: str, source: NamedTensors) -> None:
    try:
        theirs = load_tokenizer(source.tokenizer)
    except DataError as error:
        raise CheckpointError(
            f"training.init_from ({init_from}): the tokenizer of the weights cannot be compared: {error}"
        ) from error
    if load_tokenizer(name).fingerprint != theirs.fingerprint:
        raise ConfigError(
            f"data.tokenizer ({name}) must be the tokenizer of the weights of training.init_from ({init_from}), and it "
            f"encodes text differently; set data.tokenizer={source.tokenizer}"
        )


def _check_shapes(config: ModelConfig, init_from: str, source: NamedTensors, device: torch.device) -> None:
    # On the meta device, which allocates nothing: the weights must be refused before the data is prepared.
    with torch.device("meta"), choices_unlogged():
        want = stored_shapes(Transformer(config, device=device))
    differing = differing_shapes(want, source.shapes)
    if not differing:
        return
    name, ours, theirs = differing[0]
    more = f" (and {len(differing) - 1} more tensors differ)" if len(differing) > 1 else ""
    changes = _format_changes(changed_settings(source.model, config))
    raise ConfigError(
        f"training.init_from ({init_from}): {name} has the shape {theirs} in the weights and {ours} in the "
        f"model{more}; they must be equal. Set the model's shapes as in {source.model_file}, or name other weights."
        + (f" Settings that differ: {changes}" if changes else "")
    )
