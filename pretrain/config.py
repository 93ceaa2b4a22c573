"""The run as strict frozen data: recipe files, overrides, and every check that needs no device. Torch-free.

A recipe is a short TOML file that may start from another (`base = "debug"`). `load_config` resolves it;
`RunConfig.validate_for(world_size)` gathers every problem of the whole and raises once.
"""

import difflib
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from loopline.data_pipeline.download import SCHEMES
from loopline.models.config import ModelConfig
from loopline.models.settings.section import Section
from loopline.pretrain.errors import ConfigError

_REMOTE_SCHEMES = set(SCHEMES) - {"file"}


def parse_recompute(text: str) -> frozenset[int] | None:
    """Loops whose blocks are recomputed: none is the empty set, all is None.

    Raises:
        ValueError: not 'none', 'all' or 'loops:i,j'.
    """
    if text == "none":
        return frozenset()
    if text == "all":
        return None
    kind, _, loops = text.partition(":")
    if kind == "loops" and loops and all(x.strip().isascii() and x.strip().isdigit() for x in loops.split(",")):
        return frozenset(int(x) for x in loops.split(","))
    raise ValueError(f"parallel.recompute is {text!r}; use 'none', 'all', or 'loops:0,1'")


class RunSection(Section):
    """Where the run lives and what seeds it."""

    dir: str = Field("runs/default", description="run directory: config, logs, metrics, checkpoints, exports")
    seed: int = Field(0, ge=0, description="seeds weights and data order")


class TrainSection(Section):
    """How much is trained, in what pieces."""

    steps: int = Field(10, ge=1, description="optimizer steps; the schedule's horizon")
    stop_at_step: int | None = Field(None, ge=1, description="stop (and save) here; the schedule still ends at `steps`")
    seq_len: int = Field(128, ge=1, description="tokens in a sequence")
    global_batch_sequences: int = Field(8, ge=1, description="sequences in one optimizer step, over all ranks")
    micro_batch_sequences: int = Field(2, ge=1, description="sequences a rank runs at once")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute dtype; weights and gradient sums are fp32")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trainable: Literal["all", "indexer"] = Field(
        "all", description="indexer: everything else is frozen, to warm up the indexers of dsa mixers"
    )
    max_skipped_steps: int = Field(0, ge=0, description="non-finite steps in a row that are skipped before stopping")
    hang_timeout_s: float = Field(
        1800.0, gt=0, le=604_800, description="dump stacks and end when a step takes longer than this"
    )


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(3e-4, gt=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final lr / peak lr")
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="wsd: constant, then linear decay")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: share of the steps spent decaying")
    betas: tuple[Decay, Decay] = Field((0.9, 0.95), strict=False)  # TOML and JSON have lists, not tuples
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0, description="on matrices, not on norms, gates, decays and convolutions")
    grad_clip: float = Field(1.0, gt=0, description="maximum global gradient norm")


class ParallelSection(Section):
    """The layout. Data-parallel size is what the world leaves: world / (tp * pp)."""

    tp: int = Field(1, ge=1, description="tensor-parallel size")
    pp: int = Field(1, ge=1, description="pipeline stages; loops are their virtual stages")
    sequence_parallel: bool = Field(False, description="norms and residuals sharded over tokens; needs tp > 1")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO; 2 and 3 need pp = 1")
    recompute: str = Field("none", description="'none', 'all', or 'loops:0,1': block outputs rebuilt in backward")

    @model_validator(mode="after")
    def _check(self) -> Self:
        parse_recompute(self.recompute)
        return self


class SourceSection(Section):
    """One corpus of a mixture."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="as metrics and data.schedule name it")
    manifest: str = Field(min_length=1, description="manifest.json of a built corpus, or 'bundled:NAME'")
    weight: float | None = Field(
        None, ge=0, description="share of the tokens, relative to the others'; 0: it rests; none: its tokens"
    )
    max_epochs: int | None = Field(None, ge=1, description="times it is read at most; none: no limit")


class WeightsSection(Section):
    """Weights from a step on."""

    step: int = Field(ge=1, description="first step (from 0) with these weights")
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(description="source name -> weight, for every source")


class DataSection(Section):
    """Which tokens, in which order."""

    manifest: str = Field(
        "bundled:stdlib", description="manifest.json of a built corpus (path or URL), or 'bundled:NAME'"
    )
    sources: tuple[SourceSection, ...] = Field(
        (), strict=False, description="corpora mixed by weight, instead of data.manifest, which is then ''"
    )
    temperature: float = Field(1.0, gt=0, description="weights become weight^(1/temperature); needs data.sources")
    schedule: tuple[WeightsSection, ...] = Field(
        (), strict=False, description="weights that replace those of data.sources from given steps on"
    )
    cache_dir: str = Field("data", description="where bundled corpora are built and remote shards are kept")
    lanes: int = Field(8, ge=1, description="logical streams; fixed for the life of a run")
    shuffle_records: int = Field(4, ge=1, description="records shuffled, and packed by best_fit, together in a lane")
    shuffle: Literal["records", "shards"] = Field(
        "records", description="an epoch permutes all records, or shards and the records in each, for a small cache"
    )
    packing: Literal["concat", "carry", "best_fit"] = Field(
        "concat",
        description="concat: end to end; carry: the same, and a sequence goes on where the last one at its place in "
        "the batch ended; best_fit: cut only documents longer than seq_len, pad the rest",
    )
    workers: int = Field(0, ge=0, description="processes per rank that read ahead; 0 reads between steps")
    verify_hashes: bool = Field(True, description="check every shard's sha256 before step 1; remote ones when read")
    cache_bytes: int = Field(64 * 2**30, ge=1, description="most bytes of remote shards kept on a machine")
    retry_timeout_s: float = Field(600.0, gt=0, le=604_800, description="for one remote file, retries included")
    read_timeout_s: float = Field(30.0, gt=0, le=604_800, description="a request without a byte for so long has failed")

    @model_validator(mode="before")
    @classmethod
    def _sources_replace_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("sources") and "manifest" not in given:
            return {**given, "manifest": ""}
        return given

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        names = [source.name for source in self.sources]
        if names and self.manifest:
            raise ValueError(
                f"data.manifest = {self.manifest!r} and data.sources ({', '.join(names)}) are both given: keep one; a "
                "recipe whose base has a manifest sets data.manifest = ''"
            )
        if not names and not self.manifest:
            raise ValueError("data.manifest is empty and data.sources has no entry: name a corpus")
        if not names and (self.schedule or self.temperature != 1):
            raise ValueError("data.schedule and data.temperature need data.sources: list the corpora there")
        if len(set(names)) < len(names):
            raise ValueError(f"data.sources has a name twice: {', '.join(names)}; give each its own")
        if self.packing == "carry" and len(names) > 1:
            raise ValueError(
                f"data.packing = 'carry' with data.sources ({', '.join(names)}): a lane takes every sequence from "
                "another source, so none goes on where the one before ended; keep one source, or use 'concat'"
            )
        weighted = [source.weight for source in self.sources if source.weight is not None]
        if weighted and (len(weighted) < len(names) or not any(weighted)):
            raise ValueError("data.sources: give every source a weight, one of them above 0, or give none a weight")
        steps = [entry.step for entry in self.schedule]
        if steps != sorted(set(steps)):
            raise ValueError(f"data.schedule has steps {steps}; they must rise")
        for entry in self.schedule:
            if set(entry.weights) != set(names) or not any(entry.weights.values()):
                raise ValueError(
                    f"data.schedule at step {entry.step} has weights for {', '.join(entry.weights) or 'nothing'}; give "
                    f"one for each of {', '.join(names)}, one of them above 0"
                )
        return self


class CheckpointSection(Section):
    """Saving."""

    every: int = Field(100, ge=0, description="steps between checkpoints; 0 saves at the end only")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")
    init_from: str | None = Field(None, description="start a new run from this checkpoint's weights")


class EvalSection(Section):
    """Held-out loss during the run, at every depth."""

    every: int = Field(0, ge=0, description="steps between evaluations; 0 means none")
    batches: int = Field(4, ge=1, description="global batches of held-out sequences in one evaluation")


class LogSection(Section):
    """What is written while training."""

    every: int = Field(1, ge=1, description="steps between console and TensorBoard records; metrics.jsonl has all")
    peak_tflops: float | None = Field(None, gt=0, description="dense peak of one device, for MFU; none: by its name")


class RunConfig(Section):
    """One run, whole."""

    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection = DataSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()

    def dp(self, world_size: int) -> int:
        """Data-parallel size on `world_size` ranks."""
        return world_size // (self.parallel.tp * self.parallel.pp)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches each data-parallel rank runs in one step."""
        return self.train.global_batch_sequences // (self.dp(world_size) * self.train.micro_batch_sequences)

    def validate_for(self, world_size: int) -> None:
        """Refuse every combination that cannot run on `world_size` ranks, all problems at once.

        Raises:
            ConfigError: one line a problem: field, value, rule, fix.
        """
        problems = _layout_problems(self, world_size) + _tensor_parallel_problems(self)
        problems += _loop_problems(self) + _schedule_problems(self) + _kernel_problems(self) + _waiting_problems(self)
        if problems:
            raise ConfigError("this run cannot start:\n  - " + "\n  - ".join(problems))


def _layout_problems(config: RunConfig, world_size: int) -> list[str]:
    p, t, problems = config.parallel, config.train, []
    if world_size % (p.tp * p.pp):
        problems.append(
            f"parallel.tp * parallel.pp = {p.tp} * {p.pp} does not divide the world size {world_size}: "
            f"launch a multiple of {p.tp * p.pp} processes, or lower tp or pp"
        )
    else:
        problems += _batch_problems(config, world_size)
    if t.global_batch_sequences % config.data.lanes:
        problems.append(
            f"train.global_batch_sequences = {t.global_batch_sequences} must be a multiple of data.lanes = "
            f"{config.data.lanes}: every step takes the same number of sequences from every lane"
        )
    elif config.data.packing == "carry" and t.global_batch_sequences != config.data.lanes:
        problems.append(
            f"data.packing = 'carry' with data.lanes = {config.data.lanes} and train.global_batch_sequences = "
            f"{t.global_batch_sequences}: every place of a batch must be a lane of its own; set data.lanes = "
            f"{t.global_batch_sequences}"
        )
    if p.zero_stage >= 2 and p.pp > 1:
        problems.append(
            f"parallel.zero_stage = {p.zero_stage} with parallel.pp = {p.pp}: ZeRO 2 and 3 shard gradients within one "
            "backward, which a pipeline splits; use zero_stage 0 or 1, or pp = 1"
        )
    if p.pp > config.model.n_blocks:
        problems.append(
            f"parallel.pp = {p.pp} is more than model.n_blocks = {config.model.n_blocks}: a stage needs a block; "
            "lower pp"
        )
    if t.trainable == "indexer":
        problems += _warm_up_problems(config)
    return problems


def _loop_problems(config: RunConfig) -> list[str]:
    n_loops = config.model.n_loops
    named: dict[str, Iterable[int] | None] = {
        f"parallel.recompute = {config.parallel.recompute!r}": parse_recompute(config.parallel.recompute)
    }
    if "dsa" in config.model.sections:
        dsa = config.model.dsa
        named[f"{dsa.field('selection_loops')} = {list(dsa.selection_loops or ())}"] = dsa.selection_loops
    return [
        f"{setting} names a loop that does not run: model.n_loops = {n_loops}, so choose from loops 0..{n_loops - 1}"
        for setting, loops in named.items()
        if loops and max(loops) >= n_loops
    ]


def _warm_up_problems(config: RunConfig) -> list[str]:
    p, problems = config.parallel, []
    if "dsa" not in config.model.mixer_names:
        problems.append(
            f"train.trainable = 'indexer' and model.pattern = {config.model.pattern!r} has no dsa mixer, so nothing "
            "would train: set train.trainable = 'all', or put dsa in the pattern"
        )
    if p.pp > 1:
        problems.append(
            f"train.trainable = 'indexer' with parallel.pp = {p.pp}: a stage whose blocks are all frozen has no "
            "gradient to send back; use pp = 1"
        )
    return problems


def _batch_problems(config: RunConfig, world_size: int) -> list[str]:
    p, t, problems = config.parallel, config.train, []
    dp = config.dp(world_size)
    per_step = dp * t.micro_batch_sequences
    if t.global_batch_sequences % per_step:
        problems.append(
            f"train.global_batch_sequences = {t.global_batch_sequences} must be a multiple of "
            f"train.micro_batch_sequences * dp = {t.micro_batch_sequences} * {dp} = {per_step}: change one of them"
        )
    elif p.pp > 1 and config.micro_batches(world_size) % p.pp:
        problems.append(
            f"{config.micro_batches(world_size)} micro-batches a step (train.global_batch_sequences "
            f"{t.global_batch_sequences} / ({t.micro_batch_sequences} * dp {dp})) must be a multiple of parallel.pp = "
            f"{p.pp}: raise the global batch or lower train.micro_batch_sequences"
        )
    if config.data.lanes % dp:
        problems.append(
            f"data.lanes = {config.data.lanes} must be a multiple of the data-parallel size {dp}: "
            "a rank serves whole lanes; choose lanes once, as a multiple of every dp you may use"
        )
    return problems


def _schedule_problems(config: RunConfig) -> list[str]:
    t, o, problems = config.train, config.optimizer, []
    if t.stop_at_step is not None and t.stop_at_step > t.steps:
        problems.append(
            f"train.stop_at_step = {t.stop_at_step} is past train.steps = {t.steps}: lower it, or raise train.steps"
        )
    n_decay = round(t.steps * o.decay_fraction)
    if o.schedule == "wsd" and o.warmup_steps and o.warmup_steps + n_decay > t.steps:
        problems.append(
            f"optimizer.warmup_steps = {o.warmup_steps} and {n_decay} steps of decay do not fit in train.steps = "
            f"{t.steps}: lower optimizer.warmup_steps or optimizer.decay_fraction, or raise train.steps"
        )
    return problems


def _waiting_problems(config: RunConfig) -> list[str]:
    """A slow server must end in a DataError that names it, not in a rank that is killed for waiting."""
    data, hang_timeout_s = config.data, config.train.hang_timeout_s
    places = {f"data.sources ({source.name})": source.manifest for source in data.sources}
    places = places or {"data.manifest": data.manifest}
    remote = [field for field, place in places.items() if place.partition(":")[0].lower() in _REMOTE_SCHEMES]
    if not remote:
        return []
    from loopline.data_pipeline.prefetch import TIMEOUT_S  # loads numpy, which planning a local run does not need

    limit_s, ended = hang_timeout_s, f"train.hang_timeout_s = {hang_timeout_s:g}, when the run is ended as hanging"
    if data.workers and limit_s > TIMEOUT_S:
        limit_s, ended = TIMEOUT_S, f"{TIMEOUT_S:g}, when a worker of data.workers is given up"
    # s3 and gs may take one read_timeout_s more (data_pipeline/download.py).
    if data.retry_timeout_s + data.read_timeout_s < limit_s:
        return []
    return [
        f"data.retry_timeout_s = {data.retry_timeout_s:g} + data.read_timeout_s = {data.read_timeout_s:g}, the longest "
        f"wait for one file of {remote[0]}, must be below {ended}: lower data.retry_timeout_s"
        + (", or raise train.hang_timeout_s" if limit_s == hang_timeout_s else "")
    ]


# Head sizes of the mixers that run fla 0.6.0's scalar-decay kernel.
_EVEN_FOR_FLA = {"mamba2": ("d_state", "d_head"), "retnet": ("d_head_k", "d_head_v")}


def _kernel_problems(config: RunConfig) -> list[str]:
    sections, problems = config.model.sections, []
    deltanet = sections.get("deltanet")
    if deltanet is not None and deltanet.backend == "fla" and config.train.dtype == "fp32":
        problems.append(
            f"{deltanet.field('backend')} = 'fla' with train.dtype = 'fp32': fla's delta rule computes in bf16 and "
            "fp16 only; set train.dtype = 'bf16', or the backend to 'reference' or 'auto'"
        )
    for name, fields in _EVEN_FOR_FLA.items():
        section = sections.get(name)
        if section is None or section.backend == "reference" or config.train.dtype == "fp32":
            continue
        problems += [
            f"{section.field(field)} = {getattr(section, field)} must be even with train.dtype = "
            f"{config.train.dtype!r} and {section.field('backend')} = {section.backend!r}: fla, which auto takes on a "
            "GPU, has no 16-bit gradient of odd heads; change it, or set the backend to 'reference'"
            for field in fields
            if getattr(section, field) % 2
        ]
    return problems


def _tensor_parallel_problems(config: RunConfig) -> list[str]:
    tp, model = config.parallel.tp, config.model
    if tp == 1:
        if config.parallel.sequence_parallel:
            return ["parallel.sequence_parallel = true needs parallel.tp > 1: raise tp or turn it off"]
        return []
    sizes = {"model.d_ffn": model.d_ffn, "model.vocab_size": model.vocab_size}
    for section in model.sections.values():
        sizes |= {section.field(name): count for name, count in section.head_counts().items()}
    problems = [
        f"{field} = {value} must be divisible by parallel.tp = {tp}: change one of them"
        for field, value in sizes.items()
        if value % tp
    ]
    tokens = config.train.micro_batch_sequences * config.train.seq_len
    if config.parallel.sequence_parallel and tokens % tp:
        problems.append(
            f"train.micro_batch_sequences * train.seq_len = {tokens} must be divisible by parallel.tp = {tp} "
            "with parallel.sequence_parallel: change one of them"
        )
    return problems


def load_config(recipe: str, overrides: list[str] | None = None) -> RunConfig:
    """Resolve a recipe (a name under pretrain/recipes, or a path to a .toml file) and `a.b=c` overrides.

    Raises:
        ConfigError: no such recipe, a cycle of bases, an unknown key (the nearest is named), or a bad value.
    """
    tree = _load_tree(recipe, seen=())
    for override in overrides or []:
        _apply_override(tree, override)
    return config_from_tree(tree)


def config_from_tree(tree: dict[str, Any]) -> RunConfig:
    """Check a nested dict against the schema.

    Raises:
        ConfigError: every problem found, a line each.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError("bad configuration:\n  - " + "\n  - ".join(lines)) from None


def recipe_names() -> list[str]:
    """Names of the recipes that ship with Loopline."""
    folder = resources.files("loopline.pretrain.recipes")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def _load_tree(recipe: str, seen: tuple[str, ...]) -> dict[str, Any]:
    is_file = recipe.endswith(".toml")
    identity = str(Path(recipe).resolve()) if is_file else recipe
    if identity in seen:
        raise ConfigError(f"recipes start from each other in a circle: {' -> '.join([*seen, identity])}")
    if is_file:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"recipe file {recipe} does not exist; shipped recipes: {', '.join(recipe_names())}")
        text = path.read_text(encoding="utf-8")
    elif recipe in recipe_names():
        text = (resources.files("loopline.pretrain.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")
    else:
        raise ConfigError(
            f"unknown recipe {recipe!r}{_nearest(recipe, recipe_names())}; shipped recipes: "
            f"{', '.join(recipe_names())}; or give the path of a .toml file"
        )
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {recipe} is not valid TOML: {error}") from None
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"recipe {recipe}: base = {base!r} must be the name or path of one recipe, in quotes")
    if is_file and base.endswith(".toml"):
        base = str(Path(recipe).parent / base)
    return _merge(_load_tree(base, (*seen, identity)), tree)


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        is_table = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if is_table else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    path, has_value, text = override.partition("=")
    if not has_value or not path.strip():
        raise ConfigError(f"override {override!r} must read section.field=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string: --set train.dtype=bf16
    if value == "none":
        value = None if _may_be_none(path) else value
    *sections, field = path.strip().split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {name} is a value, not a section")
    tree[field] = value


def _may_be_none(path: str) -> bool:
    """Whether the field at a dotted path takes None; `none` is else a word like any other."""
    *sections, field = path.strip().split(".")
    model: type[Section] = RunConfig
    for name in sections:
        annotation = model.model_fields[name].annotation if name in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return False  # the schema will say that there is no such section
        model = annotation
    return field in model.model_fields and NoneType in get_args(model.model_fields[field].annotation)


def _explain(detail: Any) -> str:
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _fields_at(detail["loc"][:-1])
        return f"unknown key {path}{_nearest(str(detail['loc'][-1]), known, prefix=detail['loc'][:-1])}; known: " + (
            ", ".join(known)
        )
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{path} = {detail['input']!r}: {message}"


def _fields_at(path: tuple[str | int, ...]) -> list[str]:
    model: type[Section] = RunConfig
    for part in path:
        if isinstance(part, int):
            continue  # an entry of a list: its fields are the same for all
        annotation: Any = model.model_fields[part].annotation
        model = next(iter(get_args(annotation)), annotation)
    return list(model.model_fields)


def _nearest(name: str, known: list[str], prefix: tuple[str | int, ...] = ()) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {'.'.join([*map(str, prefix), close[0]])}?)" if close else ""
