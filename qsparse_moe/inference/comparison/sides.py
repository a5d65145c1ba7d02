"""The two models of a comparison, which may share their weights and differ in their plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsparse_moe.config.shapes import moe_layers, vocab_size
from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.engine import EngineSettings, resolve_engine
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.load import LoadedModel
from qsparse_moe.sparsity.plan import SparsityPlan


@dataclass(frozen=True)
class Side:
    """One model of a comparison with the plan that it has there."""

    loaded: LoadedModel
    plan: SparsityPlan
    name: str
    """Name in messages and results, such as ``dense``."""

    def use_plan(self) -> None:
        """Give the model its plan, which the other side may have replaced."""
        self.loaded.model.set_sparsity(self.plan)

    def generator(self, engine: str) -> Generator:
        """Return a generator of the model with its plan, until another plan is used."""
        self.use_plan()
        model = self.loaded.model
        # Engines may copy weights and plan when they are built, so each side builds its own.
        decode = resolve_engine(engine, model, settings=EngineSettings(*self.loaded.formats))
        return Generator(model, self.loaded.tokenizer, self.loaded.config, engine=decode)


def check_comparable(reference: Side, own: Side) -> None:
    """Raise ConfigError unless both models read the same tokens and have the same layers, widths, and experts."""
    differences = [
        f"{what} is {one} and {other}"
        for what, read in _COMPARED.items()
        if (one := read(reference.loaded)) != (other := read(own.loaded))
    ]
    if differences:
        raise ConfigError(
            f"{reference.name} cannot be the reference of {own.name}, because tokens, hidden states, and experts are "
            f"compared one by one: {'; '.join(differences)}; name a reference of the same vocabulary and shapes"
        )


_COMPARED: dict[str, Callable[[LoadedModel], Any]] = {
    "the tokenizer (data.tokenizer)": lambda one: one.tokenizer.fingerprint,
    "model.vocab_size": lambda one: vocab_size(one.config.model),
    "model.hidden_size": lambda one: one.config.model.hidden_size,
    "model.num_layers": lambda one: one.config.model.num_layers,
    "the layers with experts": lambda one: list(moe_layers(one.config.model)),
    "model.moe.num_experts": lambda one: one.config.model.moe.num_experts,
    "model.moe.experts_per_token": lambda one: one.config.model.moe.experts_per_token,
}
"""Properties that must be equal in both models, by their names in messages."""
