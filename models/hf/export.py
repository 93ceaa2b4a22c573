"""Write a model as a Hugging Face folder, and read one back.

An export is written aside, loaded again the way a user would load it, and compared with the training model at every
depth; only then does it take its name. `import_hf` reads config.json and safetensors files and runs nothing.
"""

import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from loopline.kernels.backends import available_backends
from loopline.models.config import ModelConfig
from loopline.models.hf.errors import CheckpointError, ExportError
from loopline.models.hf.model_card import model_card
from loopline.models.hf.names import (
    MODEL_TYPE,
    from_hf_config,
    from_hf_weights,
    parameter_shapes,
    to_hf_config,
    to_hf_weights,
)
from loopline.models.hf.parity import CACHED_FACTOR, ParityReport
from loopline.models.hf.shipping import shipped_sources
from loopline.models.looped_lm import LoopedLM

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
FP32_LEAVES = ("A_log", "dt_bias", ".D")  # stored in fp32 whatever the export's dtype

N_CACHED_TOKENS = 5  # decoded one by one in the check


def export_hf(
    model: LoopedLM,
    out_dir: str | Path,
    *,
    tokenizer_dir: str | Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_shard_bytes: int = 5_000_000_000,
    tolerance: float = 1e-5,
    tokens: Tensor | None = None,
    max_tokens: int | None = None,
) -> ParityReport:
    """Write `model` to the new folder `out_dir`, for `AutoModelForCausalLM.from_pretrained(trust_remote_code=True)`.

    Args:
        model: holds whole parameters, on any device.
        tokenizer_dir: folder of tokenizer.json and its Hugging Face files; None exports no tokenizer, and a model
            that does not know where a text ends.
        dtype: of the stored weights; A_log, dt_bias and D stay fp32.
        max_shard_bytes: weights are split into files of at most so many bytes.
        tolerance: greatest |difference| of logits allowed; see `check_export`.
        tokens: [B, T], int64, what to compare on; None means seeded random tokens.
        max_tokens: longest sequence seen in training, for the config; nothing enforces it.
    Raises:
        ExportError: out_dir exists, the model holds shards, the tokenizer does not fit, or the check fails. Nothing is
            left behind.
    """
    _refuse_shards(model)
    out_dir = Path(out_dir).absolute()
    if os.path.lexists(out_dir):
        raise ExportError(f"{out_dir} exists; choose an export folder that does not exist, or remove this one first")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    # The folder has its final name from the start, inside a scratch one: transformers names the module of a model's
    # code after its folder, so a reload now and a reload later meet in the same place of its module cache.
    scratch = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    folder = scratch / out_dir.name
    try:
        folder.mkdir()
        token_ids = _copy_tokenizer(tokenizer_dir, folder, model.config)
        _write_code_and_config(model.config, folder, dtype, token_ids, max_tokens)
        _write_weights(stored_weights(model, dtype), model.config, folder, max_shard_bytes)
        report = check_export(folder, model, dtype=dtype, tolerance=tolerance, tokens=tokens)
        (folder / "README.md").write_text(model_card(model.config, report, out_dir.name), encoding="utf-8")
        if os.path.lexists(out_dir):  # rename would put us over an empty folder made meanwhile
            raise ExportError(f"{out_dir} appeared while exporting; choose another export folder")
        os.rename(folder, out_dir)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    log.info("exported %s: logits within %.1e of the training model", out_dir, max(report.max_diff))
    return report


def stored_weights(model: LoopedLM, dtype: str) -> dict[str, Tensor]:
    """What an export in `dtype` stores, by our names, on the CPU. A tied head is the embedding and has no entry."""
    return {
        name: parameter.detach().to(
            device="cpu",
            dtype=torch.float32 if name.endswith(FP32_LEAVES) else getattr(torch, dtype),
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, parameter in model.named_parameters()
    }


def check_export(
    folder: str | Path,
    model: LoopedLM,
    *,
    dtype: str = "float32",
    tolerance: float = 1e-5,
    tokens: Tensor | None = None,
) -> ParityReport:
    """Load an export as a user would and hold its logits to the training model's, in fp32 on the CPU.

    Compared are the logits after every loop count from 1 to n_loops + 1, and decoding token by token from the cache,
    with and without padding on the left. A bf16 export is compared with the training model's weights rounded to bf16:
    what is tested is the code and every stored number, not bf16 arithmetic, so the tolerance is the same.

    Raises:
        ExportError: weights are missing or extra, or logits differ by more than `tolerance` (CACHED_FACTOR times that
            when decoding), or are not finite.
    """
    reference = _reference(model, dtype)
    n_loops, vocab_size = model.config.n_loops, model.config.vocab_size
    if tokens is None:  # longer than a chunk of Gated DeltaNet
        tokens = torch.randint(vocab_size, (2, 80), generator=torch.Generator().manual_seed(0))
    tokens = tokens.cpu()
    loaded = _reload(Path(folder))
    depths = list(range(1, n_loops + 2))
    with torch.no_grad():
        want = reference.forward_depths(tokens, n_loops=n_loops + 1, depths=depths)
        out = loaded(tokens, n_loops=n_loops + 1, output_depth_logits=True, use_cache=False)
        got = out.depth_logits
        cached = _decode_rows(loaded, tokens)
    report = ParityReport(
        max_diff=tuple((a - b).abs().max().item() for a, b in zip(got, want, strict=True)),
        max_diff_cached=(cached - want[n_loops - 1][:, -N_CACHED_TOKENS:]).abs().max().item(),
        max_logit=max(x.abs().max().item() for x in want),
        tolerance=tolerance,
        dtype=dtype,
    )
    found = [(f"after {depth} loops", diff, tolerance) for depth, diff in zip(depths, report.max_diff)]
    if reference.exit_gate is not None:
        with torch.no_grad():
            exits = reference.exit_probabilities(tokens, n_loops + 1)
        found.append(("in exit probabilities", (out.exit_probabilities - exits).abs().max().item(), tolerance))
    found.append(("decoding from the cache", report.max_diff_cached, CACHED_FACTOR * tolerance))
    wrong = [f"{where}: {diff:.1e} > {limit:.0e}" for where, diff, limit in found if not diff <= limit]  # NaN fails too
    if wrong:
        raise ExportError(
            f"the export does not compute what the training model does: logits (up to {report.max_logit:.1f}) or exits "
            f"differ {'; '.join(wrong)}. Differences that grow slowly with depth are rounding: raise the tolerance; "
            "others are a bug in models/hf or a damaged file"
        )
    return report


def import_hf(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Read an export, or what `save_pretrained` made of one. Runs no code from the folder and opens no pickle.

    Returns:
        The config, and every parameter by our name, fp32 on the CPU: the names of `LoopedLM.named_parameters()`, so
        without the head where it is tied.
    Raises:
        CheckpointError: not an export of ours, damaged, or names and shapes that do not fit the config.
    """
    folder = Path(folder)
    config = from_hf_config(_read_json(folder / "config.json"))
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            weights.update(load_file(path))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); copy or export it again") from error
    weights = from_hf_weights(weights, config)
    other = sorted({str(w.dtype) for w in weights.values() if not w.is_floating_point() or w.itemsize < 2})
    if other:
        raise CheckpointError(f"{folder} holds weights of dtype {', '.join(other)}; expected fp32, bf16 or fp16")
    return config, {name: weight.float() for name, weight in weights.items()}


def _refuse_shards(model: LoopedLM) -> None:
    held = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name, shape in parameter_shapes(model.config).items():
        if held.get(name) != list(shape):
            raise ExportError(
                f"{name} is {held.get(name, 'not held')} in the model and {list(shape)} by its config; gather whole "
                "parameters into one LoopedLM first"
            )


def _reference(model: LoopedLM, dtype: str) -> LoopedLM:
    """The training model on the CPU in fp32 arithmetic, with the weights an export in `dtype` stores."""
    reference = LoopedLM(_for_any_device(model.config)).eval()
    weights = stored_weights(model, dtype)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(weights[name])
    return reference


def _for_any_device(config: ModelConfig) -> ModelConfig:
    """The config without a kernel that needs a GPU: the check runs on the CPU, and so may a reader."""
    sections = {
        name: section.model_copy(update={"backend": "auto"})
        for name, section in config.sections.items()
        if section.backend != "auto" and not available_backends((section.backend,), "cpu")
    }
    return config.model_copy(update=sections)


def _reload(folder: Path) -> PreTrainedModel:
    info: dict[str, Any]
    loaded: PreTrainedModel
    loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    problems = {kind: names for kind, names in info.items() if names}
    if problems:
        raise ExportError(f"the export does not load cleanly: {problems}; this is a bug in models/hf")
    return loaded.eval()


def _decode_rows(loaded: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits of the last tokens of each row, decoded one by one: even rows as they are, odd rows padded on the left."""
    n_padding, rows = 3, []
    for i, row in enumerate(tokens):
        padding = n_padding * (i % 2)
        row = torch.cat([row.new_zeros(padding), row])[None]
        mask = (torch.arange(row.shape[1]) >= padding).long()[None]
        n_prefill, cache, logits = row.shape[1] - N_CACHED_TOKENS, None, []
        for start, end in [(0, n_prefill), *((t, t + 1) for t in range(n_prefill, row.shape[1]))]:
            out = loaded(row[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[:, -1:])
        rows.append(torch.cat(logits[1:], dim=1))
    return torch.cat(rows)


def _copy_tokenizer(tokenizer_dir: str | Path | None, folder: Path, config: ModelConfig) -> dict[str, int | None]:
    """Copy the tokenizer's files; the ids generation needs."""
    if tokenizer_dir is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if not (Path(tokenizer_dir) / TOKENIZER_FILES[0]).is_file():
        raise ExportError(f"{tokenizer_dir} has no {TOKENIZER_FILES[0]}; give the folder of a Hugging Face tokenizer")
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_dir) / name).is_file():
            shutil.copyfile(Path(tokenizer_dir) / name, folder / name)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ExportError(f"{tokenizer_dir} names no eos_token; add it to tokenizer_config.json, or no text would end")
    if len(tokenizer) > config.vocab_size:
        raise ExportError(
            f"{tokenizer_dir} has {len(tokenizer)} tokens and the model's vocab_size is {config.vocab_size}; "
            "export with the tokenizer the model was trained with"
        )
    pad_id = tokenizer.pad_token_id
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if pad_id is None else pad_id,
    }


def _write_code_and_config(
    config: ModelConfig, folder: Path, dtype: str, token_ids: dict[str, int | None], max_tokens: int | None
) -> None:
    for name, source in shipped_sources(config.mixer_names).items():
        (folder / name).write_text(source, encoding="utf-8")
    content = {
        "architectures": ["LooplineForCausalLM"],
        # The config class is found through the modelling file: transformers 5.23 remembers the model class of a config
        # class for the life of the process, and tells two config classes apart by the file they are found through. With
        # the configuration file there, a folder with other modelling code would load the code of an earlier one.
        "auto_map": {
            "AutoConfig": "modeling_loopline.LooplineConfig",
            "AutoModel": "modeling_loopline.LooplineModel",
            "AutoModelForCausalLM": "modeling_loopline.LooplineForCausalLM",
        },
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "transformers_version": transformers.__version__,
        **to_hf_config(_for_any_device(config)),
        "max_position_embeddings": max_tokens,
        **token_ids,
    }
    _write_json(folder / "config.json", content)
    GenerationConfig(do_sample=False, **token_ids).save_pretrained(folder)


def _write_weights(weights: dict[str, Tensor], config: ModelConfig, folder: Path, max_shard_bytes: int) -> None:
    weights = to_hf_weights(weights, config)
    shards = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for file_name, names in shards.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, folder / file_name, metadata={"format": "pt"})
    if shards.is_sharded:
        _write_json(folder / INDEX_FILE, {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename})


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_FILE).is_file():
        names = sorted(set(_read_json(folder / INDEX_FILE).get("weight_map", {}).values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(f"{folder / INDEX_FILE} points outside its folder: {outside[0]!r}")
    else:
        names = [WEIGHTS_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; only safetensors weights are read")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); give the folder of an export") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
