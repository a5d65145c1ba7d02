"""The configuration of model type ``qsparse_moe`` for transformers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qsparse_moe.config.schema import ModelConfig
from qsparse_moe.interop.auto_model.refusals import no_transformers
from qsparse_moe.interop.auto_model.settings import (
    MODEL_TYPE,
    read_settings,
    section_settings,
    standard_settings,
)
from qsparse_moe.sparsity.plan import SparsityPlan

try:
    from transformers import PreTrainedConfig
except ImportError as error:
    raise no_transformers() from error


class QSparseMoEConfig(PreTrainedConfig):
    """A ``ModelConfig`` and a ``SparsityPlan``, with the names beside them that tools read.

    ``QSparseMoEConfig.of(config.model)`` makes one. The names follow from the section ``qsparse_moe``, and a file in
    which they contradict it is refused with ConfigError.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]
    # Mixtral's name of the number of experts.
    attribute_map = {"num_local_experts": "num_experts"}
    # No plan for tensor parallelism: a sparse site selects among all features of a token, and each rank would select
    # among its shard only, which is another model.
    base_model_tp_plan = None
    when_made = staticmethod(lambda: None)
    """Called for every configuration; ``interop.registration`` registers the model class by it."""

    qsparse_moe: dict[str, Any] | None = None
    """The model section of a run, as plain values."""
    sparsity_plan: dict[str, Any] | None = None
    """The plan in use, as ``SparsityPlan.to_json`` writes it; None: the one that the section describes."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    moe_intermediate_size: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    max_position_embeddings: int | None = None
    """Number of tokens per sequence in training; a rotary embedding sets no limit."""
    use_cache: bool = True
    output_router_logits: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the section, and take the standard names from it."""
        model, _ = read_settings(vars(self), f"config.json ({MODEL_TYPE})")
        self.qsparse_moe = model.model_dump(mode="json")
        for name, value in standard_settings(model).items():
            setattr(self, name, value)
        super().__post_init__(**kwargs)
        # Its import sets ``when_made``, if nothing has imported it before.
        import_module("transformers.models.auto.configuration_auto")
        type(self).when_made()

    @classmethod
    def of(cls, model: ModelConfig, plan: SparsityPlan | None = None, **settings: Any) -> QSparseMoEConfig:
        """Return the configuration of a model.

        Args:
            model: the model section of a run.
            plan: the plan in use; None: that of the section.
            settings: others of a ``config.json``, such as ``max_position_embeddings`` and ``eos_token_id``.
        """
        return cls(**section_settings(model, plan or SparsityPlan.from_config(model)) | settings)

    def read(self) -> tuple[ModelConfig, SparsityPlan]:
        """Return the model section and the plan in use."""
        return read_settings(vars(self), f"config.json ({MODEL_TYPE})")

    def update_section(self, model: ModelConfig, plan: SparsityPlan) -> None:
        """Take the section, the plan, and the names of a model that was changed."""
        for name, value in section_settings(model, plan).items():
            setattr(self, name, value)
