"""Compare a model with a reference on held-out sequences: routing, hidden states, outputs, and generated text.

B sequences, S tokens per sequence, T tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from qsparse_moe.data.batch import IGNORED_LABEL, Batch
from qsparse_moe.data.sequences import evenly_spaced_indices
from qsparse_moe.errors import ArgumentError
from qsparse_moe.inference.comparison.continuations import (
    ContinuationChange,
    compare_continuations,
    continued,
    judged,
)
from qsparse_moe.inference.comparison.observe import Observation, observe, observe_locally
from qsparse_moe.inference.comparison.sides import Side, check_comparable
from qsparse_moe.inference.comparison.sums import (
    HiddenChange,
    HiddenSums,
    OutputChange,
    OutputSums,
    RoutingChange,
    RoutingSums,
)
from qsparse_moe.training.evaluate import model_forward


@dataclass(frozen=True)
class LayerChange:
    """Differences in one layer; in the fields ``local_*``, the layer reads the hidden states of the reference."""

    layer: int
    hidden: HiddenChange
    local_hidden: HiddenChange
    routing: RoutingChange | None
    """None in a layer without a router."""
    local_routing: RoutingChange | None

    def as_dict(self) -> dict[str, Any]:
        """Return the differences by name."""
        return {name: dict(vars(value)) if hasattr(value, "__dict__") else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Comparison:
    """All differences between a model and a reference."""

    outputs: OutputChange
    layers: tuple[LayerChange, ...]
    continuations: ContinuationChange | None
    """None if no text was generated."""

    @property
    def routed_layers(self) -> list[LayerChange]:
        """The layers with a router."""
        return [layer for layer in self.layers if layer.routing is not None]

    def mean_routing(self, name: str, *, local: bool = False) -> float | None:
        """Return the mean of a figure of ``RoutingChange`` over the layers with a router; None without any."""
        parts = [layer.local_routing if local else layer.routing for layer in self.routed_layers]
        return sum(getattr(part, name) for part in parts) / len(parts) if parts else None

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, with the means over the layers."""
        return {
            **self.outputs.as_dict(),
            "choices_changed": self.mean_routing("choices_changed"),
            "tokens_changed": self.mean_routing("tokens_changed"),
            "first_choice_changed": self.mean_routing("first_changed"),
            "choices_changed_locally": self.mean_routing("choices_changed", local=True),
            "layers": [layer.as_dict() for layer in self.layers],
            "continuations": None if self.continuations is None else self.continuations.as_dict(),
        }


class Prompts(NamedTuple):
    """The settings of the continuations."""

    num_prompts: int
    """0 compares no continuations."""
    prompt_tokens: int
    """Largest number of tokens per prompt."""
    new_tokens: int
    batch_size: int = 8
    engine: str = "torch"
    """The engine that decodes; see ``inference.engine.resolve_engine``."""


def compare(
    reference: Side,
    own: Side,
    batches: Sequence[Batch],
    prompts: Prompts,
    *,
    notify: Callable[[int, int], None] = lambda done, of: None,
) -> Comparison:
    """Compare ``own`` with ``reference`` on the tokens of ``batches`` that have a label.

    Args:
        reference: the reference; afterwards the models have the plan of ``own``.
        own: the model, which may share the weights of the reference.
        batches: held-out sequences.
        prompts: how many of them, and how much of each, the models continue.
        notify: called with the number of compared batches and of all.

    Raises:
        ConfigError: the two models have other tokens or shapes, or the sequences are too short for the prompts.
    """
    check_comparable(reference, own)
    chosen = choose_prompts(own, batches, prompts) if prompts.num_prompts else []
    sums = _Sums(own)
    for index, batch in enumerate(batches):
        sums.add(reference, own, batch)
        notify(index + 1, len(batches))
    texts = _continuations(reference, own, chosen, prompts) if chosen else None
    own.use_plan()
    return Comparison(sums.outputs.change(), sums.layers(), texts)


class _Sums:
    """The sums of all layers and of the outputs."""

    def __init__(self, own: Side) -> None:
        blocks = list(own.loaded.model.blocks())
        num_experts = own.loaded.config.model.moe.num_experts
        self.outputs = OutputSums()
        self._hidden = [HiddenSums() for _ in blocks]
        self._local_hidden = [HiddenSums() for _ in blocks]
        self._routing = [None if block.moe is None else RoutingSums(num_experts) for block in blocks]
        self._local_routing = [None if block.moe is None else RoutingSums(num_experts) for block in blocks]

    def add(self, reference: Side, own: Side, batch: Batch) -> None:
        counts_BS = batch.targets_BS != IGNORED_LABEL
        # The padding of a batch may be a whole batch.
        if not counts_BS.any():
            return
        reference.use_plan()
        wanted = observe(reference.loaded.model, batch)
        own.use_plan()
        found = observe(own.loaded.model, batch)
        local = observe_locally(own.loaded.model, found, [arguments[0] for arguments in wanted.inputs])
        counts_BS = counts_BS.to(found.logits_BSV.device)
        targets_T = batch.targets_BS.to(found.logits_BSV.device)[counts_BS]
        self.outputs.add(wanted.logits_BSV[counts_BS], found.logits_BSV[counts_BS], targets_T)
        _add_layers(self._hidden, self._routing, wanted, found, counts_BS)
        _add_layers(self._local_hidden, self._local_routing, wanted, local, counts_BS)

    def layers(self) -> tuple[LayerChange, ...]:
        return tuple(
            LayerChange(
                layer,
                hidden.change(),
                local_hidden.change(),
                None if routing is None else routing.change(),
                None if local_routing is None else local_routing.change(),
            )
            for layer, (hidden, local_hidden, routing, local_routing) in enumerate(
                zip(self._hidden, self._local_hidden, self._routing, self._local_routing, strict=True)
            )
        )


def _add_layers(
    hidden: Sequence[HiddenSums],
    routing: Sequence[RoutingSums | None],
    wanted: Observation,
    found: Observation,
    counts_BS: Tensor,
) -> None:
    for layer, sums in enumerate(hidden):
        sums.add(wanted.hidden_BSD[layer][counts_BS], found.hidden_BSD[layer][counts_BS])
        choices, wanted_TA, found_TA = routing[layer], wanted.experts_TA[layer], found.experts_TA[layer]
        if choices is not None and wanted_TA is not None and found_TA is not None:
            choices.add(wanted_TA[counts_BS.flatten()], found_TA[counts_BS.flatten()])


def choose_prompts(side: Side, batches: Sequence[Batch], prompts: Prompts) -> list[list[int]]:
    """Return the beginnings of held-out sequences, evenly spaced over them.

    A prompt belongs to one document: where documents do not attend to each other, it begins with the last one that its
    tokens reach.

    Raises:
        ConfigError: prompt and new tokens together are longer than the model reads at once, or than every sequence.
    """
    length = side.loaded.config.data.sequence_length
    if prompts.prompt_tokens + prompts.new_tokens > length:
        raise ArgumentError(
            f"{{prompt_tokens}} ({prompts.prompt_tokens}) and {{new_tokens}} ({prompts.new_tokens}) must together be "
            f"at most data.sequence_length ({length}), beyond which the model was not trained; make one of them smaller"
        )
    rows = [
        (batch, row)
        for batch in batches
        for row in range(len(batch.tokens_BS))
        if int((batch.targets_BS[row] != IGNORED_LABEL).sum()) >= prompts.prompt_tokens
    ]
    if not rows:
        raise ArgumentError(
            f"{{prompt_tokens}} ({prompts.prompt_tokens}) is longer than every held-out sequence; make it smaller, or "
            "compare on more text"
        )
    chosen = evenly_spaced_indices(prompts.num_prompts, len(rows))
    return [_prompt(rows[index][0], rows[index][1], prompts.prompt_tokens) for index in chosen.tolist()]


def _prompt(batch: Batch, row: int, num_tokens: int) -> list[int]:
    tokens: list[int] = batch.tokens_BS[row, :num_tokens].tolist()
    if batch.documents_BS is None:
        return tokens
    documents_S = batch.documents_BS[row, :num_tokens]
    return tokens[int((documents_S != documents_S[-1]).sum()) :]


def _continuations(
    reference: Side, own: Side, prompts: Sequence[Sequence[int]], settings: Prompts
) -> ContinuationChange:
    found = {}
    for name, side in (("reference", reference), ("own", own)):
        generator = side.generator(settings.engine)
        found[name] = continued(generator, prompts, new_tokens=settings.new_tokens, batch_size=settings.batch_size)
    reference.use_plan()
    scores = judged(model_forward(reference.loaded.model), prompts, found["own"], batch_size=settings.batch_size)
    return compare_continuations(
        found["reference"],
        found["own"],
        scores,
        new_tokens=settings.new_tokens,
        end=own.loaded.tokenizer.document_token,
    )
