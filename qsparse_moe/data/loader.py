"""The entry point of this package: from ``data`` in the config to the batches of one rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qsparse_moe.config.rules import check_world_size
from qsparse_moe.config.schema import RunConfig
from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.data.packing import Array
from qsparse_moe.data.read_ahead import ReadStep, StepReader
from qsparse_moe.data.reader_process import ProcessStream
from qsparse_moe.data.sequences import (
    EARLIER_ORDER,
    KEYED_ORDER,
    ORDERS,
    SequenceTable,
    evenly_spaced_indices,
    train_indices,
)
from qsparse_moe.data.streaming import PartStreams
from qsparse_moe.data.token_data import TokenData, fingerprint_of, load_data
from qsparse_moe.errors import ConfigError, DataError

__all__ = [
    "Batch",
    "TokenData",
    "TrainLoader",
    "combine_states",
    "evaluation_batches",
    "evaluation_num_bytes",
    "load_data",
    "sample_train_sequences",
    "train_indices",
]

State = dict[str, Any]
Reader = Literal["none", "thread", "process"]

_ORDER = "data.order"
"""Part of a state: the random order of the sequences, in table mode with ``data.shuffle``."""


class TrainLoader:
    """The training batches of one rank.

    In table mode the sequences of a step are a pure function of (seed, step, rank), so any step can be requested, and
    a state fits any number of ranks. In streaming mode steps come in order, and a state belongs to one rank and one
    number of ranks.

    Raises:
        ConfigError: the global batch does not divide over the ranks and their micro-batches.
    """

    def __init__(
        self,
        config: RunConfig,
        data: TokenData,
        rank: int,
        world_size: int,
        *,
        reader: Reader = "none",
        pin_memory: bool = False,
    ) -> None:
        """Build the loader; unless ``reader`` is none, ``close`` must be called at the end.

        Args:
            config: the run.
            data: its data.
            rank: this rank.
            world_size: number of ranks.
            reader: what reads the next step while the current one is computed: nothing, a thread, or for a stream a
                process; a table is then read by a thread.
            pin_memory: whether batches are in pinned memory.
        """
        check_world_size(config, world_size)
        training = config.training
        self._data, self._rank, self._world_size = data, rank, world_size
        self._global_batch_size, self._micro_batch_size = training.global_batch_size, training.micro_batch_size
        self._num_steps = training.steps
        self._seed, self._shuffle = training.seed, config.data.shuffle
        self._pin_memory = pin_memory
        self._config, self._reads_in_process = config.data, reader == "process"
        self._step = 0
        self._stream: PartStreams | ProcessStream | None = None
        self._stream_state: list[State] | None = None
        self._passes: list[int] = []
        self._open_parts(config.data.stream_parts or world_size)
        self._reader = StepReader(self._read, in_background=reader != "none")
        self._parts = data.parts | {
            "data.shuffle": str(self._shuffle),
            "training.global_batch_size": str(self._global_batch_size),
            "training.seed": str(self._seed),
        }
        if self._stream is not None and self._shuffle:
            self._parts["data.shuffle_window"] = str(config.data.shuffle_window)
        self._order = KEYED_ORDER
        if self._stream is None and self._shuffle:
            self._parts[_ORDER] = self._order

    def _open_parts(self, num_parts: int) -> None:
        """Open this rank's parts of the text, of ``num_parts``, from the beginning; nothing in table mode."""
        self._num_parts = num_parts
        share = num_parts // self._world_size
        parts = range(self._rank * share, (self._rank + 1) * share)
        seed = self._seed if self._shuffle else None
        if self._config.mode == "streaming":
            self._check_parts(num_parts)
        stream = self._data.open_stream(parts, num_parts=num_parts, seed=seed)
        if stream is None:
            return
        self._stream_state, self._passes = stream.state_dict(), stream.passes()
        self._stream = stream
        if self._reads_in_process:
            self._stream = ProcessStream(self._config, parts, num_parts=num_parts, seed=seed, begin=self._stream_state)

    def _check_parts(self, num_parts: int) -> None:
        if num_parts % self._world_size or self._global_batch_size % num_parts:
            raise ConfigError(
                f"data.stream_parts ({num_parts}) must be a multiple of the number of ranks ({self._world_size}), and "
                f"training.global_batch_size ({self._global_batch_size}) a multiple of it; choose a number of parts "
                "that divides the global batch and that every number of ranks divides on which the run may resume"
            )

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of ``step``, from 0: parts r·G/R up to (r + 1)·G/R of the global batch.

        Raises:
            DataError: the stream cannot be read.
        """
        assert step == self._step or self._stream is None, f"a stream gives step {self._step} next, not {step}"
        found = self._reader.take(step, is_last=step + 1 >= self._num_steps)
        if found.error is not None:
            raise found.error
        self._step, self._stream_state, self._passes = step + 1, found.stream_state, found.passes
        return found.batches

    def read_ahead(self) -> DataError | None:
        """Read a stream's next step now, and return the error, if any; None in table mode, which has no such errors.

        The state stays that of the steps that ``batches`` has returned, so a run can save it if the next step fails.
        """
        return None if self._stream is None else self._reader.peek(self._step).error

    def close(self) -> None:
        """End what reads ahead."""
        self._reader.close()
        self._close_process()

    def _close_process(self) -> None:
        if isinstance(self._stream, ProcessStream):
            self._stream.close()

    def _read(self, step: int) -> ReadStep:
        """Read a step, perhaps in a thread of its own; no other method uses the stream while it runs."""
        if self._stream is None:
            return ReadStep(self._batches_of(self._table_tokens(step)), None, [])
        before = self._stream.state_dict()
        try:
            tokens = self._stream.take(self._global_batch_size // self._world_size)
        except DataError as error:
            # Stored, and raised by the next call of batches, after the run has had the chance to save.
            return ReadStep([], before, [], error)
        return ReadStep(self._batches_of(tokens), self._stream.state_dict(), self._stream.passes())

    def _batches_of(self, tokens: Array) -> list[Batch]:
        size = self._micro_batch_size
        batches = [self._data.batch(tokens[begin : begin + size]) for begin in range(0, len(tokens), size)]
        return [batch.pin_memory() for batch in batches] if self._pin_memory else batches

    @property
    def has_ignored_targets(self) -> bool:
        """Whether micro-batches have different numbers of targets; the same on every rank."""
        return self._data.chat_template is not None

    def epochs(self, step: int) -> list[float]:
        """Return how often each source is read in ``step`` steps, by all ranks.

        Table mode only, because the length of a stream is unknown before its end; see ``passes``.
        """
        assert self._stream is None, "the length of a stream is not known"
        return self._data.train.epochs(step * self._global_batch_size)

    def passes(self) -> list[int]:
        """Return how many passes over each source this rank has finished; an empty list in table mode.

        The stream reads ``data.shuffle_window`` sequences ahead of training.
        """
        return self._passes

    def _table_tokens(self, step: int) -> Array:
        table = self._data.train
        indices = train_indices(
            step,
            num_sequences=len(table),
            global_batch_size=self._global_batch_size,
            seed=self._seed,
            shuffle=self._shuffle,
            order=self._order,
        )
        share = len(indices) // self._world_size
        return table.tokens(indices[self._rank * share : (self._rank + 1) * share])

    def state_dict(self) -> State:
        """Return the next step, the fingerprint of the data, and in streaming mode the position of this rank's stream.

        It is JSON-able. ``combine_states`` joins the states of all ranks into the one that a checkpoint stores.
        """
        state: State = {"step": self._step, "fingerprint": fingerprint_of(self._parts), "parts": self._parts}
        if self._stream is not None:
            # The keys are those of earlier versions, where every rank read one part.
            state |= {"world_size": self._num_parts, "streams": self._stream_state}
        return state

    def load_state_dict(self, state: State) -> None:
        """Continue after the step of ``state``, a combined state or that of the only rank.

        Raises:
            DataError: the data, its order or (streaming) the number of ranks is another.
        """
        # Before anything changes, so that a refused state leaves the loader as it was.
        order, parts = self._order_of(state["parts"])
        _check_same_data(state["parts"], parts, earlier=self._data.earlier_parts)
        if self._stream is not None and state["world_size"] % self._world_size:
            raise DataError(_other_ranks(state["world_size"], self._world_size))
        self._reader.forget()
        if self._stream is not None:
            if state["world_size"] != self._num_parts:
                self._close_process()
                self._open_parts(state["world_size"])
            self._stream_state = self._own_parts(state)
            self._stream.load_state_dict(self._stream_state)
            self._passes = self._stream.passes()
        self._order, self._parts = order, parts
        self._step = state["step"]

    def _order_of(self, saved: dict[str, str]) -> tuple[str, dict[str, str]]:
        """Return the random order of the checkpoint with these parts, and this run's parts with that order."""
        if self._stream is not None or not self._shuffle:
            return self._order, self._parts
        order = saved.get(_ORDER, EARLIER_ORDER)
        if order not in ORDERS:
            raise DataError(
                f"the checkpoint's sequences are in the random order {order!r} (data.order), and this version knows "
                f"{', '.join(ORDERS)}; resume the run with the version that began it, or a newer one"
            )
        parts = {name: value for name, value in self._parts.items() if name != _ORDER}
        # Earlier versions had one order and did not name it, and a run that they began stays readable by them.
        return order, parts | ({_ORDER: order} if _ORDER in saved else {})

    def _own_parts(self, state: State) -> list[State]:
        """Return the states of this rank's parts, which another rank may have read before."""
        num_parts, share = state["world_size"], state["world_size"] // self._world_size
        mine = range(self._rank * share, (self._rank + 1) * share)
        found = {stream["rank"]: stream for stream in state["streams"]}
        assert len(found) == num_parts, "combine_states joins the states of all ranks before a checkpoint keeps them"
        return [found[part] for part in mine]


def _other_ranks(num_parts: int, world_size: int) -> str:
    fitting = ", ".join(str(n) for n in range(1, num_parts + 1) if num_parts % n == 0)
    return (
        f"the checkpoint's streams have {num_parts} parts and this run has {world_size} ranks, and each rank must read "
        f"equally many parts, because each part has a position of its own; start {fitting} ranks, or a new run with "
        "data.stream_parts or with data.mode=table"
    )


def combine_states(states: Sequence[State]) -> State:
    """Return the state that a checkpoint stores, from the ``state_dict`` of every rank; JSON-able.

    In table mode all of them are the same, and the first is enough.
    """
    combined = dict(states[0])
    if "streams" in combined:
        combined["streams"] = [stream for state in states for stream in state["streams"]]
    return combined


def _check_same_data(saved: dict[str, str], now: dict[str, str], *, earlier: dict[str, str]) -> None:
    """Raise unless the sequences depend on the same parts; ``earlier`` has them as earlier versions' checkpoints do."""
    names = sorted(
        name
        for name in saved.keys() | now.keys()
        if saved.get(name) not in (now.get(name), earlier.get(name, now.get(name)))
        # A checkpoint of an earlier version has none, and its stream continues in its own order.
        and not (name == "data.shuffle_window" and name not in saved)
    )
    if names:
        changes = "; ".join(f"{name}: was {saved.get(name, 'absent')}, is {now.get(name, 'absent')}" for name in names)
        raise DataError(
            f"the data of this run differs from the checkpoint's ({changes}), and a run resumes only on the same "
            "sequences in the same order; restore what changed, or start a new run under another training.name; runs "
            "of a grid go to another folder with ablate's --output-dir"
        )


def sample_train_sequences(config: RunConfig, data: TokenData, num_sequences: int) -> Array:
    """Return ``(num_sequences, S + 1)`` token ids of training text, the same on every rank for any number of ranks.

    In table mode they are at even distances over the whole table, fewer where there are fewer; in streaming mode they
    are the first sequences that a single rank trains on.
    """
    stream = data.open_stream(range(1), num_parts=1, seed=config.training.seed if config.data.shuffle else None)
    if stream is not None:
        return stream.take(num_sequences)
    return data.train.tokens(evenly_spaced_indices(num_sequences, len(data.train)))


def evaluation_batches(
    data: TokenData, *, num_sequences: int, micro_batch_size: int, rank: int, world_size: int
) -> list[Batch]:
    """Return one rank's part of ``num_sequences`` for validation, evenly spaced over all; fewer if there are fewer.

    The sequences are the same for any number of ranks, and over all ranks each occurs once. Every rank gets the same
    number of full batches, padded with sequences whose labels are all -100, so a whole batch may have no label that
    counts.
    """
    table, indices = data.evaluation_sequences(num_sequences)
    # Equally many batches on every rank: a forward pass may contain collectives, in which the others would wait.
    share = math.ceil(len(indices) / (micro_batch_size * world_size)) * micro_batch_size
    mine = indices[rank * share : (rank + 1) * share]
    tokens = _padded_tokens(table, mine, share)
    batches = [table.batch(tokens[begin : begin + micro_batch_size]) for begin in range(0, share, micro_batch_size)]
    for begin, batch in zip(range(0, share, micro_batch_size), batches, strict=True):
        batch.targets_BS[max(0, len(mine) - begin) :] = IGNORED_LABEL
    return batches


def _padded_tokens(table: SequenceTable, indices: Array, num_sequences: int) -> Array:
    # Any valid token serves as padding, because its labels are ignored.
    tokens = np.full((num_sequences, table.sequence_length + 1), table.document_token, np.int64)
    if len(indices):
        tokens[: len(indices)] = table.tokens(indices)
    return tokens


def evaluation_num_bytes(data: TokenData, num_sequences: int) -> int:
    """Return the bytes of text that the labels of these sequences encode, over all ranks, for bits per byte."""
    table, indices = data.evaluation_sequences(num_sequences)
    return table.num_bytes(indices)
