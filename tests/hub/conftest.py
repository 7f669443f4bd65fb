"""Fixtures of several modules."""

import pytest
from hub.tiny_checkpoints import Checkpoints, make_checkpoints


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Checkpoints:
    return make_checkpoints(tmp_path_factory.mktemp("checkpoints"))
