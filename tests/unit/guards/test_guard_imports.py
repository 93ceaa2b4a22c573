"""Imports run one way, each heavy library has one door, and a login node needs no torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT, imports_of, is_under, module_path, short, source_files

from loopline.models.hf.modules.registry import MIXERS
from loopline.models.hf.shipping import shipped_sources

# Package -> packages of ours it may import.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "models": {"models", "kernels"},
    "data_pipeline": {"data_pipeline"},
    "pretrain": {"pretrain", "models", "kernels", "data_pipeline"},
    "launchers": {"launchers", "pretrain", "models", "kernels", "data_pipeline"},
}
TORCH_FREE = [
    ROOT / "pretrain/config.py",
    ROOT / "pretrain/plan.py",
    ROOT / "pretrain/world.py",
    ROOT / "models/config.py",
    ROOT / "models/flops.py",
    ROOT / "models/loop_plan.py",
    *sorted((ROOT / "models/settings").glob("*.py")),
    *sorted((ROOT / "launchers").glob("*.py")),
]
ONLY_IN = {  # library -> the one file that may import it
    "megatron": "pretrain/parallel/megatron.py",
    "deepspeed": "pretrain/parallel/zero.py",
}


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    wrong = [
        f"{short(path)}:{i.line} imports {i.module}"
        for i in imports_of(path)
        if is_under(i.module, "loopline") and i.module.split(".")[1] not in MAY_IMPORT[package]
    ]
    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])}"


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_packages_are_imported_under_loopline_and_tests_by_nobody(path: Path) -> None:
    bare = [i for i in imports_of(path) if is_under(i.module, *MAY_IMPORT, "tests")]
    assert not bare, "import loopline.<package>: a bare `kernels` is Hugging Face's"


@pytest.mark.parametrize(("name", "source"), shipped_sources(list(MIXERS)).items(), ids=lambda x: x[:40])
def test_files_shipped_with_an_export_import_only_torch_transformers_and_each_other(name: str, source: str) -> None:
    siblings = {Path(file).stem for file in shipped_sources(list(MIXERS))}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:  # its folder has no loopline beside it
            assert (node.level, node.module in siblings) == (1, True), (name, node.module)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            allowed = ("torch", "transformers", *sys.stdlib_module_names)
            assert all(is_under(str(module), *allowed) for module in modules), (name, modules)


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_parallel_library_has_one_door(library: str) -> None:
    users = {short(p) for p in source_files() if any(is_under(i.module, library) for i in imports_of(p))}
    assert users == {ONLY_IN[library]}


def test_process_groups_are_known_to_pretrain_alone() -> None:
    users = {short(p) for p in source_files() if any(is_under(i.module, "torch.distributed") for i in imports_of(p))}
    assert not [user for user in users if not user.startswith("pretrain/")]


def test_models_and_kernels_read_no_environment() -> None:
    readers = [
        short(p)
        for p in source_files()
        if short(p).startswith(("models/", "kernels/")) and any(is_under(i.module, "os") for i in imports_of(p))
    ]
    # Writing and loading folders is what these two do; they are not the maths.
    assert set(readers) <= {"models/hf/export.py", "models/hf/generate.py"}


def reached(path: Path, seen: set[Path]) -> set[Path]:
    """`path` and every file of ours its top level imports, directly or not."""
    if path not in seen:
        seen.add(path)
        for i in imports_of(path):
            target = module_path(i.module) if is_under(i.module, "loopline") and not i.is_deferred else None
            if target is not None:
                reached(target, seen)
    return seen


@pytest.mark.parametrize("path", TORCH_FREE, ids=short)
def test_a_login_node_file_imports_no_torch_even_deferred(path: Path) -> None:
    heavy = ("torch", "transformers", "megatron", "deepspeed", "triton", "fla")
    assert not [f"{i.line}: {i.module}" for i in imports_of(path) if is_under(i.module, *heavy)]


@pytest.mark.parametrize("path", TORCH_FREE, ids=short)
def test_a_login_node_file_reaches_no_torch(path: Path) -> None:
    found = {
        short(p): i.module
        for p in reached(path, set())
        for i in imports_of(p)
        if is_under(i.module, "torch") and not i.is_deferred
    }
    assert not found


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    program = f"import sys\n{code}\nprint('\\n', *{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"}
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "code",
    [
        "from loopline.pretrain.cli import main; assert main(['plan', 'debug', '--set', 'parallel.tp=2']) == 0",
        "from loopline.pretrain.train import main; assert main(['debug', '--dry-run']) == 0",
        "from loopline.launchers.local import main; assert main(['debug', '--processes', '2', '--dry-run']) == 0",
    ],
    ids=["plan", "train --dry-run", "launcher"],
)
def test_planning_a_run_loads_no_torch(code: str) -> None:
    assert not loaded_after(code) & {"torch", "transformers", "megatron", "deepspeed", "triton", "fla", "numpy"}
