"""Tokenizers: train a byte-level BPE, load any fast one, and keep the files Hugging Face needs beside it.

The tokenizer's identity is the sha256 of `tokenizer.json`; the manifest records it. Chat templates and any other use
of a tokenizer are Hugging Face's business.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loopline.data_pipeline.errors import DataError

EOS_TOKEN = "<|endoftext|>"  # also what begins a text, where a user wants that
PAD_TOKEN = "<|pad|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# What marks a folder as a tokenizer in another format.
_CONVERTIBLE = (CONFIG_FILES[0], "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")

_N_BYTES = 256
MIN_VOCAB_SIZE = _N_BYTES + 2
# Far above any real one. The library sets memory aside for every entry first, and ends the process where it gets none.
MAX_VOCAB_SIZE = 2**24


class TokenizerFile:
    """A `tokenizer.json` and the ids the pipeline needs from it.

    Attributes:
        path: the `tokenizer.json`; for a converted tokenizer, where its folder would have it.
        sha256: hex digest of its content.
        vocab_size: largest id + 1, added tokens included.
        eos_id, pad_id: pad_id is eos_id where the tokenizer has no padding token.
    """

    def __init__(self, path: str | Path, *, eos_id: int | None = None) -> None:
        """Loads a tokenizer file, or the tokenizer of a folder.

        A folder without `tokenizer.json` is one that `transformers` converts, such as `vocab.json` with `merges.txt`;
        it must have a fast form. Nothing is downloaded and no code in the folder is run.

        Args:
            eos_id: what ends a document, in place of the tokenizer's own end of text; copies carry it.
        Raises:
            DataError: no such file; not a tokenizer; no end-of-text token; eos_id is not in the vocabulary.
        """
        self.path = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        self._config = {name: _read_config(self.path.parent / name) for name in CONFIG_FILES}
        if self.path.is_file():
            self._content = self.path.read_bytes()
        elif Path(path).is_dir() and any((Path(path) / name).is_file() for name in _CONVERTIBLE):
            self._content, special = _convert(Path(path))
            self._config = {
                name: {**special, **(config or {})} if name == CONFIG_FILES[0] else config
                for name, config in self._config.items()
            }
        else:
            raise DataError(f"tokenizer {self.path} does not exist; give a tokenizer.json or the folder that holds it")
        self.sha256 = hashlib.sha256(self._content).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_str(self._content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {self.path} cannot be read ({error}); give a valid tokenizer.json") from None
        # A saved truncation or padding setting would silently drop or invent training tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token stays text, or a document could end itself in the middle.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if eos_id is not None:
            self._set_eos(eos_id)
        self.eos_id, self.pad_id = self._special_ids()

    def _set_eos(self, eos_id: int) -> None:
        token = self._tokenizer.id_to_token(eos_id) if eos_id >= 0 else None
        if token is None:
            raise DataError(
                f"eos id {eos_id} is no entry of tokenizer {self.path} ({self.vocab_size} ids); give the id that ends "
                "the documents, and the tokenizer they were made with"
            )
        if self._special_id("eos_token", EOS_TOKEN) != eos_id:
            self._config = {name: {**(config or {}), "eos_token": token} for name, config in self._config.items()}

    def _special_ids(self) -> tuple[int, int]:
        eos_id, pad_id = self._special_id("eos_token", EOS_TOKEN), self._special_id("pad_token", PAD_TOKEN)
        if eos_id is None:
            raise DataError(
                f"tokenizer {self.path} has no end-of-text token: neither {EOS_TOKEN!r} nor an `eos_token` of its "
                f"vocabulary in {self.path.parent / CONFIG_FILES[0]}. Documents must end with one; add it to that file"
            )
        return eos_id, eos_id if pad_id is None else pad_id

    def _special_id(self, key: str, default: str) -> int | None:
        token = (self._config[CONFIG_FILES[0]] or {}).get(key) or default
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no special tokens added; runs on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def lost_text(self, texts: Sequence[str]) -> list[str]:
        """Of every text with characters that no token stands for, some characters around the first of them.

        By the tokens' places in the text and not by decoding, since normalizers may change text and lose nothing. White
        space, control characters and combining marks do not count: they are what normalizers drop on purpose. The
        place is only near where a BPE drops characters, since it then counts the places after them too low.
        """
        model = json.loads(self._content)["model"]
        unknown = {model.get("unk_id"), self._tokenizer.token_to_id(model.get("unk_token") or "")}
        found = []
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            is_kept = [False] * len(text)
            for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if token not in unknown:
                    is_kept[start:end] = [True] * (end - start)
            lost = (i for i, is_here in enumerate(is_kept) if not is_here)
            first = next((i for i in lost if unicodedata.category(text[i])[0] not in "ZCM"), None)
            if first is not None:
                found.append(text[max(0, first - 20) : first + 20])
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def copy_to(self, folder: str | Path) -> "TokenizerFile":
        """Copies the tokenizer (byte for byte) and its Hugging Face files into `folder`; returns the copy."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        (target / TOKENIZER_FILE).write_bytes(self._content)
        for name, config in self._config.items():
            unchanged = _read_config(self.path.parent / name) == config
            if config is not None and unchanged:
                (target / name).write_bytes((self.path.parent / name).read_bytes())
            elif config is not None:
                _write_config(target / name, config)
        return TokenizerFile(target)


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); repair it, or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a JSON {type(config).__name__}, not an object; repair it, or remove it")
    return config


def _write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _convert(folder: Path) -> tuple[bytes, dict[str, str]]:
    """(content of a tokenizer.json, special tokens by name) of a folder in one of transformers' other formats."""
    from transformers import AutoTokenizer

    save = f"save it with `AutoTokenizer.from_pretrained(...).save_pretrained(...)` to a folder with {TOKENIZER_FILE}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_fast=True
        )
    # What it raises depends on the format: missing packages, damaged files, code that it may not run.
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"tokenizer {folder} cannot be converted ({reason}); {save}") from None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise DataError(f"tokenizer {folder} is a {type(tokenizer).__name__} without a fast form; {save}")
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return backend.to_str(pretty=True).encode("utf-8"), special


def check_vocab_size(vocab_size: int) -> None:
    """Raises DataError for a vocabulary that cannot be trained."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary holds {_N_BYTES} bytes and 2 special "
            f"tokens. Use at least {MIN_VOCAB_SIZE}"
        )
    if vocab_size > MAX_VOCAB_SIZE:
        raise DataError(f"vocab_size={vocab_size} is too large: use at most {MAX_VOCAB_SIZE}; 32000 to 256000 is usual")


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> TokenizerFile:
    """Trains a byte-level BPE and writes `tokenizer.json` and its Hugging Face files into `folder`.

    The result depends on the texts and `vocab_size` alone. `<|endoftext|>` is id 0 and `<|pad|>` is id 1. A small
    corpus can run out of pairs to merge; the vocabulary is then smaller than asked for.

    Raises:
        DataError: see `check_vocab_size`.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS_TOKEN, PAD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    target = Path(folder)
    # Written here and not by the library, whose errors for a full disk have no number.
    (target / TOKENIZER_FILE).write_bytes(tokenizer.to_str(pretty=True).encode("utf-8"))
    special = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, content in zip(CONFIG_FILES, ({**config, **special}, special), strict=True):
        _write_config(target / name, content)
    return TokenizerFile(target)
