"""The settings with which a task of lm-evaluation-harness generates text. Needs no lm_eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from qsparse_moe.errors import ConfigError
from qsparse_moe.inference.sampling import Sampling

# The harness's own default for tasks that set no number of new tokens.
_MAX_NEW_TOKENS = 256
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which tasks set the number of new tokens, in the harness's order of precedence."""
_DRAWS = ("temperature", "top_k", "top_p", "min_p")
_WITHOUT_EFFECT = {"num_beams": 1, "num_return_sequences": 1, "early_stopping": False}
"""Settings of transformers that tasks repeat, with the only value that is supported."""


class TaskGeneration(NamedTuple):
    """Settings with which the text of a ``generate_until`` request is generated."""

    max_tokens: int | None
    """Largest number of new tokens; None if the task sets none."""
    stop: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def of(cls, settings: Mapping[str, Any], task: str) -> TaskGeneration:
        """Return the settings of ``generation_kwargs``, or of one request of the task ``task``.

        Raises:
            ConfigError: a setting is unknown or has a value that is not supported.
        """
        rest = dict(settings)
        lengths = [value for name in _LENGTHS if (value := rest.pop(name, None)) is not None]
        until = rest.pop("until", None) or ()
        # An empty stop string, which some tasks have, ends nothing in the harness.
        stop = tuple(filter(None, [until] if isinstance(until, str) else until))
        drawn = {name: rest.pop(name) for name in _DRAWS if name in rest}
        penalty = rest.pop("repetition_penalty", 1.0)
        # Without do_sample, the harness draws where there is a temperature.
        draws = rest.pop("do_sample", None)
        draws = drawn.get("temperature", 0.0) > 0 if draws is None else draws
        for name, value in rest.items():
            if name not in _WITHOUT_EFFECT or value != _WITHOUT_EFFECT[name]:
                raise ConfigError(
                    f"task {task}: generation_kwargs.{name} ({value}) is not supported; it must be one of "
                    f"{', '.join(('until', *_LENGTHS, 'do_sample', *_DRAWS, 'repetition_penalty'))}. Leave out the "
                    "task, or change its YAML file in a --task-folder"
                )
        sampling = _sampling(drawn, float(penalty), task) if draws else Sampling(repetition_penalty=float(penalty))
        return cls(int(lengths[0]) if lengths else None, stop, sampling)

    def num_new_tokens(self, max_length: int, task: str) -> int:
        """Return the number of new tokens beside which a model that reads ``max_length`` tokens has a prompt.

        Raises:
            ConfigError: the task asks for as many tokens as the model reads at once.
        """
        if self.max_tokens is None:
            return min(_MAX_NEW_TOKENS, max(1, max_length // 2))
        if self.max_tokens >= max_length:
            raise ConfigError(
                f"task {task} generates {self.max_tokens} tokens, which must be fewer than the {max_length} that the "
                "model reads at once (data.sequence_length), so that a prompt fits beside them; set "
                "generation_kwargs.max_gen_toks in the task's YAML file in a --task-folder, or leave out the task"
            )
        return self.max_tokens


def _sampling(drawn: Mapping[str, float], penalty: float, task: str) -> Sampling:
    # transformers draws with temperature 1 where none is set.
    values = {"temperature": 1.0, **drawn}
    try:
        return Sampling(
            temperature=float(values["temperature"]),
            top_k=int(values.get("top_k", 0)),
            top_p=float(values.get("top_p", 1.0)),
            min_p=float(values.get("min_p", 0.0)),
            repetition_penalty=penalty,
        )
    except ConfigError as error:
        raise ConfigError(f"task {task}: {error}") from None
