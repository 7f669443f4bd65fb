"""Runs Python where the package cannot be imported: in isolated mode, with a Hub cache of its own."""

import os
import subprocess
import sys
from pathlib import Path


__all__ = ["run_isolated"]


def run_isolated(*arguments: str | Path, home: Path) -> str:
    """
    The output of `python -I ARGUMENTS` in the folder `home`, which has the cache. `-I` hides the tests and PYTHONPATH;
    a script that begins with `sys.modules["fsr_hf"] = None` hides the installed package, too.
    """
    done = subprocess.run(
        [sys.executable, "-I", *map(str, arguments)],
        cwd=home,
        env={**os.environ, "HF_HOME": str(home / "cache"), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
