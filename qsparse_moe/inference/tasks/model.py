"""A model of this package as a model of lm-evaluation-harness, which ``lm_eval.simple_evaluate`` takes as ``model``.

Importing this module needs lm_eval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qsparse_moe.data.chat_template import ChatTemplate
from qsparse_moe.errors import ConfigError, DataError
from qsparse_moe.inference.evaluate import engine_forward
from qsparse_moe.inference.generator import Generator
from qsparse_moe.inference.scoring import Score, ScoredTokens, score
from qsparse_moe.inference.tasks.generation import TaskGeneration
from qsparse_moe.training.evaluate import model_forward


class HarnessModel(LM):
    """Answers the requests of lm-evaluation-harness with a trained model.

    Texts are encoded as the training data is: a request begins with the document token, or as the chat template begins
    a conversation. A context that is too long loses its first tokens.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        batch_size: int = 8,
        token_by_token: bool = False,
        chat_template: ChatTemplate | None = None,
        notify: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            generator: the model with its tokenizer and the engine that decodes; see ``Generator.load``.
            batch_size: number of sequences that are computed together.
            token_by_token: compute log-likelihoods with the engine of the generator, token by token, in place of one
                forward pass of the model over whole sequences.
            chat_template: encodes what ``apply_chat_template`` has written, which the harness calls where it is told
                to; None if the tasks are plain text.
            notify: called with the number of finished requests and of all.
        """
        super().__init__()
        self._template = chat_template
        end = None if chat_template is None else chat_template.end_of_answer()
        self._stop_tokens = () if end is None else (end,)
        self.generator = generator
        self.batch_size = batch_size
        self.num_truncated = 0
        """Number of requests whose context was longer than the model's, so far."""
        self._notify = notify
        self._forward = (
            engine_forward(generator.model, generator.engine) if token_by_token else model_forward(generator.model)
        )

    @property
    def max_length(self) -> int:
        """Largest number of tokens that the model reads at once."""
        return self.generator.max_length

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness caches prompts."""
        return self.generator.tokenizer.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the messages, written by the chat template, and the beginning of the assistant's answer."""
        if self._template is None:
            raise ConfigError(
                "HarnessModel has no chat template, and the task needs one; pass chat_template to HarnessModel"
            )
        if not add_generation_prompt:
            raise ConfigError(
                "a task begins the assistant's answer itself (gen_prefix), which chat templates here do not continue; "
                "leave out the task, or --chat"
            )
        return self._template.prompt(chat_history)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation after its context, and whether it is the greedy one."""
        pairs = [self._tokens(*request.args) for request in requests]
        # A continuation without a token is certain.
        scores = iter(self._score([pair for pair in pairs if pair.targets]))
        found = [next(scores) if pair.targets else Score((), ()) for pair in pairs]
        answers = [(one.log_probability, all(one.are_greedy)) for one in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text.

        A text that is too long is cut into windows in which each token is predicted once, the last from a full context.
        """
        windows = [self._windows(*request.args) for request in requests]
        scores = iter(self._score([window for own in windows for window in own]))
        answers = [sum(next(scores).log_probability for _ in own) for own in windows]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the text that the model generates after each context, up to a stop string or the largest length."""
        settings = [TaskGeneration.of(request.args[1], request.task_name) for request in requests]
        # Requests of one batch share their settings; the longest come first, as in ``score``.
        lengths = [len(request.args[0]) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (repr(settings[index]), -lengths[index]))
        texts: dict[int, str] = {}
        while order:
            chosen = [index for index in order[: self.batch_size] if settings[index] == settings[order[0]]]
            texts.update(zip(chosen, self._generate([requests[index] for index in chosen], chosen), strict=True))
            order = order[len(chosen) :]
            self._notify(len(texts), len(requests))
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _generate(self, requests: Sequence[Instance], seeds: Sequence[int]) -> list[str]:
        """Return the texts of a batch of requests with the same settings."""
        _, keywords = requests[0].args
        settings = TaskGeneration.of(keywords, requests[0].task_name)
        num_new = settings.num_new_tokens(self.max_length, requests[0].task_name)
        prompts = [self._prompt(request.args[0], self.max_length - num_new) for request in requests]
        # One seed per request, so that the draws of a request do not depend on the batch that it is in.
        made = self.generator.generate(
            prompts,
            max_tokens=num_new,
            sampling=settings.sampling,
            seed=seeds,
            stop=settings.stop,
            stop_tokens=self._stop_tokens,
        )
        return [one.text for one in made]

    def _score(self, requests: Sequence[ScoredTokens]) -> list[Score]:
        return score(self._forward, requests, batch_size=self.batch_size, notify=self._notify)

    def _tokens(self, context: str, continuation: str) -> ScoredTokens:
        # Tokenizers put a space at the beginning of a word, so one at the end of the context belongs to what follows.
        spaces = context[len(context.rstrip()) :] if continuation else ""
        context, continuation = context[: len(context) - len(spaces)], spaces + continuation
        # Encoded as one text, as in training. Where the two share a token, it belongs to the continuation.
        tokens, before = self._encode(context + continuation), self._encode(context)
        num_targets = len(tokens) - min(len(before), len(tokens) - 1) if continuation else 0
        # A text of a template may begin with anything; the first token needs one before it that it follows.
        return self._window(tokens if before else [self.generator.tokenizer.document_token, *tokens], num_targets)

    def _encode(self, text: str) -> list[int]:
        """Return the tokens of a text, beginning as in training: with the document token, or as the template does."""
        if self._template is None:
            return self.generator.encode(text)
        return self._template.tokenize([text])[0].ids

    def _window(self, tokens: list[int], num_targets: int) -> ScoredTokens:
        """Return the last tokens that the model can read at once."""
        if num_targets > self.max_length:
            raise DataError(
                f"a task asks for the probability of {num_targets} tokens after a context, and the model reads "
                f"{self.max_length} tokens at once, which must be at least as many; leave out the task, or train with "
                "a longer data.sequence_length"
            )
        self.num_truncated += len(tokens) - 1 > self.max_length
        kept = tokens[-(self.max_length + 1) :]
        return ScoredTokens(tuple(kept[:-1]), tuple(kept[len(kept) - num_targets :]))

    def _windows(self, text: str) -> list[ScoredTokens]:
        tokenizer = self.generator.tokenizer
        windows = get_rolling_token_windows(
            tokenizer.encode(text), tokenizer.document_token, max_seq_len=self.max_length, context_len=1
        )
        # A disjoint pair has a context and the tokens after it, of which the last is not an input.
        pairs = [make_disjoint_window(window) for window in windows]
        return [ScoredTokens(tuple([*context, *targets][:-1]), tuple(targets)) for context, targets in pairs]

    def _prompt(self, context: str, most: int) -> list[int]:
        """Return the last ``most`` tokens of a context, after which the new tokens still fit."""
        prompt = self._encode(context)
        self.num_truncated += len(prompt) > most
        return prompt[-most:]
