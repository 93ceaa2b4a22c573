"""Import of Megatron's indexed datasets: round trips with its own writer, and refusals of what does not add up."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.megatron_index import MegatronIndex, import_megatron
from loopline.data_pipeline.tokenizer import TokenizerFile

EOS = 0
DOCUMENTS = [[5, 6, EOS], [7], [8, 9, 299], [], [EOS], [1, 1, 1, EOS]]


@pytest.fixture
def write(tmp_path):
    """Writes documents (lists of sequences, or flat) as Megatron would; returns the prefix."""

    def write(documents, dtype=np.uint16, multimodal=False):
        prefix = tmp_path / "data_text_document"
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
        for document in documents:
            for sequence in document if document and isinstance(document[0], list) else [document]:
                builder.add_item(torch.tensor(sequence, dtype=torch.int64))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


@pytest.fixture(scope="session")
def tokenizer(small):
    return TokenizerFile(small.folder)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64])
def test_documents_come_back_whole_with_one_eos_at_the_end(write, tokenizer, all_documents, tmp_path, dtype):
    prefix = write(DOCUMENTS, dtype)
    manifest = import_megatron(prefix, tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0, record_tokens=4)
    assert all_documents(manifest) == [(5, 6, EOS), (7, EOS), (8, 9, 299, EOS), (1, 1, 1, EOS)]
    assert manifest.provenance.n_skipped == 2
    assert manifest.splits["train"].length_histogram == (0, 2, 2)
    manifest.verify()
    again = import_megatron(f"{prefix}.idx", tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0, record_tokens=4)
    assert again == manifest
    with pytest.raises(DataError, match=r"already holds other data: record_tokens 4 \(now 5\)"):
        import_megatron(prefix, tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0, record_tokens=5)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.lists(st.lists(st.lists(st.integers(0, 299), max_size=6), min_size=1, max_size=4), min_size=1, max_size=8))
def test_documents_of_several_sequences_are_joined(tmp_path_factory, documents):
    prefix = tmp_path_factory.mktemp("megatron") / "a"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        joined = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(joined, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    expected = [[token for sequence in document for token in sequence] for document in documents]
    if any(expected):
        assert [document.tolist() for document in MegatronIndex(prefix)] == expected
    else:
        with pytest.raises(DataError, match=r"there are no tokens"):
            MegatronIndex(prefix)


def test_another_eos_id_is_carried_by_the_tokenizer(write, small, all_documents, tmp_path):
    tokenizer = TokenizerFile(small.folder, eos_id=7)
    manifest = import_megatron(write([[5, 7], [6, 0]]), tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    assert all_documents(manifest) == [(5, 7), (6, 0, 7)]
    assert (manifest.eos_id, TokenizerFile(manifest.folder).eos_id) == (7, 7)
    assert manifest.tokenizer.sha256 == small.tokenizer.sha256
    for wrong in (-1, 300):
        with pytest.raises(DataError, match=rf"eos id {wrong} is no entry"):
            TokenizerFile(small.folder, eos_id=wrong)


def test_the_heldout_choice_is_that_of_a_build(write, tokenizer, all_documents, tmp_path):
    documents = [[i, EOS] for i in range(1, 200)]
    manifest = import_megatron(write(documents), tmp_path / "a", tokenizer=tokenizer, heldout_fraction=0.2, seed=3)
    train, heldout = all_documents(manifest, "train"), all_documents(manifest, "heldout")
    assert sorted(train + heldout) == [tuple(document) for document in documents]
    assert 20 < len(heldout) < 60


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"MMIDIDY", r"idx begins with b'MMIDIDY"),
        (9, struct.pack("<Q", 2), r"has version 2"),
        (17, b"\x07", r"has dtype code 7"),
        (17, b"\x00", r"has dtype code 0"),
        (18, struct.pack("<Q", 2**63), r"has 162 bytes, 9223372036854775808 sequences"),
        (26, struct.pack("<Q", 2**64 - 1), r"and 18446744073709551615 document bounds take"),
        (34, struct.pack("<i", -1), r"negative lengths or pointers"),
        (
            34,
            struct.pack("<i", 2**31 - 1),
            r"puts sequence 0 \(2147483647 tokens .* past the end of .*bin \(24 bytes\)",
        ),
        (34 + 24, struct.pack("<q", 2**63 - 1), r"puts sequence 0 .* at byte 9223372036854775807\) past the end"),
        (34 + 72, struct.pack("<q", 1), r"document bounds that do not rise from 0"),
        (34 + 72 + 8, struct.pack("<q", 5), r"document bounds that do not rise from 0"),
        (34 + 72 + 56, b"more", r"has 166 bytes"),
    ],
)
def test_an_index_that_does_not_add_up_is_refused(write, offset, data, message):
    prefix = write([[1, 2]] * 6)
    path = prefix.with_suffix(".idx")
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        MegatronIndex(prefix)


def test_other_unusable_pairs_are_refused(write, tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nothing.idx does not exist"):
        MegatronIndex(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"is multimodal"):
        MegatronIndex(write([[1, 2]], multimodal=True))
    with pytest.raises(DataError, match=r"dtype code 6"):
        MegatronIndex(write([[1, 2]], np.float64))
    prefix = write([[1, 2], [3, 300]])
    with pytest.raises(DataError, match=r"document 1 holds token 300, .* ids 0 to 299"):
        import_megatron(prefix, tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    with pytest.raises(DataError, match=r"document 0 holds token -3"):
        import_megatron(write([[-3, 2]], np.int32), tmp_path / "out", tokenizer=tokenizer, heldout_fraction=0)
    with pytest.raises(DataError, match=r"1 documents of .* left a split empty"):
        import_megatron(write([[1]]), tmp_path / "out", tokenizer=tokenizer, heldout_fraction=1e-9)
    with prefix.with_suffix(".bin").open("r+b") as file:
        file.truncate(1)
    with pytest.raises(DataError, match=r"past the end"):
        MegatronIndex(prefix)
