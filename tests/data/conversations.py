"""Conversations, and a tokenizer of words whose special tokens mark the turns."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("<unk>", "</s>", "<user>", "<bot>", "<sys>", "<end>")
UNK, EOS, USER, BOT, SYS, END = range(6)
WORDS = tuple("abcdefghij")
IDS = {word: len(SPECIAL) + index for index, word in enumerate(WORDS)}

# Turns as "<user>a b<end>\n"; the answer ends with <end>.
PLAIN = (
    "{% for m in messages %}"
    "{{ {'user': '<user>', 'assistant': '<bot>', 'system': '<sys>', 'tool': '<sys>'}[m.role] }}"
    "{{ m.content + '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)
# The same text, with the answers marked by the template itself.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<bot>' }}"
    "{% generation %}{{ m.content + '<end>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ {'user': '<user>', 'system': '<sys>', 'tool': '<sys>'}[m.role] + m.content + '<end>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)
# The eos token ends every answer, as in Llama's templates, and the roles must alternate.
STRICT = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '<user>' + m.content + '<bot>' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)
# Earlier answers are written otherwise than the last one.
REWRITING = (
    "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<bot>' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ 'j ' }}{% endif %}{{ m.content + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"
)


def save_chat_tokenizer(folder: Path, template: str | None = PLAIN) -> Path:
    """Save the words and special tokens as a tokenizer with a chat template; with no template if it is None."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "unk_token": "<unk>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def chat(*turns: str) -> list[dict[str, Any]]:
    """Return ``u:a b``, ``a:c``, ``s:d`` as messages of the user, the assistant, and the system."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    pairs = [turn.split(":", 1) for turn in turns]
    return [{"role": roles[role], "content": content} for role, content in pairs]


def make_chats(count: int, *, seed: int = 0, words: int = 4) -> list[list[dict[str, Any]]]:
    """Return different conversations of one to three answers."""
    rng = random.Random(seed)

    def said() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, words)))

    return [chat(*(f"{role}:{said()}" for _ in range(rng.randint(1, 3)) for role in "ua")) for _ in range(count)]


def write_chats(path: Path, chats: Sequence[Any], column: str = "messages") -> Path:
    path.write_text("".join(json.dumps({column: one, "n": i}) + "\n" for i, one in enumerate(chats)), "utf-8")
    return path
