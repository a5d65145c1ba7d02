"""Hooks that put sparse sites in front of the matrices of attention and of dense feed-forward networks."""

from __future__ import annotations

from typing import Any

from torch import nn

from qsparse_moe.nn.sparse_site import SparseSite

_INPUT, _HIDDEN = "qsparse_input", "qsparse_hidden"


class InputHook:
    """Before the forward pass of a module: its site before the input matrices selects features of the argument.

    One selection serves all matrices that read the argument. Each call also makes sure that the output matrix has its
    hook: peft may have put a wrapper around that matrix, whose own matrices read the same rows.
    """

    def __init__(self, projection: str) -> None:
        self.projection = projection

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Return the arguments with sparse rows; None if nothing is selected."""
        _hook_projection(getattr(module, self.projection), getattr(module, _HIDDEN))
        site = getattr(module, _INPUT)
        if site.selector.selects_all and site.hook is None:
            return None
        if args:
            return (site.select(args[0]).sparse, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": site.select(kwargs["hidden_states"]).sparse}


class ProjectionHook:
    """Before the product with an output matrix: ``site`` selects features of its rows."""

    def __init__(self, site: SparseSite) -> None:
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return the arguments with sparse rows; None if nothing is selected."""
        if self.site.selector.selects_all and self.site.hook is None:
            return None
        return (self.site.select(args[0]).sparse, *args[1:])


def attach(module: nn.Module, projection: str, input_site: SparseSite, hidden_site: SparseSite) -> None:
    """Put ``input_site`` before the input matrices of ``module`` and ``hidden_site`` before its output matrix."""
    module.add_module(_INPUT, input_site)
    module.add_module(_HIDDEN, hidden_site)
    module.register_forward_pre_hook(InputHook(projection), with_kwargs=True)
    _hook_projection(getattr(module, projection), hidden_site)


def detach(module: nn.Module) -> None:
    """Undo ``attach``, and remove the hook of an output matrix; other modules stay as they are."""
    for name in (_INPUT, _HIDDEN):
        if isinstance(getattr(module, name, None), SparseSite):
            delattr(module, name)
    # By type and not by the handles of registration, which a copy of the model does not share.
    _remove(module, InputHook | ProjectionHook)


def _hook_projection(projection: nn.Module, site: SparseSite) -> None:
    """Make sure that the rows of ``site`` are selected once, before the outermost wrapper of its matrix."""
    if any(isinstance(hook, ProjectionHook) for hook in projection._forward_pre_hooks.values()):
        return
    for inner in projection.modules():
        _remove(inner, ProjectionHook)
    projection.register_forward_pre_hook(ProjectionHook(site))


def _remove(module: nn.Module, kind: Any) -> None:
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kind)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
