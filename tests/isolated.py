"""Runs Python in new processes, as from the command line. One that hides the package cannot import it."""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path


__all__ = ["ROOT", "TESTS", "run_isolated", "run_python"]

TESTS = Path(__file__).parent
ROOT = TESTS.parent  # of the clone, which has the package

SECONDS = 400


@functools.cache
def _server() -> subprocess.Popen:
    """It ends with this process, which closes its input."""
    command = [sys.executable, "-I", str(Path(__file__).with_name("fork_server.py"))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_python(
    *arguments: str | Path, cwd: Path, path: list[Path] | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """
    What `python ARGUMENTS` comes to (a script, `-c` and code, or `-m` and a module) in the folder `cwd`. As with `-I`,
    the process sees neither the tests nor PYTHONPATH, but it sees the folders `path`.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, name) for name in ("stdout", "stderr")}
        for file in files.values():
            file.touch()
        job = {name: str(file) for name, file in files.items()}
        job |= {"arguments": [*map(str, arguments)], "cwd": str(cwd), "path": [*map(str, path or [])]}
        print(json.dumps(job | {"env": os.environ | environment}), file=server.stdin, flush=True)
        child = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(job["arguments"], code, *(file.read_text() for file in files.values()))


def run_isolated(*arguments: str | Path, home: Path) -> str:
    """
    The output of `python -I ARGUMENTS` in the folder `home`, which has the cache of the Hub. `-I` hides the tests and
    PYTHONPATH; a script that begins with `sys.modules["fsr_hf"] = None` hides the installed package, too.
    """
    done = run_python(*arguments, cwd=home, HF_HOME=str(home / "cache"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
