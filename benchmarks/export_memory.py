"""
Memory and time of an export, on a generated LLaVA-1.5 checkpoint of any size.

    python benchmarks/export_memory.py [--gigabytes 6] [--folder /tmp]

Each figure is of a process of its own: one that only imports the package, and one for each way to place the weights.
The weights are zeros, but really written, in the layout of llava-hf/llava-1.5-7b-hf. Everything is removed at the end.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SHARD = 2 * 1024**3
BLOCK = bytes(1 << 24)

CHILD = """
import json, resource, sys, time
started = time.perf_counter()
from fsr_hf import export
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 1:
    started = time.perf_counter()
    export(sys.argv[1], sys.argv[2], link=sys.argv[3] == "link", verify=sys.argv[4] == "verify", progress=False)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"imported": imported, "peak": peak, "seconds": seconds}))
"""


def write_zeros(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float16 zeros, written block by block."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with open(file, "wb") as writer:
        writer.write(struct.pack("<Q", len(encoded)) + encoded)
        while offset:
            offset -= writer.write(BLOCK[: min(len(BLOCK), offset)])


def make_checkpoint(folder: Path, gigabytes: float) -> int:
    """A stock LLaVA with as many layers as make up the size; the number of bytes of its weights."""
    import torch
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlamaTokenizer,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    vocab = {
        token: number for number, token in enumerate(["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"])
    }
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[], extra_special_tokens={"image_token": "<image>"})
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=32064, num_hidden_layers=max(1, round((gigabytes * 1024**3 - 1.1e9) / layer))
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    config.save_pretrained(folder)
    LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14).save_pretrained(folder)

    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, tensor in model.state_dict().items():
        if filled + 2 * tensor.numel() > SHARD:
            shards.append({})
            filled = 0
        shards[-1][name] = tuple(tensor.shape)
        filled += 2 * tensor.numel()
    weight_map = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_zeros(folder / name, shapes)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(*arguments: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of an export.")
    parser.add_argument("--gigabytes", type=float, default=6, help="size of the weights (default: 6)")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where to write, with room for twice the size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fsr-hf-export-") as name:
        root = Path(name)
        (root / "source").mkdir()
        started = time.perf_counter()
        size = make_checkpoint(root / "source", options.gigabytes)
        print(f"generated {size / 1024**3:.2f} GiB in {time.perf_counter() - started:.0f} s, {os.cpu_count()} cores")
        floor = measure()
        print(f"{'import only':24}  peak {floor['peak'] / 1024:6.0f} MiB  {floor['seconds']:6.1f} s")
        for way in ("link", "copy"):
            for check in ("verify", "no-verify"):
                target = root / f"{way}-{check}"
                figures = measure(str(root / "source"), str(target), way, check)
                print(
                    f"{f'--{way} --{check}':24}  peak {figures['peak'] / 1024:6.0f} MiB  {figures['seconds']:6.1f} s  "
                    f"(imports {figures['imported'] / 1024:.0f} MiB)",
                    flush=True,
                )
                for file in target.glob("*.safetensors"):
                    file.unlink()


if __name__ == "__main__":
    main()
