"""The keys of DeepSpeed's dictionary against DeepSpeed's own names, since it ignores misspelt keys silently."""

from __future__ import annotations

import pytest

from qsparse_moe.config.schema import DeepSpeedConfig, RunConfig, TrainingConfig
from qsparse_moe.training.engines.deepspeed_config import deepspeed_config

constants = pytest.importorskip("deepspeed.runtime.constants")


def settings(stage: int = 2, precision: str = "fp32", ranks: int = 2, offload: dict | None = None, **training) -> dict:
    config = RunConfig(
        training=TrainingConfig(
            global_batch_size=24,
            micro_batch_size=3,
            gradient_clipping=0.25,
            precision=precision,
            deepspeed=DeepSpeedConfig(
                zero_stage=stage, reduce_bucket_size=1234, allgather_bucket_size=4321, **(offload or {})
            ),
            **training,
        )
    )
    return deepspeed_config(config, ranks)


def known_keys() -> set[str]:
    from deepspeed.runtime import config, precision_config
    from deepspeed.runtime.swap_tensor import constants as swapping
    from deepspeed.runtime.zero import config as zero_config

    modules = (constants, config, precision_config, zero_config, swapping)
    return {value for module in modules for value in vars(module).values() if isinstance(value, str)}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_top_level_key_is_one_that_deepspeed_knows(stage, precision):
    assert settings(stage, precision).keys() - known_keys() == set()
    assert "gradient_cliping" not in known_keys(), "the test must be able to fail"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_reads_what_the_config_says(stage, precision):
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    # Outside of a process group DeepSpeed takes one rank.
    theirs = Theirs(settings(stage, precision, ranks=1))
    assert (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu) == (24, 3)
    assert theirs.gradient_accumulation_steps == 8
    assert theirs.gradient_clipping == (0.25 if stage else 0.0)
    assert theirs.bfloat16_config.enabled == (precision == "bf16")
    assert theirs.float16_config.enabled == (precision == "fp16")
    # ZeRO-0 does not multiply the loss by it; the engine does.
    assert theirs.float16_config.loss_scale == (2**16 if stage else 1)
    assert theirs.zero_config.offload_optimizer.device == theirs.zero_config.offload_param.device == "none"
    assert theirs.zero_force_ds_cpu_optimizer is False
    assert theirs.grad_accum_dtype == ("fp32" if stage else None)
    assert theirs.zero_config.stage == stage
    assert theirs.zero_config.reduce_bucket_size == 1234
    assert theirs.zero_config.allgather_bucket_size == 4321
    assert theirs.zero_config.overlap_comm is False
    assert theirs.zero_config.prefetch_bucket_size == 1234
    assert theirs.zero_config.memory_efficient_linear is False
    assert theirs.steps_per_print is None
    assert str(theirs.communication_data_type) == "torch.float32"


def test_the_micro_batches_of_a_rank_follow_from_the_ranks():
    assert settings(ranks=1)["gradient_accumulation_steps"] == 8
    assert settings(ranks=4)["gradient_accumulation_steps"] == 2


def test_buffers_hold_a_ranks_part_of_the_largest_parameter():
    config = RunConfig(training=TrainingConfig(global_batch_size=24, micro_batch_size=3))
    for ranks, part in ((1, 10), (4, 3), (8, 2)):
        found = deepspeed_config(config, ranks, largest_parameter=10)["zero_optimization"]["offload_param"]
        assert found["buffer_size"] == part
    assert settings()["zero_optimization"]["offload_param"]["buffer_size"] == 0


def test_what_would_change_the_result_is_switched_off():
    found = settings(3, "bf16")
    zero, half = found["zero_optimization"], {name: value for name, value in found["bf16"].items() if value}
    assert (found["prescale_gradients"], found["gradient_predivide_factor"]) == (False, 1.0)
    assert half == {"enabled": True}
    assert found["fp16"] == {
        "enabled": False, "auto_cast": False, "loss_scale": 2.0**16, "fp16_master_weights_and_grads": False,
    }  # fmt: skip
    assert not found["zero_allow_untested_optimizer"] and not zero["round_robin_gradients"]
    assert zero["reduce_scatter"] and zero["contiguous_gradients"] and zero["ignore_unused_parameters"]
    assert zero["stage3_param_persistence_threshold"] == 100_000 and zero["sub_group_size"] == 10**9
    assert (zero["offload_optimizer"]["ratio"], zero["offload_optimizer"]["fast_init"]) == (1.0, False)
    assert zero["offload_optimizer"]["nvme_path"] is zero["offload_param"]["nvme_path"] is None
    assert not found["wall_clock_breakdown"] and not found["memory_breakdown"] and not found["dump_state"]


def test_offload_is_what_the_config_says(tmp_path):
    from deepspeed.runtime.config import DeepSpeedConfig as Theirs

    theirs = Theirs(settings(2, ranks=1, offload={"offload_optimizer": "cpu"})).zero_config
    assert (theirs.offload_optimizer.device, theirs.offload_param.device) == ("cpu", "none")
    both = {"offload_optimizer": "nvme", "offload_parameters": "cpu", "nvme_path": str(tmp_path)}
    theirs = Theirs(settings(3, ranks=1, offload=both)).zero_config
    assert (theirs.offload_optimizer.device, theirs.offload_param.device) == ("nvme", "cpu")
    assert theirs.offload_optimizer.nvme_path.parent == tmp_path


def test_two_runs_never_share_a_folder_for_their_swap_files(tmp_path):
    """DeepSpeed names swap files by rank and parameter only."""
    nvme = {"offload_parameters": "nvme", "nvme_path": str(tmp_path)}
    places = [{"name": "a"}, {"name": "b"}, {"name": "a", "output_dir": "elsewhere"}]
    made = [settings(3, offload=nvme, **place)["zero_optimization"]["offload_param"] for place in places]
    assert len({folder["nvme_path"] for folder in made}) == 3


@pytest.mark.parametrize(("device", "ahead"), [("none", 1), ("cpu", 1), ("nvme", 0)])
def test_nothing_is_prefetched_from_files(device, ahead, tmp_path):
    nvme = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path)} if device == "nvme" else {}
    zero = settings(3, offload={"offload_parameters": device} | nvme)["zero_optimization"]
    names = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    assert [zero[name] for name in names] == [ahead * 1234, ahead * 1_000_000_000, ahead * 1_000_000_000]
