"""
Requests a second, time to the first token and KV blocks of a vLLM server: the stock class, FSR off, FSR at budgets.

    .venv-vllm/bin/python -m benchmarks.serving                       # a small LLaVA of random weights, on the CPU
    .venv/bin/python -m benchmarks.serving --folder llava-1.5-7b-fsr --stock llava-hf/llava-1.5-7b-hf --requests 256

Both servers get the same pictures, one question each, in one run: compare within it. Every picture is new to the
server, so no cache helps.
"""

import argparse
import asyncio
import base64
import io
import json
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from fsr_hf.testing.small_llava import SmallLlava, export_small_llava
from fsr_hf.testing.vllm_server import Server, serve


__all__ = ["Result", "measure", "table"]

SMALL = SmallLlava(hidden_size=512, num_layers=8)
ANSWER = 8


@dataclass
class Result:
    """
    Args:
        setting (`str`): What served.
        concurrency (`int`): Requests at a time.
        requests_per_second (`float`): Over all requests.
        first_token (`float`): Median seconds to the first token.
        kv_blocks (`int`): The most blocks of the KV cache that were held at a time.
        prompt_tokens (`int`): Of one request, as the language model saw it.
    """

    setting: str
    concurrency: int
    requests_per_second: float
    first_token: float
    kv_blocks: int
    prompt_tokens: int


def picture_url(seed: int, side: int) -> str:
    """A picture of noise in coarse squares, as a data URL."""
    squares = (np.random.default_rng(seed).random((8, 8, 3)) * 255).astype("uint8")
    file = io.BytesIO()
    Image.fromarray(squares).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


async def measure(server: Server, setting: str, settings: dict[str, Any], urls: list[str], concurrency: int) -> Result:
    """Send one request about each picture, `concurrency` at a time."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=server.url, api_key="none", timeout=3600, max_retries=0)
    gate, firsts, lengths, peak = asyncio.Semaphore(concurrency), list[float](), list[int](), 0

    async def ask(url: str) -> None:
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
        body: dict[str, Any] = {"ignore_eos": True, "min_tokens": ANSWER}
        if settings:
            body["mm_processor_kwargs"] = settings
        async with gate:
            start, first = time.perf_counter(), None
            stream = await client.chat.completions.create(
                model="fsr",
                messages=[{"role": "user", "content": content}],  # type: ignore[misc,list-item]
                temperature=0,
                max_tokens=ANSWER,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=body,
            )
            async for chunk in stream:
                if chunk.choices and first is None:
                    first = time.perf_counter() - start
                if chunk.usage:
                    lengths.append(chunk.usage.prompt_tokens)
            firsts.append(first or float("nan"))

    async def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, await asyncio.to_thread(server.kv_blocks))
            await asyncio.sleep(0.1)

    watching = asyncio.create_task(watch())
    start = time.perf_counter()
    await asyncio.gather(*map(ask, urls))
    seconds = time.perf_counter() - start
    watching.cancel()
    await client.close()
    assert len(set(lengths)) == 1, lengths
    return Result(setting, concurrency, len(urls) / seconds, median(firsts), peak, lengths[0])


def table(results: list[Result]) -> str:
    """In Markdown, with ratios to the stock class at the same concurrency."""
    lines = ["| served | in flight | prompt tokens | requests/s | × stock | first token, s | KV blocks |"]
    lines.append("|---|---|---|---|---|---|---|")
    stock = {result.concurrency: result.requests_per_second for result in results if result.setting == "stock class"}
    for result in results:
        ratio = f"{result.requests_per_second / stock[result.concurrency]:.2f}" if stock else "–"
        lines.append(
            f"| {result.setting} | {result.concurrency} | {result.prompt_tokens} | {result.requests_per_second:.2f} | "
            f"{ratio} | {result.first_token:.2f} | {result.kv_blocks} |"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> list[Result]:
    results = []
    with tempfile.TemporaryDirectory() as root:
        folder, stock = arguments.folder, arguments.stock
        if folder is None:
            folder = export_small_llava(Path(root), SMALL)
            stock = Path(root) / "llava"
            name_as_vllm_reads(stock)
        options = [
            *("--max-model-len", "2048", "--max-num-seqs", "32", "--no-enable-prefix-caching"),
            *arguments.option,
        ]
        off = ("FSR, off", {"fsr_enabled": False})
        budgets = [(f"FSR, {budget} tokens", {"num_visual_tokens": budget}) for budget in arguments.budgets]
        servers = [
            (stock, [], [("stock class", {})]),
            (folder, ["--trust-request-mm-kwargs"], [off, *budgets]),
        ]
        seed = 0
        for model, more, rows in servers:
            if model is None:
                continue
            with serve(model, Path(root) / "log.txt", *options, *more) as server:
                for setting, settings in rows:
                    warm = [picture_url(10**6 + seed, 336)]
                    asyncio.run(measure(server, setting, settings, warm, 1))
                    for concurrency in arguments.concurrency:
                        urls = [picture_url(seed + number, 336) for number in range(arguments.requests)]
                        seed += len(urls)
                        result = asyncio.run(measure(server, setting, settings, urls, concurrency))
                        print(result, flush=True)
                        results.append(result)
    return results


def name_as_vllm_reads(folder: Path) -> None:
    """vLLM's stock class wants a level in the names of CLIP's tower that transformers 5 does not write."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    names = {name: re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name) for name in weights}
    save_file({names[name]: weight for name, weight in weights.items()}, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument("--folder", help="an exported folder; without it, a small one is made")
    parser.add_argument("--stock", help="the checkpoint it was exported from")
    parser.add_argument("--requests", type=int, default=32, help="for each line of the table")
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32], metavar="N,N,...")
    parser.add_argument("--budgets", type=numbers, default=[128, 64], metavar="N,N,...")
    parser.add_argument("--option", action="append", default=[], help="of `vllm serve`, such as --option=--dtype=half")
    parser.add_argument("--output", type=Path, help="JSON of the results")
    arguments = parser.parse_args()
    results = run(arguments)
    print(table(results))
    if arguments.output:
        arguments.output.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
