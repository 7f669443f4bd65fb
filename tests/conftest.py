"""Settings of all tests. They come before the first import of torch and transformers."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reads or fills the user's cache, and none reaches the network by accident.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fsr-hf-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# Slow, and the same on every transformers: marked `once`, which `make test-newest` and `make test-floor` leave out.
ONCE = (
    "benchmarks",
    "evaluation",
    "hub/test_cards.py",
    "hub/test_hostile_folders.py",
    "hub/test_publishing.py",
    "hub/test_security.py",
    "modeling/test_attention_received.py",
    "modeling/test_fsr.py",
    "modeling/test_host_scan.py",
    "modeling/test_kernels.py",
    "modeling/test_pools.py",
    "modeling/test_prompt.py",
    "modeling/test_saliency.py",
    "serving",
    "test_bench.py",
    "test_distributed.py",
    "test_examples.py",
    "test_explain.py",
    "test_full_size.py",
    "test_package.py",
    "test_quickstart.py",
    "test_shapes_vqa.py",
    "test_trl.py",
    "test_web.py",
)

# The files that take longest begin, so that no process waits for another one in the end.
LONGEST = (
    "test_contract.py",
    "modeling/test_kernels.py",
    "hub/test_round_trip.py",
    "test_serve.py",
    "test_checkpoint.py",
    "hub/test_hostile_folders.py",
    "hub/test_cards.py",
    "benchmarks/test_gpu.py",
    "evaluation/test_evaluate.py",
    "test_quickstart.py",
)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    if missing := [name for name in (*ONCE, *LONGEST) if not (here / name).exists()]:
        raise pytest.UsageError(f"{__file__} names {missing}, which do not exist")
    for item in items:
        path = item.path.relative_to(here)
        if any(path.is_relative_to(name) for name in ONCE):
            item.add_marker("once")
    order = {here / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
