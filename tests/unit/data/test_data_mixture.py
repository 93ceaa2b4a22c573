"""Several data sets in one stream: exact shares, places kept, sources that end, join or change weight."""

import json
import logging
from collections import Counter, deque
from itertools import islice

import numpy as np
import pytest

from loopline.data_pipeline.batch import Batch
from loopline.data_pipeline.digest import batch_digest
from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.mixture import WEIGHT_UNIT, Mixture, Source, choose_source, is_extension
from loopline.data_pipeline.stream import GlobalBatchStream
from loopline.data_pipeline.supply import check_supply
from loopline.pretrain import corpus
from loopline.pretrain.config import load_config
from loopline.pretrain.errors import ConfigError
from loopline.pretrain.train import open_stream

SEQ_LEN = 8
N_LANES = 2
STREAM = {"seed": 5, "seq_len": SEQ_LEN, "n_lanes": N_LANES, "global_batch_sequences": 4, "shuffle_records": 2}
FIRST_TOKEN = {"a": 10, "b": 100, "c": 200}


@pytest.fixture
def manifests(save_documents):
    """Three data sets of tokens 10.., 100.., 200.., so that a token tells its source."""
    sizes = {"a": 40, "b": 25, "c": 12}
    return {
        name: save_documents([[FIRST_TOKEN[name] + (i + j) % 90 for j in range(5 + i % 7)] for i in range(n)])
        for name, n in sizes.items()
    }


def mix(manifests, weights, *, max_epochs=None, **settings):
    sources = [Source(name, manifests[name], weight, (max_epochs or {}).get(name)) for name, weight in weights.items()]
    return Mixture(tuple(sources), **settings)


def source_of(token):
    return next(name for name, first in reversed(FIRST_TOKEN.items()) if token >= first)


def open_ranks(data, dp_size=1, states=None, **settings):
    return [
        GlobalBatchStream(data, **{**STREAM, **settings}, dp_rank=rank, dp_size=dp_size, states=states)
        for rank in range(dp_size)
    ]


def states_of(ranks):
    return json.loads(json.dumps({lane: state for rank in ranks for lane, state in rank.state_dict().items()}))


def read(ranks, n_steps):
    """Digests, and per lane the source of every sequence in turn. A sequence holds one source's tokens and eos."""
    digests, sources = [], {lane: [] for lane in range(N_LANES)}
    for _ in range(n_steps):
        batches = [next(rank) for rank in ranks]
        digests.append(batch_digest(batches))
        rows = sorted((int(i), row) for b in batches for i, row in zip(b.global_index, b.tokens.tolist()))
        for index, row in rows:
            [name] = {source_of(token) for token in row if token > 0} or {"padding"}
            sources[index % N_LANES].append(name)
    return digests, sources


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_each_lane_has_the_weights_to_within_one_sequence_at_every_step(manifests, packing):
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    ranks = open_ranks(mix(manifests, weights), packing=packing)
    for _ in range(60):
        next(ranks[0])
        for state in ranks[0].state_dict().values():
            tokens = [source["tokens"] for source in state["sources"].values()]
            for n, weight in zip(tokens, weights.values()):
                assert abs(n - weight * sum(tokens)) < SEQ_LEN


def test_figures_are_the_realised_mix(manifests):
    [stream] = open_ranks(mix(manifests, {"a": 3, "b": 1}))
    counts = Counter()
    for _ in range(20):
        batch = next(stream)
        counts.update(source_of(token) for token in batch.tokens.max(axis=1))
        figures = stream.figures(batch)
        shares = {name: n / d for name, (n, d) in figures.items()}
        assert shares == {f"mix/{name}": counts[name] / counts.total() for name in ("a", "b")}
    assert shares == {"mix/a": 0.75, "mix/b": 0.25}


def test_a_source_gives_the_sequences_it_gives_alone(manifests):
    [mixed] = open_ranks(mix(manifests, {"a": 2, "b": 1}))
    [alone] = open_ranks(manifests["b"], global_batch_sequences=N_LANES)
    expected = [next(alone).tokens for _ in range(20)]
    found = {lane: [] for lane in range(N_LANES)}
    for _ in range(20):
        batch = next(mixed)
        for index, row in zip(batch.global_index, batch.tokens):
            if source_of(row.max()) == "b":
                found[int(index) % N_LANES].append(row)
    for lane, rows in found.items():
        assert len(rows) > 10
        np.testing.assert_array_equal(rows, [batch[lane] for batch in expected[: len(rows)]])


@pytest.mark.parametrize("stop", [1, 7, 12, 13, 30])
def test_resuming_a_mixture_on_other_ranks_is_exact(manifests, stop):
    """Through a change of weights at step 12, and sources that end."""
    data = mix(
        manifests, {"a": 3, "b": 1, "c": 1}, max_epochs={"c": 1, "b": 2}, schedule={12: {"a": 1, "b": 2, "c": 2}}
    )
    expected, sources = read(open_ranks(data), 60)
    assert {len(set(names[-10:])) for names in sources.values()} == {1}  # b and c have ended
    first = open_ranks(data, 2)
    head, _ = read(first, stop)
    tail, _ = read(open_ranks(data, 1, states_of(first)), 60 - stop)
    assert head + tail == expected


def test_weights_change_at_their_step(manifests):
    data = mix(manifests, {"a": 1, "b": 0}, schedule={3: {"a": 0, "b": 1}, 5: {"a": 1, "b": 1}})
    _, sources = read(open_ranks(data), 9)
    for names in sources.values():
        assert names[:6] == ["a"] * 6
        assert names[6:10] == ["b"] * 4
        assert Counter(names[10:]) == {"a": 4, "b": 4}


def test_temperature_lifts_small_sources(manifests):
    def shares(temperature):
        weights = mix(manifests, {"a": 8, "b": 2, "c": 0}, temperature=temperature).weights_at(0)
        return [round(weight / WEIGHT_UNIT, 6) for weight in weights]

    assert shares(1) == [0.8, 0.2, 0]
    assert shares(2) == [round(2 / 3, 6), round(1 / 3, 6), 0]
    by_tokens = mix(manifests, {"a": None, "b": None}).weights_at(0)
    n_tokens = [manifests[name].split("train").n_tokens for name in "ab"]
    assert by_tokens == tuple(round(n / sum(n_tokens) * WEIGHT_UNIT) for n in n_tokens)


def test_a_source_that_was_read_often_enough_leaves_its_weight_to_the_others(manifests, caplog):
    data = mix(manifests, {"a": 1, "b": 1, "c": 1}, max_epochs={"c": 1})
    with caplog.at_level(logging.WARNING):
        ranks = open_ranks(data, packing="best_fit")
        seen = Counter()
        for _ in range(60):
            seen.update(next(ranks[0]).tokens.ravel().tolist())
    expected = Counter()
    for i in range(12):
        expected.update(200 + (i + j) % 90 for j in range(5 + i % 7))
    assert {token: n for token, n in seen.items() if token >= 200} == expected  # every document of c, once
    shares = {name: n / d for name, (n, d) in ranks[0].figures(next(ranks[0])).items()}
    assert shares["mix/c"] == 0
    assert abs(shares["mix/a"] - 0.5) < 0.05
    messages = [record.message for record in caplog.records]
    assert sorted(messages) == [
        f"lane {lane} has read data source c 1 times, its max_epochs: the other sources share its weight"
        for lane in range(N_LANES)
    ]


def test_used_up_data_is_an_error_that_says_so(manifests):
    [stream] = open_ranks(mix(manifests, {"b": 1, "c": 1}, max_epochs={"b": 1, "c": 2}))
    with pytest.raises(DataError, match=r"used up at step \d+ in lane \d: b, c reached max_epochs.* Raise max_epochs"):
        list(islice(stream, 1000))


def test_more_epochs_on_resume_bring_a_source_back(manifests):
    short = mix(manifests, {"a": 1, "c": 1}, max_epochs={"c": 1})
    ranks = open_ranks(short)
    read(ranks, 30)
    _, sources = read(open_ranks(mix(manifests, {"a": 1, "c": 1}, max_epochs={"c": 2}), 1, states_of(ranks)), 4)
    assert all("c" in names for names in sources.values())


def test_a_source_joins_at_a_step_and_the_others_keep_their_places(manifests):
    """From a run with one data set as well, whose states name no step."""
    expected, _ = read(open_ranks(manifests["a"]), 30)
    ranks = open_ranks(manifests["a"])
    digests, _ = read(ranks, 10)
    resting = mix(manifests, {"b": 0, "a": 1}, schedule={20: {"a": 1, "b": 1}})
    ranks = open_ranks(resting, 2, states_of(ranks), step=10)
    digests += read(ranks, 10)[0]
    assert digests == expected[:20]  # b rests, so this is the run without it
    three = mix(manifests, {"c": 2, "a": 1, "b": 1})
    before = states_of(ranks)
    ranks = open_ranks(three, 1, before)
    for lane, state in states_of(ranks).items():
        assert {n: s["state"] for n, s in before[lane]["sources"].items()}.items() <= {
            n: s["state"] for n, s in state["sources"].items()
        }.items()
    _, sources = read(ranks, 4)
    assert all(Counter(names) == {"a": 2, "b": 2, "c": 4} for names in sources.values())


def test_the_identity_of_a_mixture_is_that_of_its_sources(manifests):
    one, two = mix(manifests, {"a": 1}), mix(manifests, {"a": 1, "b": 1})
    assert one.data_id == manifests["a"].content_sha256("train")
    assert two.data_id == mix(manifests, {"b": 9, "a": 0.1}).data_id != one.data_id
    assert is_extension(one.data_id, two.data_id)
    assert not is_extension(two.data_id, one.data_id)


def test_bad_mixtures_are_refused(manifests, save_documents):
    a, b = manifests["a"], manifests["b"]
    other = save_documents([[1]] * 5, vocab_size=301)
    for sources, settings, message in [
        ([], {}, r"data.sources is empty"),
        ([Source("a", a, 1), Source("a", b, 1)], {}, r"a, a have the same name"),
        ([Source("a", a, 1), Source("b", a, 1)], {}, r"a, b have the same data"),
        ([Source("a", a, 1), Source("o", other, 1)], {}, r"o .* was built with another tokenizer than a"),
        ([Source("a", a, 1), Source("b", b)], {}, r"'b' has no weight, 'a' has one"),
        ([Source("a", a, -1), Source("b", b, 1)], {}, r"at step 0 are {'a': -1.0, 'b': 1.0}; they must be 0 or more"),
        ([Source("a", a, 0)], {}, r"one above 0"),
        ([Source("a", a, 1)], {"temperature": 0}, r"data.temperature = 0 must be above 0"),
        ([Source("a", a, 1)], {"schedule": {3: {"b": 1}}}, r"at step 3 has weights for b; give one for each source: a"),
        ([Source("a", a, 1)], {"schedule": {3: {"a": 0}}}, r"at step 3 are {'a': 0.0}"),
    ]:
        with pytest.raises(DataError, match=message):
            Mixture(tuple(sources), **settings)


def test_states_of_other_mixtures_are_refused(manifests):
    ranks = open_ranks(mix(manifests, {"a": 1, "b": 1}))
    read(ranks, 2)
    states = states_of(ranks)
    with pytest.raises(DataError, match=r"that this mixture lacks: a source was removed .keep it and give it weight 0"):
        open_ranks(mix(manifests, {"a": 1}), 1, states)
    states["0"]["sources"]["x"] = {"state": {}}
    with pytest.raises(DataError, match=r"is not one that a mixture wrote"):
        open_ranks(mix(manifests, {"a": 1, "b": 1}), 1, states)


def sources_override(manifests, **fields):
    """`--set data.sources=[...]` of a and b, as TOML."""
    entries = [
        ", ".join(f"{key} = {json.dumps(value)}" for key, value in {"name": name, "manifest": path, **extra}.items())
        for name, extra in fields.items()
        for path in [str(manifests[name].path)]
    ]
    return "data.sources=[" + ", ".join("{" + entry + "}" for entry in entries) + "]"


SMALL_RUN = ["data.manifest=''", "train.seq_len=8", "train.global_batch_sequences=4", "data.lanes=2", "run.seed=5"]


def test_a_recipe_opens_the_mixture_it_names(manifests):
    """With the settings of `STREAM`; through the JSON of a checkpoint too."""
    sources = sources_override(manifests, a={"weight": 3, "max_epochs": 50}, b={"weight": 1})
    schedule = "data.schedule=[{step = 4, weights = {a = 1, b = 2}}]"
    config = load_config("debug", [*SMALL_RUN, sources, schedule, "data.temperature=2", "data.shuffle_records=2"])
    assert type(config).model_validate(config.model_dump(mode="json")) == config
    data = corpus.open_data(config, 0)
    expected = mix(manifests, {"a": 3, "b": 1}, max_epochs={"a": 50}, temperature=2.0, schedule={4: {"a": 1, "b": 2}})
    assert data.data_id == corpus.data_id(data) == expected.data_id
    assert corpus.main_manifest(data).path == corpus.open_corpus(config, 0).path == manifests["a"].path
    assert read([open_stream(config, data, 0, 1, None)], 20) == read(open_ranks(expected), 20)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.manifest='x'"], r"data.manifest = 'x' and data.sources .a, b. are both given: keep one"),
        (["data.sources=[]"], r"data.manifest is empty and data.sources has no entry"),
        (["data.sources=[]", "data.manifest='x'", "data.temperature=2"], r"data.temperature need data.sources"),
        (["data.schedule=[{step=2, weights={a=1}}]"], r"at step 2 has weights for a; give one for each of a, b"),
        (["data.schedule=[{step=2, weights={a=0, b=0}}]"], r"one of them above 0"),
        (["data.schedule=[{step=2, weights={a=1, b=0}}, {step=2, weights={a=1, b=0}}]"], r"\[2, 2\]; they must rise"),
        (["data.sources=[{name='a', manifest='x'}, {name='a', manifest='y'}]"], r"a name twice: a, a"),
        (["data.sources=[{name='a', manifest='x', weight=1}, {name='b', manifest='y'}]"], r"or give none a weight"),
        (["data.sources=[{name='a', manifest='x', wieght=1}]"], r"unknown key data.sources.0.wieght.*weight"),
        (["data.sources=[{name='a/b', manifest='x'}]"], r"data.sources.0.name = 'a/b'"),
        (["data.packing=first"], r"data.packing = 'first'"),
        (["data.workers=-1"], r"data.workers = -1"),
    ],
)
def test_bad_recipes_are_refused(manifests, overrides, message):
    sources = sources_override(manifests, a={"weight": 1}, b={"weight": 1})
    with pytest.raises(ConfigError, match=message):
        load_config("debug", [*SMALL_RUN, sources, *overrides])


def is_refused(data, n_steps, states=None, step=0, **settings):
    """Whether a run that goes on at `step` and ends at `n_steps` is refused for want of data."""
    settings = {**STREAM, **settings}
    [stream] = open_ranks(data, 1, states, step=step, **settings)
    try:
        check_supply(
            data,
            stream.state_dict(),
            seed=settings["seed"],
            seq_len=settings["seq_len"],
            sequences_per_lane=settings["global_batch_sequences"] // settings["n_lanes"],
            step=step,
            n_steps=n_steps,
        )
    except DataError:
        return True
    return False


def last_step(data, states=None, step=0, **settings):
    """The steps a run has when its data is used up."""
    [stream] = open_ranks(data, 1, states, step=step, **settings)
    batches: list[Batch] = []
    with pytest.raises(DataError, match=r"used up at step"):
        deque(map(batches.append, stream), maxlen=0)
    return step + len(batches)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n_lanes", [1, 2, 4])
def test_a_run_is_refused_exactly_where_a_lane_runs_out(manifests, seed, n_lanes):
    """From its start, from a checkpoint, and where the checkpoint is of a run with one of the data sets."""
    settings = {"seed": seed, "n_lanes": n_lanes}
    data = mix(manifests, {"a": 3, "b": 1, "c": 2}, max_epochs={"a": 1, "b": 2, "c": 3})
    n_steps = last_step(data, **settings)
    assert not is_refused(data, n_steps, **settings)
    assert is_refused(data, n_steps + 1, **settings)
    for before in (data, manifests["a"]):
        ranks = open_ranks(before, **settings)
        for step in range(1, 5):
            next(ranks[0])
            saved = {"states": states_of(ranks), "step": step}
            n_steps = last_step(data, **saved, **settings)
            assert not is_refused(data, n_steps, **saved, **settings)
            assert is_refused(data, n_steps + 1, **saved, **settings)
            ranks = open_ranks(data, 1, **saved, **settings)


def test_lanes_may_run_out_before_the_total(manifests):
    """Why totals do not tell: a lane has its own records, other ones in each epoch."""
    data = mix(manifests, {"a": 1, "b": 1}, max_epochs={"a": 1, "b": 1})
    n_tokens = sum(manifests[name].split("train").n_tokens for name in "ab")
    n_steps = n_tokens // (STREAM["global_batch_sequences"] * 2)
    assert last_step(data, n_lanes=4, seq_len=2) < n_steps
    assert is_refused(data, n_steps, n_lanes=4, seq_len=2)


SCHEDULES = [
    # Phases that share no source; that share all; that share some, with and without sources that end on the way.
    ({"a": 1, "b": 0, "c": 0}, {"a": 80}, {150: {"a": 0, "b": 2, "c": 1}}),
    ({"a": 1, "b": 1, "c": 1}, {}, {150: {"a": 8, "b": 1, "c": 1}, 300: {"a": 1, "b": 1, "c": 8}}),
    ({"a": 6, "b": 3, "c": 1}, {"a": 80}, {200: {"a": 0, "b": 1, "c": 1}}),
    ({"a": 6, "b": 3, "c": 1}, {"a": None}, {200: {"a": 0, "b": 1, "c": 1}}),
    ({"a": 1, "b": 4, "c": 4}, {"a": 80, "c": 8}, {400: {"a": 0, "b": 1, "c": 1}, 500: {"a": 1, "b": 0, "c": 1}}),
]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize(("weights", "max_epochs", "schedule"), SCHEDULES)
def test_a_run_over_a_schedule_is_refused_where_a_lane_may_run_out(manifests, packing, weights, max_epochs, schedule):
    """Never later than it does, and with whole sequences not much earlier."""
    data = mix(manifests, weights, max_epochs={"a": 20, "b": 20, "c": 20, **max_epochs}, schedule=schedule)
    settings = {"seq_len": 3 if packing == "best_fit" else 2, "packing": packing}
    n_steps = last_step(data, **settings)
    assert n_steps > max(schedule)
    assert is_refused(data, n_steps + 1, **settings)
    if packing == "concat":
        assert not is_refused(data, round(0.9 * n_steps), **settings)


def test_an_endless_source_lasts(manifests):
    data = mix(manifests, {"a": 1, "b": 1}, max_epochs={"b": 1}, schedule={90: {"a": 0, "b": 1}})
    assert not is_refused(data, 90)
    assert is_refused(data, 200)
    assert not is_refused(mix(manifests, {"a": 0.001, "b": 1}, max_epochs={"b": 1}), 10**9)


def test_a_run_that_its_sources_do_not_last_is_refused_before_it_starts(manifests):
    sources = sources_override(manifests, a={"max_epochs": 1}, b={"max_epochs": 2})
    settings = [*SMALL_RUN, sources, "data.shuffle_records=2"]
    data = corpus.open_data(load_config("debug", settings), 0)
    n_steps = last_step(data)

    def check(*overrides):
        config = load_config("debug", [*settings, *overrides])
        corpus.check_supply(config, data, open_stream(config, data, 0, 1, None).state_dict(), 0)

    check(f"train.steps={n_steps}")
    check(f"train.steps={n_steps + 1}", f"train.stop_at_step={n_steps}")
    message = (
        rf"data.sources run out in lane [01] of 2 at step {n_steps} or soon after, the run ends at step {n_steps + 1}: "
        rf"from step 0 on a, b, each read max_epochs times, are sure to have {2 * n_steps}|{2 * n_steps + 1} sequences "
        rf"of 8 tokens there, and {2 * n_steps + 2} are needed. Raise max_epochs in data.sources, add a source"
    )
    with pytest.raises(DataError, match=message):
        check(f"train.steps={n_steps + 1}")


def test_the_choice_never_changes():
    # Frozen: if these change, no mixture resumes exactly.
    tokens, chosen = [0, 0, 0], []
    for _ in range(12):
        chosen.append(choose_source([5, 3, 2], tokens, 10))
        tokens[chosen[-1]] += 10
    assert chosen == [0, 1, 0, 2, 0, 1, 0, 2, 1, 0, 0, 1]
