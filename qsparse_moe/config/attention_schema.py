"""Settings of the attention that have a section or a type of their own. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from qsparse_moe.config.section import Section, Width

_QKNormName = Literal["none", "per_head", "all_heads"]


def _qk_norm_of_flag(value: Any) -> Any:
    return {True: "per_head", False: "none"}[value] if isinstance(value, bool) else value


# A boolean in the files of earlier versions, which knew per_head only.
QKNorm = Annotated[_QKNormName, BeforeValidator(_qk_norm_of_flag, json_schema_input_type=_QKNormName | bool)]


class LatentAttentionConfig(Section):
    """Multi-head latent attention (DeepSeek-V2 and V3, arXiv 2405.04434): keys and values come from one short vector
    per token, which generation stores in their place."""

    key_value_rank: Width | None = None
    """Number of channels of the vector from which the keys and values of all heads are computed (512 in DeepSeek-V3);
    null: ordinary attention."""
    query_rank: Width | None = None
    """Number of channels of the vector from which the queries are computed (1536 in DeepSeek-V3); null: the queries
    are computed from the input, as in DeepSeek-V2-Lite."""
    nope_head_size: Width | None = None
    """Number of channels of each query and key head without a rotation (128 in DeepSeek-V3)."""
    rope_head_size: Width | None = None
    """Number of rotated channels of each query head, and of the one rotated key that all heads share (64 in
    DeepSeek-V3); even."""
    value_head_size: Width | None = None
    """Number of channels of each value head (128 in DeepSeek-V3)."""
