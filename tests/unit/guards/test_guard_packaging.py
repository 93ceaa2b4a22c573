"""What is installed is what is in the repository."""

import sys
import tomllib

from source_tree import PACKAGES, ROOT, repository_files, short, source_files

SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_package_list_is_the_folders_that_hold_python_files() -> None:
    folders = {"loopline." + short(path.parent).replace("/", ".") for path in source_files()}
    assert sorted(SETUP["packages"]) == sorted(folders)


def test_every_top_level_package_is_mapped_to_its_folder() -> None:
    assert SETUP["package-dir"] == {f"loopline.{name}": name for name in PACKAGES}


def test_every_folder_at_the_root_with_python_files_is_a_package_or_a_known_other() -> None:
    folders = {p.relative_to(ROOT).parts[0] for p in repository_files() if p.suffix == ".py"}
    assert folders <= {*PACKAGES, "tests", "benchmarks"}


def test_top_level_folders_have_no_init_and_every_other_package_has_one() -> None:
    # From the repo root an __init__.py in kernels/ would shadow Hugging Face's package of that name.
    assert not [name for name in PACKAGES if (ROOT / name / "__init__.py").exists()]
    inner = {path.parent for path in source_files()} - {ROOT / name for name in PACKAGES}
    assert not [short(folder) for folder in inner if not (folder / "__init__.py").is_file()]


def test_files_that_are_not_python_are_package_data() -> None:
    data = {short(p) for p in repository_files() if short(p).startswith(PACKAGES) and p.suffix not in (".py", ".md")}
    shipped = set()
    for package, patterns in SETUP["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        shipped |= {short(path) for pattern in patterns for path in folder.glob(pattern)}
    assert data <= shipped


def test_no_module_is_named_after_one_it_would_hide() -> None:
    imported = {"torch", "triton", "deepspeed", "transformers", "numpy", "pydantic", "tokenizers", "webdataset"}
    vague = {"utils", "misc", "common", "helpers"}
    # megatron.py is the one door to megatron.core, and is imported as loopline.pretrain.parallel.megatron.
    names = {path.stem: short(path) for path in source_files() if path.stem != "__init__"}
    assert not [where for name, where in names.items() if name in imported | vague | set(sys.stdlib_module_names)]
