"""Small texts and the files that hold them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ("expert", "keeps", "half", "of", "its", "naïve", "漢字", "and", "∑", "bytes", "😀", "than", "letters")


def make_texts(count: int, *, seed: int = 0, words: int = 30) -> list[str]:
    """``count`` different documents of up to ``words`` words, some of them not ASCII."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, words))) + f" #{seed}.{i}\n" for i in range(count)]


def write_jsonl(path: Path, texts: Sequence[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text, "n": i}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return path


def write_files(folder: Path, texts: Sequence[str]) -> Path:
    """Write one ``.txt`` per document, named in order, and return their folder."""
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04}.txt").write_text(text, "utf-8")
    return folder
