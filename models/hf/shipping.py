"""The code that goes with an export: the modelling file and what it imports, flattened into one folder.

An export needs torch and transformers only. So the references of the kernels, which the training model runs on, travel
with it: there is one source for the maths of every recurrence. An import `from loopline.a.b import x` becomes
`from .b import x`, and the registry lists only the mixers the model has. Our Triton kernels stay behind: they are there
where this package is installed, and are imported when asked for without an import statement, for the reason that
`kernels.backends.imported` gives.
"""

import hashlib
import importlib.util
import re
from pathlib import Path

from loopline.models.hf.modules.registry import MIXERS

ROOT = "loopline.models.hf.modeling_loopline"
REGISTRY = "loopline.models.hf.modules.registry"
_IMPORT = re.compile(r"^(\s*)from (loopline\.[\w.]+) import", re.MULTILINE)
_LAUNCH = re.compile(r"^(\s+)from (loopline\.kernels\.[\w.]*launch) import (\w+)$", re.MULTILINE)


def shipped_sources(mixer_names: list[str]) -> dict[str, str]:
    """File name -> source, for a model with these mixers.

    Files that modeling_loopline.py imports carry a hash of the whole in their names. transformers 5.23 loads exports
    from folders of one name into one package, and when the modelling file has changed it runs that one anew but leaves
    what it imports as it was: without the hash, a second export would run on the first one's mixers.
    """
    sources: dict[str, str] = {}
    modules = [ROOT]
    for module in modules:  # grows while it runs
        sources[module] = _registry(mixer_names) if module == REGISTRY else _read(module)
        modules += [name for _, name in _IMPORT.findall(sources[module]) if name not in modules]
    digest = hashlib.sha256("".join(sources[module] for module in sorted(sources)).encode()).hexdigest()[:8]
    names = {module: f"{_flat(module)}_{digest}" for module in sources} | {ROOT: _flat(ROOT)}
    assert len(set(names.values())) == len(names), names
    return {
        f"{names[module]}.py": _IMPORT.sub(lambda match: f"{match[1]}from .{names[match[2]]} import", source)
        for module, source in sources.items()
    }


def _flat(module: str) -> str:
    """Name of a module in the export: its last part, after the op's where a kernel's folder holds it."""
    package, *folders, name = module.removeprefix("loopline.").split(".")
    return f"{folders[-1]}_{name}" if package == "kernels" and folders else name


def _read(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    source = Path(spec.origin).read_text(encoding="utf-8")
    return _LAUNCH.sub(r'\1\3 = __import__("importlib").import_module("\2").\3', source)


def _registry(mixer_names: list[str]) -> str:
    mixers = {name: MIXERS[name] for name in dict.fromkeys(mixer_names)}
    imports = "\n".join(f"from {mixer.__module__} import {mixer.__name__}" for mixer in mixers.values())
    rows = "".join(f'    "{name}": {mixer.__name__},\n' for name, mixer in mixers.items())
    return f'"""The token mixers of this model."""\n\n{imports}\n\nMIXERS = {{\n{rows}}}\n'
