"""What a measurement was taken on."""

import os
import platform
from importlib.metadata import version
from typing import Any

import torch


__all__ = ["default_device", "machine_name", "package_versions", "provenance"]


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_name() -> str:
    """Processor and its cores, and the GPU if there is one."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            processor = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    name = f"{processor}, {os.cpu_count()} cores"
    return f"{name}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a time or an answer depends on."""
    packages = ("fsr-hf", "torch", "transformers")
    return {"python": platform.python_version()} | {package: version(package) for package in packages}


def provenance() -> dict[str, Any]:
    """What goes with a measurement: `machine`, `versions` and the number of `threads` that torch uses on the CPU."""
    return {"machine": machine_name(), "versions": package_versions(), "threads": torch.get_num_threads()}
