"""DeepSpeed's dictionary, derived from the typed config and from nothing else.

DeepSpeed accepts a misspelt top-level key silently and then uses its default (gradient clipping: 1.0), so every key
that bears on the result is written out here, its default included, and a test knows DeepSpeed's names.
"""

from __future__ import annotations

from typing import Any

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.training.engines.offload import swap_folder


def deepspeed_config(config: RunConfig, world_size: int, *, largest_parameter: int = 0) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Args:
        config: of the run.
        world_size: ranks.
        largest_parameter: elements of the model's largest one, for the buffers of NVMe offload.
    """
    training = config.training
    bf16 = training.precision == "bf16"
    stage = training.deepspeed.zero_stage
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": training.global_batch_size // (training.micro_batch_size * world_size),
        # ZeRO-0 in fp32 clips without telling the norm, so the engine clips there itself.
        "gradient_clipping": training.gradient_clipping if stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "fp16": {
            "enabled": training.precision == "fp16",
            "auto_cast": False,
            # Static for DeepSpeed, and the engine changes it, because its optimizers have two rules. At ZeRO-0 version
            # 0.19.8 divides the gradient by it without having multiplied the loss: the engine does both there.
            "loss_scale": 2.0**training.loss_scale.initial_power if stage else 1.0,
            "fp16_master_weights_and_grads": False,
        },
        "bf16": {
            "enabled": bf16,
            # The gradient norm says it, and a run with such a gradient stops instead of skipping the step.
            "check_grad_overflow": False,
            "immediate_grad_update": False,
            "bf16_master_weights_and_grads": False,
            "bf16_optimizer_states": False,
        },
        # ZeRO-0 refuses any other accumulation dtype than the model's; the engine makes it fp32 there.
        "data_types": {"grad_accum_dtype": "fp32" if stage else None},
        "zero_optimization": _zero(config, -(-largest_parameter // world_size)),
        "zero_allow_untested_optimizer": False,
        # torch's AdamW steps on the host too, so that offload changes no number: DeepSpeedCPUAdam rounds differently.
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


def _zero(config: RunConfig, largest_part: int) -> dict[str, Any]:
    chosen = config.training.deepspeed
    folder = swap_folder(config)
    nvme_path = None if folder is None else str(folder)
    # With weights in files every one is read for its layer and dropped after it: there are few buffers to read into,
    # and what DeepSpeed 0.19.8 reads ahead for a layer that an evaluation then leaves out stays in one for ever.
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
        # It would put DeepSpeed's own function in the place of torch.nn.functional.linear, for the whole process.
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
            "buffer_size": largest_part,
            "max_in_cpu": 0,
            "pin_memory": True,
        },
    }
