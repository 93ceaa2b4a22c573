"""The wheel installs `loopline` and nothing beside it, and works away from the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # From a copy of what git tracks, so that nothing lying about in the checkout can get in or be left behind.
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, capture_output=True, text=True)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file_under_loopline_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("loopline/") for name in names)
    packages = ("kernels", "models", "data_pipeline", "pretrain", "launchers")
    tracked = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = {f"loopline/{name}" for name in tracked.stdout.split() if name.endswith((".py", ".toml"))}
    assert names == expected


def test_the_installed_wheel_plans_a_run_away_from_the_repository(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    assert {path.name for path in target.iterdir() if not path.name.endswith(".dist-info")} <= {"loopline", "bin"}
    program = (
        "import sys, loopline.pretrain.cli as cli\n"
        f"assert cli.__file__.startswith({str(target)!r}), cli.__file__\n"
        "sys.exit(cli.main(['plan', 'quickstart', '--set', 'parallel.pp=2']))\n"
    )
    # -S leaves the site directory, and with it the editable install, out; the dependencies come back by path.
    site_packages = next(p for p in sys.path if p.endswith("site-packages"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), site_packages])}
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stage 1: blocks 2:gdn 3:full" in done.stdout
