"""The stream a run trains on is the one its configuration names."""

import pytest

from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.pretrain import corpus
from loopline.pretrain.config import load_config
from loopline.pretrain.train import open_stream

SETTINGS = {
    "data.shuffle=shards": {"shuffle": "shards"},
    "data.shuffle_records=2": {"shuffle_records": 2},
    "data.packing=best_fit": {"packing": "best_fit"},
    "data.lanes=8": {"n_lanes": 8},
    "run.seed=5": {"seed": 5},
    "train.seq_len=48": {"seq_len": 48},
    "train.global_batch_sequences=16": {"global_batch_sequences": 16},
}


@pytest.mark.parametrize("override", SETTINGS)
def test_a_setting_of_the_order_reaches_the_stream(override: str, data: str) -> None:
    config = load_config("debug", [data, override])
    manifest = corpus.main_manifest(corpus.open_data(config, 0))
    plain = {"seed": 0, "seq_len": 64, "n_lanes": 4, "global_batch_sequences": 8}
    expected = GlobalBatchStream(manifest, **plain | SETTINGS[override])  # type: ignore[arg-type]
    found = open_stream(config, manifest, 0, 1, None)
    assert found.state_dict() == expected.state_dict()  # it holds the name of the order
    for _ in range(3):
        a, b = next(found), next(expected)
        assert (a.tokens == b.tokens).all()
        assert (a.labels == b.labels).all()
