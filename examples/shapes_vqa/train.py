"""
Train the small LLaVA on Shapes-VQA, from drawing the scenes to a Hub folder with FSR.

    python -m examples.shapes_vqa.train --output checkpoints/shapes-vqa

Two stages, as for LLaVA-1.5: a CLIP, trained contrastively on captions; then, with its vision tower frozen, a
projector and a small Llama on questions and answers. `--recipe cpu` takes under two hours on two cores with AMX,
`--recipe gpu` is a longer run with 576 visual tokens. A run that was stopped goes on where it was: run the same
command again.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer, GenerationConfig, LlamaTokenizer, LlavaForConditionalGeneration

from fsr_hf import export
from fsr_hf.machine import machine_name, package_versions
from fsr_hf.testing.small_llava import clip_image_processor, llava_processor

from .clip import train_clip
from .llava import train_llava
from .recipe import RECIPES, Recipe
from .scenes import Scenes
from .vocabulary import make_clip_tokenizer, make_tokenizer


__all__ = ["run", "save"]


def run(recipe: Recipe, work: Path, *, device: str = "cpu", seed: int = 0, compiled: bool = True) -> None:
    """Train in `work`, which holds everything that a later run goes on from, and the stock checkpoints at the end."""
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def log(entry: dict) -> None:
        with open(work / "log.jsonl", "a", encoding="utf-8") as file:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
            file.write(json.dumps(rounded | {"seconds": round(time.perf_counter() - started)}) + "\n")

    log({"machine": machine_name(), "threads": torch.get_num_threads(), "seed": seed, **package_versions()})
    scenes = Scenes(work, recipe.num_scenes, recipe.image_size)
    clip_tokenizer, tokenizer = make_clip_tokenizer(), make_tokenizer()
    clip = train_clip(recipe, scenes, clip_tokenizer, work, device, seed, compiled, log)
    llava = train_llava(recipe, scenes, clip, tokenizer, work, device, seed, compiled, log)
    save(recipe, clip, clip_tokenizer, llava, tokenizer, work)


def save(
    recipe: Recipe,
    clip: CLIPModel,
    clip_tokenizer: CLIPTokenizer,
    llava: LlavaForConditionalGeneration,
    tokenizer: LlamaTokenizer,
    work: Path,
) -> None:
    """Stock checkpoints, `work/clip` and `work/llava`, like those that LLaVA-1.5 is published as."""
    image_processor = clip_image_processor(recipe.size)
    for part in (clip, clip_tokenizer, image_processor):
        part.save_pretrained(work / "clip")
    llava.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=8
    )
    llava.save_pretrained(work / "llava")
    llava_processor(recipe.size, image_processor, tokenizer).save_pretrained(work / "llava")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="cpu", help="default: %(default)s")
    parser.add_argument("--work", type=Path, default=Path("build/shapes-vqa"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="Hub folder to make; default: WORK/shapes-vqa-fsr")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler"
    )
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    run(recipe, arguments.work, device=arguments.device, seed=arguments.seed, compiled=not arguments.no_compile)
    folder = export(
        arguments.work / "llava",
        arguments.output or arguments.work / "shapes-vqa-fsr",
        text_encoder=arguments.work / "clip",
        # On this CLIP, patches of what a text names are more like it than the others are: see docs/quality.md.
        fsr_config={"num_visual_tokens": recipe.num_patches // 9, "invert_relevance": False},
        base_model="shapes-vqa",
        force=True,
    )
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    print(f"python -m benchmarks.quality --model {folder} measures it.")


if __name__ == "__main__":
    main()
