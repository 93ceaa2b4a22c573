"""What no source file may hold."""

import ast
from pathlib import Path

import pytest
from source_tree import imports_of, is_under, repository_files, short, source_files, tree_of

BANNED_MODULES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
# Export loads the folder it has just written, code included, to compare logits.
MAY_TRUST_REMOTE_CODE = {"models/hf/export.py"}
BANNED_CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load")


def calls_of(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> object:
    """Literal value of a keyword argument; None where it is absent or computed."""
    values = [k.value for k in call.keywords if k.arg == name]
    return values[0].value if values and isinstance(values[0], ast.Constant) else None


def violations(path: Path) -> list[str]:
    """Constructs that could run code found in data."""
    found = [f"imports {i.module}" for i in imports_of(path) if is_under(i.module, *BANNED_MODULES)]
    for call in calls_of(path):
        name = ast.unparse(call.func)
        if name in BANNED_CALLS:
            found.append(f"line {call.lineno}: {name}()")
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            found.append(f"line {call.lineno}: torch.load without weights_only=True")
        if name.endswith(("np.load", "numpy.load")) and keyword(call, "allow_pickle") is not False:
            found.append(f"line {call.lineno}: {name} without allow_pickle=False")
        if keyword(call, "allow_pickle") is True or keyword(call, "shell") is True:
            found.append(f"line {call.lineno}: {name} with allow_pickle or shell")
        if keyword(call, "trust_remote_code") is True and short(path) not in MAY_TRUST_REMOTE_CODE:
            found.append(f"line {call.lineno}: {name} with trust_remote_code")
    return found


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_source_runs_no_code_found_in_data(path: Path) -> None:
    assert violations(path) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from pickle import loads",
        "eval('1')",
        "exec('1')",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_guard_sees_each_construct(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import source_tree

    monkeypatch.setattr(source_tree, "ROOT", tmp_path)
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert violations(path)


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_source_is_ascii(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    assert not [i for i, line in enumerate(lines, 1) if not line.isascii()]


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    place = b"/" + b"work" + b"/"
    assert not [short(path) for path in repository_files() if place in path.read_bytes()]


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    is_empty = not tree_of(path).body
    assert is_empty or ast.get_docstring(tree_of(path))


@pytest.mark.parametrize("path", source_files(), ids=short)
def test_exceptions_are_not_swallowed(path: Path) -> None:
    bare = [
        handler.lineno
        for handler in ast.walk(tree_of(path))
        if isinstance(handler, ast.ExceptHandler)
        and (handler.type is None or ast.unparse(handler.type) in ("Exception", "BaseException"))
        and not any(isinstance(node, ast.Raise) for node in ast.walk(handler))
    ]
    assert not bare
