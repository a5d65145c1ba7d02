"""Names of transformers that the model class uses, imported here so that one message reports a missing installation."""

from __future__ import annotations

from qsparse_moe.interop.auto_model.refusals import no_transformers

try:
    from transformers import DynamicCache, GenerationMixin, PreTrainedModel, TrainerCallback
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.generic import can_return_tuple
except ImportError as error:
    raise no_transformers() from error

__all__ = [
    "ALL_ATTENTION_FUNCTIONS",
    "DynamicCache",
    "GenerationMixin",
    "MoeCausalLMOutputWithPast",
    "PreTrainedModel",
    "TrainerCallback",
    "can_return_tuple",
    "create_causal_mask",
]
