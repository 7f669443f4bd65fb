"""Fixtures of several modules."""

import shutil
from pathlib import Path

import pytest
from hub.tiny_checkpoints import Checkpoints, make_checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Checkpoints:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """An export that a test may spoil."""
    return shutil.copytree(checkpoints.fsr, tmp_path / "fsr")
