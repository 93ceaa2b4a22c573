"""An export holds the model it was made from, or it is not made."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hf_cases import DECODED, FP32_TOLERANCE, HYBRID, build, build_from, of_used_mixers, tokens_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from loopline.models.hf import export
from loopline.models.hf.errors import CheckpointError, ExportError
from loopline.models.hf.export import check_export, export_hf, import_hf
from loopline.models.looped_lm import LoopedLM


def load(folder: Path, **settings: object):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_keeps_every_weight_and_the_config(model: LoopedLM, tmp_path: Path, dtype: str) -> None:
    report = export_hf(model, tmp_path / "out", dtype=dtype)
    assert len(report.max_diff) == model.config.n_loops + 1
    assert max(report.max_diff) <= FP32_TOLERANCE
    config, weights = import_hf(tmp_path / "out")
    assert config == of_used_mixers(model.config)
    want = {name: w.float() for name, w in export.stored_weights(model, dtype).items()}
    assert weights.keys() == want.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(weights[name], want[name]) for name in want)
    if dtype == "float32":
        assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert os.listdir(tmp_path) == ["out"]  # no scratch folder is left


def test_an_imported_model_exports_to_the_same_files(tmp_path: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "a")
    config, weights = import_hf(tmp_path / "a")
    model = LoopedLM(config)
    model.load_state_dict(weights)
    (tmp_path / "second").mkdir()
    export_hf(model, tmp_path / "second" / "a")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "second" / "a" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_save_pretrained_writes_loads_and_can_be_imported(model: LoopedLM, tmp_path: Path) -> None:
    export_hf(model, tmp_path / "a")
    load(tmp_path / "a").save_pretrained(tmp_path / "b")
    check_export(tmp_path / "b", model)
    config, weights = import_hf(tmp_path / "b")
    assert config == of_used_mixers(model.config)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_shards_and_index_load_and_import(tmp_path: Path) -> None:
    model = build(HYBRID)
    export_hf(model, tmp_path / "out", max_shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert all(torch.equal(import_hf(tmp_path / "out")[1][name], p) for name, p in model.named_parameters())
    next((tmp_path / "out").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        import_hf(tmp_path / "out")


def test_bf16_load_keeps_decay_in_fp32(tmp_path: Path) -> None:
    model = build(HYBRID)
    export_hf(model, tmp_path / "out", dtype="bfloat16")
    for dtype in (torch.bfloat16, "auto"):
        loaded = load(tmp_path / "out", dtype=dtype)
        dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
        fp32 = {name for name, found in dtypes.items() if found == torch.float32}
        assert fp32 == {name for name in dtypes if name.endswith(("A_log", "dt_bias"))}
        assert len(fp32) == 4
        assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
        exact = dict(build(HYBRID).named_parameters())["blocks.0.mixer.A_log"]
        assert torch.equal(loaded.model.layers[0].linear_attn.A_log, exact)


@torch.no_grad()
@pytest.mark.parametrize("name", [HYBRID, *DECODED])
def test_a_bf16_export_is_the_bf16_training_model_bit_for_bit_and_generates(name: str, tmp_path: Path) -> None:
    model = build(HYBRID) if name == HYBRID else build_from(DECODED[name])
    export_hf(model, tmp_path / "out", dtype="bfloat16")
    loaded = load(tmp_path / "out", dtype=torch.bfloat16)
    rounded = LoopedLM(model.config, dtype=torch.bfloat16)
    for weight_name, weight in export.stored_weights(model, "bfloat16").items():
        rounded.get_parameter(weight_name).copy_(weight)
    for n_loops in (1, model.config.n_loops, model.config.n_loops + 2):
        logits = loaded(tokens_of(2, 40), use_cache=False, n_loops=n_loops).logits
        assert torch.equal(logits, rounded(tokens_of(2, 40), n_loops=n_loops))
        assert loaded.generate(tokens_of(2, 9), max_new_tokens=3, do_sample=False, n_loops=n_loops).shape == (2, 12)


@pytest.mark.parametrize("backend", ["fla", "triton"])
def test_an_export_asks_for_no_kernel_that_its_reader_may_lack(backend: str, tmp_path: Path) -> None:
    config = build(HYBRID).config
    sections = {name: section.model_copy(update={"backend": backend}) for name, section in config.sections.items()}
    export_hf(build_from(config.model_copy(update=sections)), tmp_path / "out")  # it is checked on the CPU
    assert {section.backend for section in import_hf(tmp_path / "out")[0].sections.values()} == {"auto"}


def test_auto_classes_find_the_code(tmp_path: Path) -> None:
    export_hf(build("full-gate-2-gqa"), tmp_path / "v1.0-rc", max_tokens=512)
    config = AutoConfig.from_pretrained(tmp_path / "v1.0-rc", trust_remote_code=True)
    assert (config.n_loops, config.num_hidden_layers, config.max_position_embeddings) == (2, 4, 512)
    base = AutoModel.from_pretrained(tmp_path / "v1.0-rc", trust_remote_code=True)
    assert base(tokens_of(1, 3)).last_hidden_state.shape == (1, 3, 16)


def test_modelling_code_needs_torch_and_transformers_only(tmp_path: Path) -> None:
    from transformers.dynamic_module_utils import get_imports

    export_hf(build(HYBRID), tmp_path / "out")
    files = {path.stem.removesuffix(path.stem[-9:]): path for path in (tmp_path / "out").glob("*_????????.py")}
    assert {"configuration_loopline", "full", "gdn", "gated_delta_reference"} <= set(files)
    assert not {"window", "kda"} & set(files)  # of mixers, those it has
    files["modeling_loopline"] = tmp_path / "out" / "modeling_loopline.py"
    found = {name for path in files.values() for name in get_imports(path)}
    # Of the Hub transformers asks for all that any file imports, in functions too.
    assert found <= {"torch", "transformers", *sys.stdlib_module_names}
    assert not [path for path in files.values() if "from loopline" in path.read_text()]


def test_changed_code_under_the_same_name_is_loaded_anew(tmp_path: Path) -> None:
    export_hf(build("full-gate-2-gqa"), tmp_path / "out")
    old = type(load(tmp_path / "out"))
    with (tmp_path / "out" / "modeling_loopline.py").open("a") as file:
        file.write("\nLooplineForCausalLM.is_new = True\n")
    new = type(load(tmp_path / "out"))
    assert new.is_new
    assert not hasattr(old, "is_new")


def test_tokenizer_and_its_ids_are_exported(tmp_path: Path, tokenizer_dir: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "out", tokenizer_dir=tokenizer_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "loops within loops"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert load(tmp_path / "out").generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        export_hf(build(HYBRID), tmp_path / "out", tokenizer_dir=tmp_path)
    small = LoopedLM(build(HYBRID).config.model_copy(update={"vocab_size": 8}))
    with pytest.raises(ExportError, match="vocab_size is 8"):
        export_hf(small, tmp_path / "out", tokenizer_dir=tokenizer_dir)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "empty", "file", "dangling link"])
def test_an_existing_export_folder_is_refused(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    with pytest.raises(ExportError, match="does not exist, or remove"):
        export_hf(build(HYBRID), out)
    assert os.path.lexists(out)


def test_a_model_that_holds_shards_is_refused(tmp_path: Path) -> None:
    model = build("full-gate-2-gqa")
    model.head.weight = torch.nn.Parameter(model.head.weight[:10])
    with pytest.raises(ExportError, match=r"head\.weight is \[10, 16\] .*gather"):
        export_hf(model, tmp_path / "out")


@pytest.mark.parametrize("leaf", ["norm.weight", "rho", "A_log", "q_conv", "self_attn.gate_proj.weight"])
def test_one_wrong_weight_fails_the_check(tmp_path: Path, leaf: str) -> None:
    model = build(HYBRID)
    export_hf(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if name.endswith(leaf))
    weights[name].view(-1)[0] += 0.05
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="differ"):
        check_export(tmp_path / "out", model)


def test_a_wrong_exit_gate_fails_the_check(tmp_path: Path) -> None:
    model = build("full-norm-3-sandwich-tied")
    export_hf(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["model.early_exit_gate.bias"] += 0.05
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="in exit probabilities"):
        check_export(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("file_name", "right", "wrong"),
    [
        ("modeling_loopline", "min(loop_idx, len(self.rho) - 1)", "0"),
        ("call", "initial_state=cache.get_recurrent_state(slot) if cache is not None else None", "initial_state=None"),
        ("call", "x if call.is_token is None else x.masked_fill(~call.is_token[..., None], 0.0)", "x"),
    ],
    ids=["loop gate", "decode", "padding"],
)
def test_wrong_code_fails_the_check(tmp_path: Path, file_name: str, right: str, wrong: str) -> None:
    model = build(HYBRID)
    export_hf(model, tmp_path / "out")
    (path,) = (tmp_path / "out").glob(f"{file_name}*.py")
    code = path.read_text()
    assert code.count(right) == 1
    path.write_text(code.replace(right, wrong))
    with pytest.raises(ExportError, match="differ"):
        check_export(tmp_path / "out", model)


def test_a_failed_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = export._write_weights

    def write_wrong(weights: dict, *args: object) -> None:
        write({**weights, "final_norm.weight": weights["final_norm.weight"] * float("nan")}, *args)

    monkeypatch.setattr(export, "_write_weights", write_wrong)
    with pytest.raises(ExportError, match="nan"):
        export_hf(build(HYBRID), tmp_path / "deep" / "out")
    assert os.listdir(tmp_path / "deep") == []


def test_missing_weights_fail_the_check(tmp_path: Path) -> None:
    model = build(HYBRID)
    export_hf(model, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    del weights["model.loop_gate.rho"]  # transformers would fill it with its initial value
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ExportError, match="loop_gate"):
        check_export(tmp_path / "out", model)
    with pytest.raises(CheckpointError, match=r"1 missing \(model\.loop_gate\.rho\)"):
        import_hf(tmp_path / "out")


def test_foreign_and_damaged_folders_are_refused_by_import(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="'llama'"):
        import_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="list"):
        import_hf(tmp_path)

    export_hf(build(HYBRID), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="copy or export it again"):
        import_hf(tmp_path / "out")
    path.rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors"):
        import_hf(tmp_path / "out")


def test_a_wrong_shape_and_an_extra_name_are_named_by_import(tmp_path: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \[3\], expected \[16\]"):
        import_hf(tmp_path / "out")
    save_file({**weights, "extra": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(extra\)"):
        import_hf(tmp_path / "out")


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "out")
    (tmp_path / "out" / export.INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside"):
        import_hf(tmp_path / "out")


def test_import_runs_no_code_from_the_folder(tmp_path: Path) -> None:
    export_hf(build(HYBRID), tmp_path / "out")
    for path in (tmp_path / "out").glob("*.py"):
        path.write_text("raise SystemExit('ran')")
    import_hf(tmp_path / "out")
