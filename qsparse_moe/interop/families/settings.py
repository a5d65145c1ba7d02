"""The settings of a ``config.json``, each read once and checked; those that are left unread are refused by name."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from qsparse_moe.config.problems import show
from qsparse_moe.errors import CheckpointError

CONFIG_JSON = "config.json"

# They name programs, types of the file, and special tokens, or belong to training with transformers.
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
_MISSING = object()
_OTHER_VALUE = "another value changes the result and is not supported; name another model"


class FamilySettings:
    """The settings of one ``config.json``.

    Every method reads one setting and raises CheckpointError with its name, its value, and the rule if it is invalid.
    """

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self.file = file
        self._values = values
        self._read: set[str] = set()

    @classmethod
    def load(cls, folder: Path) -> FamilySettings:
        """Read the ``config.json`` of ``folder``.

        Raises:
            CheckpointError: it cannot be read, or is not an object of JSON.
        """
        file = folder / CONFIG_JSON
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: cannot be read ({error}), and it must describe the model; download it again"
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: is {show(values)}, and must be an object of JSON; download it again")
        return cls(file, values)

    @property
    def values(self) -> Mapping[str, Any]:
        """All settings, as they are."""
        return self._values

    @property
    def model_type(self) -> str:
        """The name of the architecture; empty if there is none."""
        return str(self._values.get("model_type") or "")

    @property
    def max_length(self) -> int | None:
        """The largest number of positions that the model was made for; None if the file does not say."""
        length = self._values.get("max_position_embeddings")
        return length if isinstance(length, int) and length > 1 else None

    def size(self, *names: str, default: int | None = None) -> int:
        """Return a positive integer under the first of ``names`` that is present; a null counts as absent."""
        name = next((name for name in names if self._values.get(name) is not None), names[0])
        self._read.update(names)
        value = self._values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refusal(name, "must be a positive integer", "correct it, or download the file again")
        return value

    def count(self, name: str, *, default: int) -> int:
        """Return an integer of at least 0."""
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.refusal(name, "must be an integer of at least 0", "correct it, or download the file again")
        return value

    def size_or_null(self, name: str, *, default: int) -> int | None:
        """Return a positive integer, or None where the file says null, which here differs from an absent setting."""
        if name in self._values and self._values[name] is None:
            self._read.add(name)
            return None
        return self.size(name, default=default)

    def number(self, name: str, *, default: float) -> float:
        """Return a positive number."""
        return self.positive(name, self._take(name, default))

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a boolean."""
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise self.refusal(name, "must be true or false", "correct it, or download the file again")
        return value

    def layers(self, name: str) -> frozenset[int]:
        """Return a list of layers, which may be null."""
        value = self._take(name, None) or []
        if not isinstance(value, list) or not all(type(layer) is int for layer in value):
            raise self.refusal(name, "must be a list of layers", "correct it, or download the file again")
        return frozenset(value)

    def require(self, name: str, *supported: Any, reason: str = _OTHER_VALUE) -> Any:
        """Return a setting, and refuse it if its value is none of ``supported``; the first of them is its default."""
        value = self._take(name, supported[0])
        # 0.0 and false are equal in Python, and either means off here.
        if value not in supported:
            allowed = " or ".join(map(show, supported))
            raise self.refusal(name, f"must be {allowed} here", reason)
        return value

    def optional(self, name: str) -> Any:
        """Return a setting as it is; None if it is absent."""
        return self._take(name, None)

    def positive(self, name: str, value: Any) -> float:
        """Return ``value``, which the setting ``name`` gives or contains, as a positive number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self.refusal(name, "must be a positive number", "correct it, or download the file again")
        return float(value)

    def check_all_read(self) -> None:
        """Refuse the settings that no method has read, unless they are known to have no effect on the result."""
        for name in sorted(self._values.keys() - self._read - _WITHOUT_EFFECT):
            raise self.refusal(
                name,
                f"is not a setting that is known for {self.model_type} models",
                "it may change the result, so it is not ignored; remove it if it does not",
            )

    def ignore(self, names: Collection[str]) -> None:
        """Mark settings as read that have no effect in this family."""
        self._read.update(names)

    def refusal(self, name: str, rule: str, way_out: str) -> CheckpointError:
        """Return the error of a setting."""
        value = self._values.get(name, _MISSING)
        return CheckpointError(
            f"{self.file}: {name} ({'absent' if value is _MISSING else show(value)}) {rule}; {way_out}"
        )

    def _take(self, name: str, default: Any) -> Any:
        # A null counts as absent, as in transformers.
        self._read.add(name)
        value = self._values.get(name)
        return default if value is None else value
