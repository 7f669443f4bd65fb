"""
Python processes that begin with torch imported, which is most of the time that they take to start. `isolated.py` runs

    python -I fork_server.py

and writes a job in JSON to each line of its input. For each it reads the id of a new process, and then its exit code.
"""

import json
import os
import runpy
import sys

import torchvision  # noqa: F401  and with it torch


# What reads the environment when it is imported, or should not be there, is left to the processes.
assert not {"huggingface_hub", "transformers", "fsr_hf"} & sys.modules.keys()


def become(job: dict) -> list[str]:
    """Makes this process the one that was asked for, up to its first line; returns what to run."""
    files = os.open(os.devnull, os.O_RDONLY), os.open(job["stdout"], os.O_WRONLY), os.open(job["stderr"], os.O_WRONLY)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    sys.path[:0] = job["path"]
    return job["arguments"]


def run(first: str, *rest: str) -> None:
    """`python FIRST ...`: a script, `-c` and code, or `-m` and a module."""
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = ["-m", *rest[1:]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


arguments = None
while arguments is None and (line := sys.stdin.readline()):
    child = os.fork()
    if child == 0:
        arguments = become(json.loads(line))
    else:
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
if arguments is not None:
    run(*arguments)
