"""The state of one rank apart from tensors by name: random generators and monitors, as JSON with tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

_TENSOR = "__tensor__"


def pack_state(state: Any) -> tuple[str, dict[str, Tensor]]:
    """Return a nested state as JSON, and copies on the CPU of the tensors in it, by the names that the JSON refers to.

    The state consists of tensors, numbers, texts, None, and lists and dicts of them.
    """
    tensors: dict[str, Tensor] = {}

    def pack(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"state/{len(tensors)}"
            # A copy: the file is written while the state goes on changing.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        if isinstance(value, dict):
            assert all(isinstance(key, str) for key in value), "the keys of a dict in JSON are texts"
            return {key: pack(item) for key, item in value.items()}
        return [pack(item) for item in value] if isinstance(value, list | tuple) else value

    return json.dumps(pack(state)), tensors


def unpack_state(text: str, tensor: Callable[[str], Tensor]) -> Any:
    """Return the state that ``pack_state`` packed; ``tensor`` returns a tensor by its name."""

    def restored(value: dict[str, Any]) -> Any:
        # A copy, because torch's generators crash on a state at an odd address, as bytes in a file may have.
        return tensor(value[_TENSOR]).clone() if _TENSOR in value else value

    return json.loads(text, object_hook=restored)
