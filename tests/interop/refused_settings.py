"""Settings of a ``config.json`` that are refused: the family, the changed settings, and a part of the message."""

from __future__ import annotations

REFUSED = [
    (
        "mixtral",
        {"hidden_act": "gelu"},
        'hidden_act ("gelu") must be "silu" or "swish" here; another value changes',
    ),
    ("mixtral", {"attention_bias": True}, "attention_bias (true) must be false here"),
    ("mixtral", {"attention_dropout": 0.1}, "attention_dropout (0.1) must be 0.0 here"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise (0.1) must be 0.0 here"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window (4096) must be null here"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
    (
        "mixtral",
        {"rope_scaling": {"type": "linear"}},
        'rope_scaling ({"type": "linear"}) stands beside rope_parameters, and one must describe both; remove one',
    ),
    ("mixtral", {"rope_parameters": [1]}, "rope_parameters ([1]) must be an object of JSON; correct it"),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4}},
        'rope_parameters ({"rope_type": "dynamic", "factor": 4}) must have one of these types: default, linear, ',
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear"}},
        "lacks factor, which linear needs; download the file",
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "factor": 4}},
        "has a setting that is not known for the type default: factor; it may change the result",
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "factor": 4, "partial_rotary_factor": 0.5}},
        "has a setting that is not known for the type linear: partial_rotary_factor",
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "factor": "two"}},
        'rope_parameters ({"rope_type": "linear", "factor": "two"}) must be a positive number',
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4, "truncate": False}},
        "must have truncate true or absent; channels that are not whole change the frequencies",
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4, "beta_fast": "many"}},
        'beta_fast": "many"}) must be a positive number',
    ),
    (
        "mixtral",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4, "low_freq_factor": 2}},
        "has a setting that is not known for the type yarn: low_freq_factor",
    ),
    ("mixtral", {"rope_theta": 5.0}, "rope_theta (5.0) differs from rope_parameters.rope_theta (1000000.0)"),
    ("mixtral", {"rope_parameters": {"rope_theta": -1}}, 'rope_parameters ({"rope_theta": -1}) must be a positive'),
    ("mixtral", {"rms_norm_eps": "small"}, 'rms_norm_eps ("small") must be a positive number; correct it'),
    ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings (1) must be true or false"),
    ("mixtral", {"num_hidden_layers": 2.5}, "num_hidden_layers (2.5) must be a positive integer"),
    ("mixtral", {"num_local_experts": ...}, "num_local_experts (absent) must be a positive integer"),
    (
        "mixtral",
        {"quantization_config": {"bits": 4}},
        'quantization_config ({"bits": 4}) must be null here; quantized',
    ),
    ("mixtral", {"num_key_value_heads": 4}, "(model.num_kv_heads (4) must divide model.num_heads (6)"),
    ("mixtral", {"head_dim": 10, "num_experts_per_tok": 9}, "(model.moe.experts_per_token (9) must be at most"),
    ("qwen3_moe", {"mlp_only_layers": "0"}, 'mlp_only_layers ("0") must be a list of layers'),
    (
        "qwen3_moe",
        {"mlp_only_layers": [1]},
        "mlp_only_layers ([1]) with decoder_sparse_step (1) leaves experts in the layers [0, 2], and this package",
    ),
    (
        "mixtral",
        {"model_type": "gpt_oss"},
        'model_type ("gpt_oss") has attention sinks, biases in attention, router, and experts, and a clamped '
        "activation function in the experts, which this package's model does not have; name a model of one of ",
    ),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv (8.0) must be null here; another value changes the result"),
    ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
    (
        "qwen2_moe",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        'layer_types (["full_attention", "sliding_attention", "full_attention"]) must be null or ["full_attention"',
    ),
    ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "(0) must be a positive integer; correct it"),
    ("llama", {"mlp_bias": True}, "mlp_bias (true) must be false here"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp (2) must be 1 here"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved (true) must be false here"),
    ("qwen2", {"use_mrope": True}, "use_mrope (true) must be false here"),
    (
        "mistral",
        {"sliding_window": 4096},
        "sliding_window (4096) must be null or at least max_position_embeddings (131072): attention has no window "
        "here; up to 4096 tokens the window changes nothing, so set max_position_embeddings to 4096 for",
    ),
    (
        "mistral",
        {"sliding_window": ...},
        "sliding_window (absent) must be null or at least max_position_embeddings",
    ),
    ("mistral", {"attention_bias": True}, "attention_bias (true) must be false here"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window (true) must be false here"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "must be null or"),
    ("mixtral", {"model_type": "gpt2"}, 'model_type ("gpt2") is not a family that can be read; name a model of'),
]
