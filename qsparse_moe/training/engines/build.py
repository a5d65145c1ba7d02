"""Builds the engine that the config selects."""

from __future__ import annotations

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.init import WeightSource
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.offload import check_offload
from qsparse_moe.training.engines.protocol import Engine


def build_engine(
    config: RunConfig, model: Transformer, distributed: Distributed, source: WeightSource | None = None
) -> Engine:
    """Return the engine of ``training.engine`` around ``model``.

    In bf16 and fp16 the model has that dtype, its gradients are accumulated and reduced in fp32, and the fp32 master
    weights start from the rounded weights. In bf16 the losses of six steps of a tiny run (near 5) were within 2e-3 of
    those in fp32.

    Args:
        config: the config of the run.
        model: the model, with its weights in fp32, or with its parameters on the meta device.
        distributed: the ranks, which call it together.
        source: the weights of a model on the meta device. Every rank reads only what it keeps, in the dtype that it
            keeps: under ZeRO-3 its partition of every parameter.
    """
    if config.training.engine == "torch":
        from qsparse_moe.training.engines.torch_engine import TorchEngine

        return TorchEngine(config, model, distributed, source)
    # Imported only if selected: importing DeepSpeed takes longer than building the other engine.
    from qsparse_moe.training.engines.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, model, distributed, source)


def check_engine(config: RunConfig) -> None:
    """Raise if this machine does not support the engine of the run; call it before a model is built.

    Raises:
        BackendUnavailable, ConfigError: as ``offload.check_offload`` does.
    """
    if config.training.engine == "deepspeed":
        check_offload(config)
