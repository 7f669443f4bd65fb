"""A vLLM server on the loopback, as a context: `with serve(folder, ...) as server`."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen


__all__ = ["Server", "serve"]

_START_SECONDS = 400


@dataclass
class Server:
    """
    Args:
        url (`str`): Of the API, with `/v1`.
        process (`int`): Of the server; its engine is a child of it.
    """

    url: str
    process: int

    def resident_mib(self) -> float:
        """Memory of the server and its children."""
        return sum(_resident_kib(process) for process in _with_children(self.process)) / 1024

    def kv_blocks(self) -> int:
        """Blocks of the KV cache that requests hold now."""
        with urlopen(self.url.removesuffix("/v1") + "/metrics", timeout=60) as response:
            text = response.read().decode()
        (share,) = re.findall(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", text, flags=re.MULTILINE)
        (blocks,) = re.findall(r'^vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', text, flags=re.MULTILINE)
        return round(float(share) * int(blocks))


@contextmanager
def serve(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """
    Serve a folder with vLLM, as the model `fsr`, until the context ends.

    Args:
        folder (`Path`):
            The model.
        log (`Path`):
            File for what the server says.
        options (`str`):
            Of `vllm serve`.

    Raises:
        `RuntimeError`: with the end of the log, if the server does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "fsr", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", *options]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"The server did not start:\n{log.read_text()[-6000:]}") from None
                time.sleep(1)
        yield Server(f"http://127.0.0.1:{port}/v1", process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _with_children(process: int) -> list[int]:
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [process, *(found for child in children for found in _with_children(int(child)))]


def _resident_kib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+)", status, flags=re.MULTILINE)[0])
