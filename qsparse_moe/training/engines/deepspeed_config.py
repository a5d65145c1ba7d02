"""The DeepSpeed configuration dictionary, derived from the typed config alone.

DeepSpeed silently ignores a misspelt top-level key and uses the default instead (for gradient clipping, 1.0). Every key
that affects the result is therefore written out here, even at its default, and a test compares the names with
DeepSpeed's.
"""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.training.engines.offload import swap_folder


def deepspeed_config(config: RunConfig, world_size: int, *, largest_parameter: int = 0) -> dict[str, Any]:
    """Return the dictionary for ``deepspeed.initialize``.

    Args:
        config: the config of the run.
        world_size: number of ranks.
        largest_parameter: number of elements of the model's largest parameter, for the buffers of NVMe offload.
    """
    training = config.training
    bf16 = training.precision == "bf16"
    stage = training.deepspeed.zero_stage
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * world_size),
        # At ZeRO-0 in fp32 DeepSpeed clips without returning the norm, so the engine clips itself.
        "gradient_clipping": training.gradient_clipping if stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "fp16": {
            "enabled": training.precision == "fp16",
            "auto_cast": False,
            # A static scale for DeepSpeed, which the engine updates: DeepSpeed's optimizers scale dynamically by two
            # different rules. At ZeRO-0, version 0.19.8 divides the gradient by the scale without having multiplied
            # the loss, so the engine does both there.
            "loss_scale": 2.0**training.loss_scale.initial_power if stage else 1.0,
            "fp16_master_weights_and_grads": False,
        },
        "bf16": {
            "enabled": bf16,
            # The gradient norm shows an overflow, and the run then stops instead of skipping the step.
            "check_grad_overflow": False,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        # ZeRO-0 accepts only the model's dtype here; the engine accumulates in fp32 there.
        "data_types": {"grad_accum_dtype": "fp32" if stage else None},
        "zero_optimization": _zero(config, -(-largest_parameter // world_size)),
        "zero_allow_untested_optimizer": False,
        # torch's AdamW also runs on the host, so that offload changes no result: DeepSpeedCPUAdam rounds differently.
        "zero_force_ds_cpu_optimizer": False,
        "aio": {
            "block_size": 1_048_576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
        "dump_state": False,
    }


def _zero(config: RunConfig, largest_partition: int) -> dict[str, Any]:
    """Return the section ``zero_optimization``; ``largest_partition`` is a rank's part of the largest parameter."""
    chosen = config.training.deepspeed
    folder = swap_folder(config)
    nvme_path = None if folder is None else str(folder)
    # With weights in files, each weight is read for its layer and released after it, because there are few read
    # buffers: DeepSpeed 0.19.8 never frees a buffer that it prefetched for a layer that an evaluation then skips.
    ahead = 0 if chosen.offload_parameters == "nvme" else 1
    return {
        "stage": chosen.zero_stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": chosen.reduce_bucket_size,
        "allgather_partitions": True,
        "allgather_bucket_size": chosen.allgather_bucket_size,
        "overlap_comm": chosen.overlap_communication,
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
        "sub_group_size": 1_000_000_000,
        "stage3_prefetch_bucket_size": ahead * chosen.reduce_bucket_size,
        "stage3_param_persistence_threshold": 100_000,
        "stage3_max_live_parameters": ahead * 1_000_000_000,
        "stage3_max_reuse_distance": ahead * 1_000_000_000,
        # True would replace torch.nn.functional.linear by DeepSpeed's function in the whole process.
        "memory_efficient_linear": False,
        "offload_optimizer": {
            "device": chosen.offload_optimizer,
            "nvme_path": nvme_path,
            "buffer_count": 4,
            "pin_memory": True,
            "pipeline_read": False,
            "pipeline_write": False,
            "fast_init": False,
            "ratio": 1.0,
        },
        "offload_param": {
            "device": chosen.offload_parameters,
            "nvme_path": nvme_path,
            "buffer_count": 5,
            "buffer_size": largest_partition,
            "max_in_cpu": 0,
            "pin_memory": True,
        },
    }
