"""Sparse upcycling (arXiv 2212.05055): the weights of a model with experts from those of a dense one.

The experts are copies of the dense feed-forward network, or slices of it; see ``upcycling_rules``. D width, F hidden
features of an expert, E experts.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import dense_hidden_size, has_experts, moe_layers
from qsparse_moe.interop.hugging_face import HuggingFaceWeights
from qsparse_moe.interop.safetensors_writer import Part, TensorSpec
from qsparse_moe.interop.upcycling_rules import Upcycling, check_experts
from qsparse_moe.training.named_tensors import NamedTensors

_DENSE = re.compile(r"layers\.(\d+)\.dense\.(w_gate|w_up|w_down)")
_EXPERTS = re.compile(r"(layers\.\d+)\.moe\.experts\.(w_gate|w_up|w_down)")
_ROUTER, _BIAS = "moe.router.weight", "moe.router.expert_bias"


class UpcycledWeights:
    """The weights of a model with experts, made of those of a dense model; see ``NamedTensors``.

    Tensors are made when they are read, from one dense matrix at a time, and are the same in every reading.
    """

    def __init__(
        self, source: NamedTensors, model: ModelConfig, *, seed: int = 0, noise: float = 0.0, noise_share: float = 1.0
    ) -> None:
        """Read from ``source``; see ``upcycling_rules.check_experts`` for what may differ from it.

        Args:
            source: the weights of a model without experts.
            model: the model with experts.
            seed: seed of the routers and of the noise.
            noise: see ``Upcycling``.
            noise_share: see ``Upcycling``.
        """
        self._source, self._config, self._seed = source, model, seed
        self._noise, self._noise_share = noise, noise_share
        self._slices = dense_hidden_size(source.model) // model.moe.expert_hidden_size
        self.kind, self.path, self.step, self.model_file = source.kind, source.path, source.step, source.model_file
        self.model = source.model
        """The dense model, so that the manifest of a run names the experts among the settings that have changed."""
        self.shapes: dict[str, Sequence[int]] = {}
        for name, shape in source.shapes.items():
            match = _DENSE.fullmatch(name)
            if match and has_experts(model, int(match[1])):
                self.shapes |= self._expert_shapes(f"layers.{match[1]}", match[2])
            else:
                self.shapes[name] = shape

    @property
    def tokenizer(self) -> str:
        """See ``NamedTensors``."""
        return self._source.tokenizer

    def checksums(self, *, part: int, parts: int) -> dict[str, int]:
        """Return the checksums of the dense weights; see ``NamedTensors``."""
        return self._source.checksums(part=part, parts=parts)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """See ``NamedTensors``."""
        return self.tensor(name).flatten()[start:stop]

    def tensor(self, name: str) -> Tensor:
        """See ``NamedTensors``."""
        if name.endswith(_ROUTER):
            return self._router(name)
        if name.endswith(_BIAS):
            return torch.zeros(self._config.moe.num_experts)
        if (dense := _dense_name(name)) is None:
            return self._source.tensor(name)
        matrix = self._source.tensor(dense)
        whole = torch.empty(tuple(self.shapes[name]), dtype=matrix.dtype)
        for expert in range(len(whole)):
            whole[expert] = self._expert(name, expert, matrix)
        return whole

    def spec(self, name: str, dtype: torch.dtype | None = None) -> TensorSpec:
        """Return one tensor as parts, one per expert, of ``dtype``; None, and the routers' biases: as it is stored.

        Only for weights that come from a Hugging Face folder.
        """
        source, shape = self._source, tuple(self.shapes[name])
        assert isinstance(source, HuggingFaceWeights)
        if name.endswith((_ROUTER, _BIAS)):
            own = torch.float32 if name.endswith(_BIAS) else dtype or source.dtype("embedding.weight")
            return TensorSpec.whole(own, shape, partial(self.tensor, name))
        if (dense := _dense_name(name)) is None:
            return source.spec(name, dtype)
        parts = tuple(Part((1, *shape[1:]), self._reader(name, dense, expert)) for expert in range(shape[0]))
        return TensorSpec(dtype or source.dtype(dense), shape, parts)

    def _reader(self, name: str, dense: str, expert: int) -> Callable[[], Tensor]:
        return lambda: self._expert(name, expert, self._source.tensor(dense))[None]

    def _expert_shapes(self, layer: str, matrix: str) -> Mapping[str, Sequence[int]]:
        moe, width = self._config.moe, self._config.hidden_size
        sizes = (moe.expert_hidden_size, width) if matrix == "w_down" else (width, moe.expert_hidden_size)
        shapes: dict[str, Sequence[int]] = {f"{layer}.moe.experts.{matrix}": (moe.num_experts, *sizes)}
        shapes[f"{layer}.{_ROUTER}"] = (moe.num_experts, width)
        if moe.bias_update_rate:
            shapes[f"{layer}.{_BIAS}"] = (moe.num_experts,)
        return shapes

    def _expert(self, name: str, expert: int, matrix: Tensor) -> Tensor:
        """Return the weights of one expert from the dense matrix ``(inputs, outputs)``."""
        size = self._config.moe.expert_hidden_size
        features = slice(expert % self._slices * size, (expert % self._slices + 1) * size)
        value = matrix[features] if name.endswith("w_down") else matrix[:, features]
        return value if not self._noise else self._with_noise(value, f"{name} {expert}")

    def _with_noise(self, value: Tensor, label: str) -> Tensor:
        generator, wide = self._generator(label), value.float()
        noise = torch.randn(value.shape, generator=generator) * (self._noise * wide.square().mean().sqrt())
        chosen = torch.rand(value.shape, generator=generator) < self._noise_share
        return (wide + noise * chosen).to(value.dtype)

    def _router(self, name: str) -> Tensor:
        """Return ``(E, D)``: the slices of a copy have equal rows."""
        copies = self._config.moe.num_experts // self._slices
        rows = torch.randn(copies, self._config.hidden_size, generator=self._generator(name)) * self._config.init_std
        return rows.repeat_interleave(self._slices, 0)

    def _generator(self, label: str) -> torch.Generator:
        # By name, as in model.init, so that no tensor depends on the order in which they are read.
        return torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {label}".encode()))


def upcycled(source: HuggingFaceWeights, upcycling: Upcycling) -> tuple[ModelConfig, UpcycledWeights]:
    """Return the model with the experts of ``upcycling``, and its weights.

    Raises:
        ConfigError: the dense layers cannot be cut into these slices, or the model has experts already.
    """
    model = upcycling.model(source.model)
    check_experts(model, source.model, source.path)
    return model, UpcycledWeights(source, model, noise=upcycling.noise, noise_share=upcycling.noise_share)


def upcycled_for_run(source: NamedTensors, config: RunConfig) -> NamedTensors:
    """Return ``source``, or weights made of it where the run has experts and ``source`` has none.

    Raises:
        ConfigError: the first logits of the run would not be those of the dense model.
    """
    if moe_layers(source.model) or not moe_layers(config.model):
        return source
    check_experts(config.model, source.model, source.path)
    return UpcycledWeights(source, config.model, seed=config.training.seed)


def _dense_name(name: str) -> str | None:
    """Return the name of the dense matrix from which the experts' matrix ``name`` is made; None for other tensors."""
    match = _EXPERTS.fullmatch(name)
    return f"{match[1]}.dense.{match[2]}" if match else None
