"""Settings of all tests. They come before the first import of torch and transformers."""

import atexit
import os
import shutil
import tempfile


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test reads or fills the user's cache, and none reaches the network by accident.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="fsr-hf-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
