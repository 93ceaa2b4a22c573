"""Byte-level BPE: train one, load one, and keep the files Hugging Face needs beside it.

The tokenizer's identity is the sha256 of `tokenizer.json`; the manifest records it. Chat templates and any other use
of a tokenizer are Hugging Face's business.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loopline.data_pipeline.errors import DataError

EOS_TOKEN = "<|endoftext|>"  # also what begins a text, where a user wants that
PAD_TOKEN = "<|pad|>"
TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")

_N_BYTES = 256
MIN_VOCAB_SIZE = _N_BYTES + 2


class TokenizerFile:
    """A `tokenizer.json` and the ids the pipeline needs from it.

    Attributes:
        path: the `tokenizer.json`.
        sha256: hex digest of that file.
        vocab_size: largest id + 1, added tokens included.
        eos_id, pad_id: pad_id is eos_id where the tokenizer has no padding token.
    """

    def __init__(self, path: str | Path) -> None:
        """Loads a tokenizer file, or the `tokenizer.json` in a folder.

        Raises:
            DataError: no such file; not a tokenizer; no end-of-text token.
        """
        self.path = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise DataError(f"tokenizer {self.path} does not exist; give a tokenizer.json or the folder that holds it")
        content = self.path.read_bytes()
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {self.path} cannot be read ({error}); give a valid tokenizer.json") from None
        # A saved truncation or padding setting would silently drop or invent training tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Text that spells a special token stays text, or a document could end itself in the middle.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id, self.pad_id = self._special_ids()

    def _special_ids(self) -> tuple[int, int]:
        config_path = self.path.parent / CONFIG_FILES[0]
        try:
            config = json.loads(config_path.read_bytes()) if config_path.is_file() else {}
        except ValueError as error:
            raise DataError(f"{config_path} is not JSON ({error}); repair it, or remove it") from None

        def id_of(key: str, default: str) -> int | None:
            token = config.get(key) or default
            return self._tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)

        eos_id, pad_id = id_of("eos_token", EOS_TOKEN), id_of("pad_token", PAD_TOKEN)
        if eos_id is None:
            raise DataError(
                f"tokenizer {self.path} has no end-of-text token: neither {EOS_TOKEN!r} nor an `eos_token` of its "
                f"vocabulary in {config_path}. Documents must end with one; add it to that file"
            )
        return eos_id, eos_id if pad_id is None else pad_id

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with no special tokens added; runs on all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def copy_to(self, folder: str | Path) -> "TokenizerFile":
        """Copies the tokenizer (byte for byte) and its Hugging Face files into `folder`; returns the copy."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, target / TOKENIZER_FILE)
        for name in CONFIG_FILES:
            if (self.path.parent / name).is_file():
                shutil.copyfile(self.path.parent / name, target / name)
        return TokenizerFile(target)


def train_tokenizer(texts: Iterable[str], folder: str | Path, *, vocab_size: int) -> TokenizerFile:
    """Trains a byte-level BPE and writes `tokenizer.json` and its Hugging Face files into `folder`.

    The result depends on the texts and `vocab_size` alone. `<|endoftext|>` is id 0 and `<|pad|>` is id 1. A small
    corpus can run out of pairs to merge; the vocabulary is then smaller than asked for.

    Raises:
        DataError: vocab_size < 258.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError(
            f"vocab_size={vocab_size} is too small: a byte-level vocabulary holds {_N_BYTES} bytes and 2 special "
            f"tokens. Use at least {MIN_VOCAB_SIZE}"
        )
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
    tokenizer.save(str(target / TOKENIZER_FILE))
    special = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    for name, content in zip(CONFIG_FILES, (config, special), strict=True):
        (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return TokenizerFile(target)
