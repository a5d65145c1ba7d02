"""Registration of model type ``qsparse_moe`` with transformers, without importing transformers before others do.

transformers has no entry point for model types. Importing it takes seconds, and most of this package does not need it,
so ``import qsparse_moe.interop`` registers the model type when transformers is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from qsparse_moe.interop.auto_model.settings import MODEL_TYPE

_REGISTRY = "transformers.models.auto.configuration_auto"


def register_when_imported() -> None:
    """Register the model type now if transformers' registry is imported, else as soon as it is."""
    if _REGISTRY in sys.modules:
        register_config()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def register_config() -> None:
    """Register the configuration, whose first use registers the model."""
    config = import_module("qsparse_moe.interop.auto_model.config").QSparseMoEConfig
    config.when_made = staticmethod(register_model)
    import_module(_REGISTRY).AutoConfig.register(MODEL_TYPE, config, exist_ok=True)


def register_model() -> None:
    """Register the model class, which imports the modelling code of transformers; it may be called repeatedly."""
    config = import_module("qsparse_moe.interop.auto_model.config").QSparseMoEConfig
    model = import_module("qsparse_moe.interop.auto_model.causal_lm").QSparseMoEForCausalLM
    auto = import_module("transformers.models.auto.modeling_auto").AutoModelForCausalLM
    auto.register(config, model, exist_ok=True)


class _Waiting(MetaPathFinder):
    """Registers the configuration as soon as the registry of transformers has been imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        # Removed first, so that the search below asks the other finders.
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads a module by another loader, and then registers the configuration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        register_config()

    def __getattr__(self, name: str) -> Any:
        # Tools that read sources ask the loader for them.
        return getattr(self._loader, name)
