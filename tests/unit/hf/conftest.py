"""Fixtures of the Hugging Face tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from hf_cases import CONFIGS, VOCAB_SIZE, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loopline.models.looped_lm import LoopedLM


@pytest.fixture(scope="session", autouse=True)
def _own_module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Loading an export copies its code to transformers' module cache; keep that out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("hf_modules")
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
        patch.syspath_prepend(str(cache))
        transformers.utils.logging.disable_progress_bar()
        yield


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> LoopedLM:
    """The training model of every case in turn."""
    return build(request.param)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer with fewer tokens than the models' vocabulary."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|pad|>", "<unk>"]
    tokenizer.train_from_iterator(
        ["loops within loops within loops"] * 4,
        trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 7, special_tokens=special, show_progress=False),
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(folder)
    return folder
