"""Several data sets in one stream, by weight: which source gives the next sequence of a lane.

Every lane holds one `LaneStream` per source and takes whole sequences from them, so a source's sequences and their
order are those it has alone. The choice is Tijdeman's for the chairman assignment problem (Discrete Mathematics 32,
1980): in a lane, at any time since the weights last changed, a source's tokens differ from its share of all tokens by
less than one sequence. It needs no random numbers and only integers, so it is the same on every machine.

A source that has been read `max_epochs` times in a lane drops out of it, and the others share its weight. Whether that
leaves one to the end of a run is `supply.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from loopline.data_pipeline.errors import DataError
from loopline.data_pipeline.lane import LaneState, LaneStream
from loopline.data_pipeline.manifest import Manifest
from loopline.data_pipeline.packing import PackedSequence

WEIGHT_UNIT = 2**32


@dataclass(frozen=True)
class Source:
    """One data set of a mixture.

    Attributes:
        name: as metrics and the schedule name it.
        weight: share of the tokens, relative to the other sources'; 0 rests. None is its number of tokens.
        max_epochs: times it is read at most; None is no limit.
    """

    name: str
    manifest: Manifest
    weight: float | None = None
    max_epochs: int | None = None


@dataclass(frozen=True)
class Mixture:
    """Weighted sources.

    Attributes:
        temperature: tau; weights become weight^(1 / tau), so that above 1 small sources gain.
        schedule: step -> source name -> weight; from that step on, instead of the sources' own.
    Raises:
        DataError: no sources; names or data twice; tokenizers that differ; weights that are none.
    """

    sources: tuple[Source, ...]
    temperature: float = 1.0
    schedule: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_sources(self.sources)
        if not self.temperature > 0:
            raise DataError(f"data.temperature = {self.temperature} must be above 0; 1 leaves weights as they are")
        names = [source.name for source in self.sources]
        given = [source.weight is not None for source in self.sources]
        if any(given) != all(given):
            raise DataError(
                f"data.sources: {names[given.index(False)]!r} has no weight, {names[given.index(True)]!r} has one; "
                "give every source a weight, or none to weigh them by their tokens"
            )
        for step, weights in self.schedule.items():
            if set(weights) != set(names):
                raise DataError(
                    f"data.schedule at step {step} has weights for {', '.join(sorted(weights)) or 'nothing'}; give one "
                    f"for each source: {', '.join(names)} (0 lets a source rest)"
                )
        for step in (0, *self.schedule):
            raw = self._raw_weights(step)
            if min(raw) < 0 or not 0 < sum(raw) < float("inf"):
                raise DataError(
                    f"weights of data.sources at step {step} are {dict(zip(names, raw))}; they must be 0 or more, and "
                    "one above 0"
                )

    @property
    def data_id(self) -> str:
        """Identity of the training tokens: the sources' own, sorted and joined by +."""
        return "+".join(sorted(source.manifest.content_sha256("train") for source in self.sources))

    def weights_at(self, step: int) -> tuple[int, ...]:
        """The sources' weights for a step, in order; integers that add up to about `WEIGHT_UNIT`."""
        tempered = [weight ** (1 / self.temperature) for weight in self._raw_weights(step)]
        total = sum(tempered)
        # Rounded, so that the last bit of a power, which platforms compute differently, decides nothing.
        return tuple(max(1, round(weight / total * WEIGHT_UNIT)) if weight else 0 for weight in tempered)

    def _raw_weights(self, step: int) -> list[float]:
        begun = [start for start in self.schedule if start <= step]
        if begun:
            return [float(self.schedule[max(begun)][source.name]) for source in self.sources]
        return [
            float(source.manifest.split("train").n_tokens if source.weight is None else source.weight)
            for source in self.sources
        ]


def is_extension(saved: str, now: str) -> bool:
    """Whether data of the second `data_id` holds all of the first: what a run may go on with."""
    return set(saved.split("+")) <= set(now.split("+"))


def choose_source(weights: Sequence[int], tokens: Sequence[int], seq_len: int) -> int:
    """The source of a lane's next sequence (Tijdeman 1980).

    Args:
        weights: >= 0, one above 0.
        tokens: given by each source since these weights hold; 0 where the weight is 0.
        seq_len: most tokens the sequence may have.
    Returns:
        Of the sources whose share of what will then have been given is far enough ahead of what they gave, the one
        that must give a sequence soonest.
    """
    active = [i for i, weight in enumerate(weights) if weight]
    if len(active) == 1:
        return active[0]
    total, given, c = sum(weights), sum(tokens) + seq_len, 2 * len(active) - 2
    due = [i for i in active if c * (weights[i] * given - tokens[i] * total) >= seq_len * total]
    return min(due, key=lambda i: (Fraction(c * tokens[i] + (c - 1) * seq_len, weights[i]), i))


class MixtureLane:
    """One lane of a mixture.

    Its state is a dict of plain JSON: `lane`, `step`, and per source, by the name of its order of tokens, the state of
    its `LaneStream`, the `weight` it had, `tokens` given since the weights changed, `total_tokens` given in all, and
    `ended_after`, the `max_epochs` it has reached.
    """

    def __init__(
        self,
        mixture: Mixture,
        streams: Sequence[LaneStream],
        *,
        lane: int,
        seq_len: int,
        step: int,
        states: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Args:
        streams: one per source, opened at its place.
        step: steps done.
        states: as in a saved state; a source without one is new.
        """
        self._mixture = mixture
        self._streams = streams
        self._lane = lane
        self._seq_len = seq_len
        self._step = step
        saved = [states.get(stream.stream_id, {}) for stream in streams]
        self._weights = [each.get("weight", 0) for each in saved]
        self._tokens = [each.get("tokens", 0) for each in saved]
        self._total_tokens = [each.get("total_tokens", 0) for each in saved]
        # A run with one data set keeps no count; every step of it has given the same.
        self._uncounted = next((i for i, each in enumerate(saved) if each and "total_tokens" not in each), None)
        self._ended = [
            source.max_epochs is not None and each.get("ended_after", 0) >= source.max_epochs
            for source, each in zip(mixture.sources, saved)
        ]
        self.state: LaneState = self._state()

    def take(self, n_sequences: int) -> list[PackedSequence]:
        """One step's sequences.

        Raises:
            DataError: every source with a weight has reached its max_epochs; a damaged shard.
        """
        if self._uncounted is not None:
            self._total_tokens[self._uncounted] = self._step * n_sequences * self._seq_len
            self._uncounted = None
        weights = self._mixture.weights_at(self._step)
        sequences = [self._next(weights) for _ in range(n_sequences)]
        self._step += 1
        self.state = self._state()
        return sequences

    def _next(self, weights: Sequence[int]) -> PackedSequence:
        while True:
            active = [0 if ended else weight for weight, ended in zip(weights, self._ended)]
            if not any(active):
                names = [s.name for s, weight in zip(self._mixture.sources, weights) if weight]
                raise DataError(
                    f"the data is used up at step {self._step} in lane {self._lane}: {', '.join(names)} reached "
                    "max_epochs, and no other source has a weight. Raise max_epochs in data.sources, add a source, or "
                    "lower train.steps"
                )
            if active != self._weights:
                self._weights, self._tokens = active, [0] * len(active)
            i = choose_source(active, self._tokens, self._seq_len)
            taken = next(self._streams[i], None)
            if taken is None:
                self._ended[i] = True
                continue
            n_tokens = self._seq_len - taken[0].n_padding
            self._tokens[i] += n_tokens
            self._total_tokens[i] += n_tokens
            return taken[0]

    def _state(self) -> LaneState:
        sources = {
            stream.stream_id: {
                "state": stream.state,
                "weight": self._weights[i],
                "tokens": self._tokens[i],
                "total_tokens": self._total_tokens[i],
                "ended_after": self._mixture.sources[i].max_epochs if self._ended[i] else 0,
            }
            for i, stream in enumerate(self._streams)
        }
        return {"lane": self._lane, "step": self._step, "sources": sources}


def sources_of(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sources' states in a lane's state; that of a run with one data set is its only source's.

    Raises:
        DataError: it is neither.
    """
    if "sources" not in state:
        return {str(state.get("stream")): {"state": state}}
    sources = state["sources"]
    names = ("weight", "tokens", "total_tokens", "ended_after")
    is_good = isinstance(sources, Mapping) and all(
        isinstance(each, Mapping)
        and set(each) == {"state", *names}
        and all(type(each[name]) is int and each[name] >= 0 for name in names)
        for each in sources.values()
    )
    if not is_good or type(state.get("step")) is not int or set(state) != {"lane", "step", "sources"}:
        raise DataError(
            f"data state {json.dumps(state)[:300]} is not one that a mixture wrote. Use an unedited checkpoint, or "
            "start without data state"
        )
    return sources


def _check_sources(sources: Sequence[Source]) -> None:
    if not sources:
        raise DataError("data.sources is empty; list at least one source")
    for what, values in {
        "name": [source.name for source in sources],
        "data": [source.manifest.content_sha256("train") for source in sources],
    }.items():
        twice = [source.name for source, value in zip(sources, values) if values.count(value) > 1]
        if twice:
            raise DataError(
                f"data.sources: {', '.join(twice)} have the same {what}; give sources their own names, and list a data "
                "set once, with the sum of its weights"
            )
    first = sources[0]
    for source in sources[1:]:
        if _vocabulary(source.manifest) != _vocabulary(first.manifest):
            raise DataError(
                f"data.sources: {source.name} ({source.manifest.path}) was built with another tokenizer than "
                f"{first.name} ({first.manifest.path}); build it again with `loopline data build --tokenizer "
                f"{first.manifest.folder / first.manifest.tokenizer.file}`"
            )


def _vocabulary(manifest: Manifest) -> tuple[str, int, int]:
    return manifest.tokenizer.sha256, manifest.vocab_size, manifest.eos_id
