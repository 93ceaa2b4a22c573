"""The repository as the guards read it: its files, its packages, and what each module imports."""

import ast
import functools
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("kernels", "models", "data_pipeline", "pretrain", "launchers")


@functools.cache
def repository_files() -> list[Path]:
    """Every file that is, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return sorted({path for path in files if path.is_file()})


def source_files() -> list[Path]:
    """Python files of the packages."""
    return [p for p in repository_files() if p.suffix == ".py" and p.relative_to(ROOT).parts[0] in PACKAGES]


def short(path: Path) -> str:
    """Path from the root, for messages."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@dataclass(frozen=True)
class Import:
    """One imported module.

    Attributes:
        module: absolute dotted name; `from a import b` gives `a.b`, so that a package's modules are told apart.
        line: where.
        is_deferred: inside a function or class, so not run on import.
    """

    module: str
    line: int
    is_deferred: bool


@functools.cache
def imports_of(path: Path) -> list[Import]:
    """Every import of a file, at any depth, `importlib.import_module` and `__import__` of a literal included."""
    package = ["loopline", *path.relative_to(ROOT).parent.parts]
    found: list[Import] = []

    def visit(node: ast.AST, is_deferred: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, is_deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found.extend(Import(f"{module}.{alias.name}", node.lineno, is_deferred) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("import_module", "__import__"))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append(Import(str(node.args[0].value), node.lineno, is_deferred))
        for child in ast.iter_child_nodes(node):
            visit(child, is_deferred or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(tree_of(path), False)
    return found


def is_under(module: str, *names: str) -> bool:
    """Whether `module` is one of `names` or lies under it."""
    return any(module == name or module.startswith(name + ".") for name in names)


def module_path(module: str) -> Path | None:
    """File of a module of ours, given `loopline.a.b` or a name defined in one."""
    parts = module.split(".")[1:]
    while parts:
        base = ROOT.joinpath(*parts)
        for candidate in (base.with_suffix(".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
        parts = parts[:-1]
    return None
