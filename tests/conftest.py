"""Fixtures shared by all tests: one built corpus, one judge run."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the bundled corpus, built once."""
    from loopline.data_pipeline.build import build_bundled

    folder = tmp_path_factory.mktemp("corpus")
    build_bundled("stdlib", folder)
    return folder


@pytest.fixture(scope="session")
def data(cache_dir: Path) -> str:
    """Override that points a recipe at that corpus."""
    return f"data.cache_dir={cache_dir}"
