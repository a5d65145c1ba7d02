"""Text to token ids and back: plain bytes, or any Hugging Face tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from qsparse_moe.config.schema import ModelConfig, RunConfig
from qsparse_moe.config.shapes import padded_vocabulary, vocab_size
from qsparse_moe.data.hub_wait import log_slow_wait
from qsparse_moe.data.local_files import short
from qsparse_moe.data.packing import Array, Document
from qsparse_moe.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_NUM_BYTE_VALUES = 256
_SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
TEMPLATE_FILE = "chat_template.jinja"
"""File with the chat template in the folder of a tokenizer."""


class TextTokenizer(Protocol):
    """The interface of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    absent_ids: tuple[int, ...]
    """Ids below ``vocab_size`` without a meaning."""
    document_token: int
    """The token that begins every document and so ends the one before; encoding text never gives it."""
    fingerprint: str
    """A digest that changes whenever some text would be encoded differently."""
    files: tuple[Path, ...]
    """The files that it was read from, all in one folder; none for bytes."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without the document token."""

    def special_id(self, spelling: str) -> int | None:
        """Return the id of the special token with this spelling; None if there is none."""

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Copy the files that it was read from into a new folder; do nothing where there are none.

        ``chat_template`` takes the place of its own.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, without the document token and ids that encode no text."""

    def tokenize(self, texts: Sequence[str]) -> list[Document]:
        """Return one document per text, with its document token and the number of bytes that each token encodes."""

    def token_ids(self, texts: Sequence[str]) -> list[Array]:
        """Return the tokens of ``tokenize``, int32, without the bytes, which take a third of the time of both."""


class ByteTokenizer:
    """The 256 byte values of UTF-8 and the document token 256."""

    vocab_size = _NUM_BYTE_VALUES + 1
    absent_ids: tuple[int, ...] = ()
    document_token = _NUM_BYTE_VALUES
    fingerprint = "bytes"
    files: tuple[Path, ...] = ()

    def special_id(self, spelling: str) -> int | None:
        """Return None: the document token has no spelling."""
        return None

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Do nothing: there are no files."""

    def encode(self, text: str) -> list[int]:
        """Return the bytes of the text."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the bytes; invalid UTF-8 becomes U+FFFD, and ids from 256 on are left out."""
        return bytes(i for i in ids if 0 <= i < _NUM_BYTE_VALUES).decode("utf-8", errors="replace")

    def tokenize(self, texts: Sequence[str]) -> list[Document]:
        """Return the documents with one token per byte."""
        return [self._document(text.encode("utf-8")) for text in texts]

    def token_ids(self, texts: Sequence[str]) -> list[Array]:
        """Return the document token and the bytes of each text."""
        return [self._tokens(text.encode("utf-8")) for text in texts]

    def _tokens(self, text: bytes) -> Array:
        tokens = np.empty(len(text) + 1, np.int32)
        tokens[0] = self.document_token
        tokens[1:] = np.frombuffer(text, np.uint8)
        return tokens

    def _document(self, text: bytes) -> Document:
        tokens = self._tokens(text)
        num_bytes = np.ones(len(tokens), np.int32)
        num_bytes[0] = 0
        return Document(tokens, num_bytes)


class HuggingFaceTokenizer:
    """A ``tokenizer.json``; its end-of-sequence token is the document token, or else its begin-of-sequence token.

    Special tokens are never parsed out of text: a document that spells one is encoded as the characters that it has.
    """

    def __init__(self, tokenizer: Tokenizer, document_spelling: str, name: str, files: Sequence[Path] = ()) -> None:
        self.files = tuple(files)
        document_token = tokenizer.token_to_id(document_spelling)
        if document_token is None:
            raise DataError(
                f"data.tokenizer ({name}): its document token {document_spelling!r} is not in its vocabulary, and it "
                "must have an id; correct eos_token in tokenizer_config.json, or choose another tokenizer"
            )
        self.document_token: int = document_token
        # The document token is part of it, because tokenizer.json does not say which one it is.
        self.fingerprint = _digest(f"{tokenizer.to_str()}\n{document_token}")
        # Ids may have gaps, so the number of entries is not enough.
        ids = set(tokenizer.get_vocab(with_added_tokens=True).values())
        self.vocab_size = max(ids) + 1
        self._special_ids = {
            token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.absent_ids: tuple[int, ...] = tuple(sorted(set(range(self.vocab_size)) - ids))
        # A tokenizer.json may cut or pad every text, and parses special tokens out of it by default.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self._spelling = document_spelling
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process reads the files again: the settings above are not part of a pickled tokenizer.
        return _from_files, (self._name, self.files)

    def save(self, folder: Path, chat_template: str | None = None) -> None:
        """Copy the files that it was read from into ``folder``, which is complete or absent."""
        # Copied beside the folder and renamed, so that a killed process leaves no half-written tokenizer.
        partial = folder.with_name(f".{folder.name}.new")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in self.files:
            shutil.copyfile(file, partial / file.name)
        if chat_template is not None:
            # It is read before the template in tokenizer_config.json.
            (partial / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    def special_id(self, spelling: str) -> int | None:
        """Return the id of the special token with this spelling; None if there is none."""
        return self._special_ids.get(spelling)

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without the document token."""
        ids: list[int] = self.tokenize([text])[0].tokens[1:].tolist()
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids without special tokens; ids that the tokenizer does not have are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def tokenize(self, texts: Sequence[str]) -> list[Document]:
        """Encode the texts together, on all cores that the ``tokenizers`` library may use.

        Raises:
            DataError: ordinary text gives the document token.
        """
        encodings = self._encode(texts)
        return [self._document(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def token_ids(self, texts: Sequence[str]) -> list[Array]:
        """Encode the texts together, without the offsets of the tokens.

        Raises:
            DataError: ordinary text gives the document token.
        """
        # The fast encoding leaves the offsets out; the ids are the same.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [
            self._with_document_token(text, _ids(encoding)) for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _with_document_token(self, text: str, ids: Array) -> Array:
        if (ids == self.document_token).any():
            return self._document_cut_in_pieces(text).tokens
        tokens = np.empty(len(ids) + 1, np.int32)
        tokens[0], tokens[1:] = self.document_token, ids
        return tokens

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        # The document token is added by this class. A tokenizer.json may add others, at both ends of a text.
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)

    def _document(self, text: str, encoding: Encoding) -> Document:
        ids, num_bytes = _ids_and_bytes(text, encoding)
        if (ids == self.document_token).any():
            return self._document_cut_in_pieces(text)
        return self._joined([(ids, num_bytes)])

    def _document_cut_in_pieces(self, text: str) -> Document:
        pieces = self._cut_spellings(text)
        document = self._joined([_ids_and_bytes(*pair) for pair in zip(pieces, self._encode(pieces), strict=True)])
        if (document.tokens[1:] == self.document_token).any():
            raise DataError(
                f"data.tokenizer ({self._name}) encodes ordinary text as its document token {self._spelling!r} "
                f"({text[:40]!r}), which must mark documents only; choose a tokenizer whose eos_token is no other token"
            )
        return document

    def _joined(self, parts: Sequence[tuple[Array, Array]]) -> Document:
        tokens = np.concatenate([[self.document_token], *(ids for ids, _ in parts)]).astype(np.int32)
        return Document(tokens, np.concatenate([[0], *(num_bytes for _, num_bytes in parts)]).astype(np.int32))

    def _cut_spellings(self, text: str) -> list[str]:
        """Return the text in pieces, cut inside every spelling of the document token.

        This is needed where the vocabulary holds the spelling as an ordinary word, which the tokenizer finds in text.
        """
        first, rest = self._spelling[:1], self._spelling[1:]
        pieces = text.split(self._spelling)
        last = len(pieces) - 1
        return [f"{rest if i else ''}{piece}{first if i < last else ''}" for i, piece in enumerate(pieces)]


def load_tokenizer(name: str) -> TextTokenizer:
    """Return the tokenizer of ``data.tokenizer``: ``bytes``, a folder with a ``tokenizer.json``, or a name on the hub.

    Raises:
        DataError: it cannot be found or read, or has neither an end- nor a begin-of-sequence token.
    """
    if name == "bytes":
        return ByteTokenizer()
    return _from_files(name, _folder_files(name) if _looks_local(name) else _hub_files(name))


def _from_files(name: str, files: Sequence[Path]) -> HuggingFaceTokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(files[0]))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(
            f"data.tokenizer ({name}): {files[0]} cannot be read: {error}; it must be the tokenizer.json of a "
            "Hugging Face tokenizer; save it again with save_pretrained"
        ) from error
    return HuggingFaceTokenizer(
        tokenizer, _document_spelling(name, [file for file in files if file.name in _SETTINGS_FILES]), name, files
    )


def with_vocabulary(config: RunConfig) -> RunConfig:
    """Return ``config`` with ``model.vocab_size`` as set, or else the multiple of 8 that its tokenizer needs.

    Raises:
        ConfigError: it was set and has no row for some token.
        DataError: the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if config.model.vocab_size is not None:
        check_vocabulary(config.model, tokenizer)
        return config
    model = config.model.model_copy(update={"vocab_size": padded_vocabulary(tokenizer.vocab_size)})
    return config.model_copy(update={"model": model})


def check_vocabulary(config: ModelConfig, tokenizer: TextTokenizer) -> None:
    """Raise ConfigError unless the model has a row for every token."""
    if vocab_size(config) < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({vocab_size(config)}) must be at least the tokenizer's ({tokenizer.vocab_size}); "
            f"remove it, or set it to {padded_vocabulary(tokenizer.vocab_size)}, the next multiple of 8"
        )


def meaningless_ids(config: ModelConfig, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the ids of the model without a meaning: the tokenizer's gaps and the padding beyond its last id."""
    return (*tokenizer.absent_ids, *range(tokenizer.vocab_size, vocab_size(config)))


def _ids_and_bytes(text: str, encoding: Encoding) -> tuple[Array, Array]:
    """Return token ids and the bytes of text that each one newly covers; together they cover the whole text."""
    ids = _ids(encoding)
    if not len(ids):
        return ids, ids
    # Characters up to each token's end. Tokens that are bytes of one character all end behind it: the first counts it.
    ends = np.maximum.accumulate(np.array(encoding.offsets, np.int64)[:, 1])
    if not text.isascii():
        ends = byte_offsets(text)[ends]
    # What a tokenizer strips at the end counts for its last token, or bits per byte would miss these bytes.
    ends[-1] = len(text.encode("utf-8"))
    return ids, np.diff(ends, prepend=0)


def _ids(encoding: Encoding) -> Array:
    ids = encoding.ids
    # 15 ns per token, where np.array takes 26.
    return np.fromiter(ids, np.int32, len(ids))


def byte_offsets(text: str) -> Array:
    """Return ``(n + 1,)``: the number of UTF-8 bytes before each character, and before the end."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    # From these code points on, UTF-8 takes 2, 3, and 4 bytes.
    lengths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(lengths)])


def _looks_local(name: str) -> bool:
    """Return whether the name is an existing path or cannot be a name on the hub, so that the hub is not contacted."""
    return (
        os.path.exists(os.path.expanduser(name))
        or name.startswith((".", "~", os.sep))
        or name.count("/") > 1
        or name.endswith((os.sep, ".json", ".model"))
        or os.path.isdir(os.path.dirname(name))
        or bool(_near_folders(name))
    )


def _folder_files(name: str) -> list[Path]:
    folder = Path(name).expanduser()
    if folder.name == "tokenizer.json" and folder.is_file():
        folder = folder.parent
    if not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"data.tokenizer ({name}): {folder / 'tokenizer.json'} does not exist; it must be a folder with that file"
            f"{''.join(f' (did you mean {near}?)' for near in _near_folders(name))}. The hub is not asked for a path. "
            "Correct the path, or make the file with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    # Only generation needs the chat template, so a folder without it is complete.
    candidates = [folder / name for name in (*_SETTINGS_FILES, TEMPLATE_FILE)]
    return [folder / "tokenizer.json", *(path for path in candidates if path.is_file())]


def _near_folders(name: str) -> list[str]:
    """Return folders beside ``name`` whose names differ by a letter or two, for a name that is mistyped."""
    parent, last = os.path.split(os.path.expanduser(name))
    if not os.path.isdir(parent or "."):
        return []
    folders = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()]
    return [os.path.join(parent, near) for near in difflib.get_close_matches(last, folders, n=1, cutoff=0.7)]


def _hub_files(name: str) -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        with log_slow_wait(f"the hub's answer about the tokenizer {name} (data.tokenizer)"):
            files = [Path(hf_hub_download(name, file)) for file in ("tokenizer.json", "tokenizer_config.json")]
            # Not every tokenizer has a template in a file of its own.
            with contextlib.suppress(EntryNotFoundError):
                files.append(Path(hf_hub_download(name, TEMPLATE_FILE)))
            return files
    except Exception as error:  # no such name, no such file, no network, no permission: many types
        raise DataError(
            f"data.tokenizer ({name}): cannot be fetched from the hub: {short(error)}; it must be bytes, a folder or "
            "a name on the hub that has a tokenizer.json. Correct the name, or use a local folder"
        ) from error


def _document_spelling(name: str, files: Sequence[Path]) -> str:
    settings: dict[str, Any] = {}
    for file in reversed(files):  # tokenizer_config.json has the last word
        try:
            settings |= json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(
                f"data.tokenizer ({name}): {file} is not JSON: {error}; it must hold the tokenizer's settings; save it "
                "again with save_pretrained"
            ) from error
    for key in ("eos_token", "bos_token"):
        token = settings.get(key)
        spelling = token.get("content") if isinstance(token, dict) else token
        if spelling:
            return str(spelling)
    raise DataError(
        f"data.tokenizer ({name}): has neither eos_token nor bos_token, and one must mark where documents begin; "
        "set eos_token in tokenizer_config.json to a token of the vocabulary, or choose another tokenizer"
    )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
