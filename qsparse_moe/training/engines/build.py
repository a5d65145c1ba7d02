"""The choice between the engines."""

from __future__ import annotations

from qsparse_moe.config.schema import RunConfig
from qsparse_moe.model.transformer import Transformer
from qsparse_moe.training.distributed.ranks import Distributed
from qsparse_moe.training.engines.offload import check_offload
from qsparse_moe.training.engines.protocol import Engine


def build_engine(config: RunConfig, model: Transformer, distributed: Distributed) -> Engine:
    """The engine of ``training.engine`` around ``model``, whose fp32 weights are the ones to start from.

    In bf16 and fp16 the model takes that dtype, its gradients are added and reduced in fp32, and the fp32 master
    weights begin as its rounded ones. The losses of six steps of a tiny run (near 5) were then within 2e-3 of fp32's
    in bf16.
    """
    if config.training.engine == "torch":
        from qsparse_moe.training.engines.torch_engine import TorchEngine

        return TorchEngine(config, model, distributed)
    # Only here: importing DeepSpeed takes longer than building the other engine.
    from qsparse_moe.training.engines.deepspeed_engine import DeepSpeedEngine

    return DeepSpeedEngine(config, model, distributed)


def check_engine(config: RunConfig) -> None:
    """Raise where this machine lacks what the engine of the run needs, before a model is built.

    Raises:
        BackendUnavailable, ConfigError: see ``offload.check_offload``.
    """
    if config.training.engine == "deepspeed":
        check_offload(config)
