"""
Train the small LLaVA on Shapes-VQA, from drawing the scenes to a Hub folder with FSR.

    python -m examples.shapes_vqa.train --output checkpoints/shapes-vqa

Three stages. Two are those of LLaVA-1.5: a CLIP, trained contrastively on captions; then, with its vision tower
frozen, a projector and a small Llama on questions and answers. The third goes on with them on pictures that lack some
of their tokens: a small model that has only seen whole pictures loses far more to any pruning than a large one does.
`--recipe cpu` is for two cores with AMX, `--recipe gpu` is a longer run with 576 visual tokens. A run that was stopped
goes on where it was: run the same command again.

`--from FOLDER` takes a Hub folder with FSR that the first two stages have made, and runs the third:

    python -m examples.shapes_vqa.train --from checkpoints/shapes-vqa --output shapes-vqa-fsr
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTokenizer, GenerationConfig, LlamaTokenizer, LlavaForConditionalGeneration

from fsr_hf import FSRLlavaForConditionalGeneration, FSRLlavaProcessor, export
from fsr_hf.machine import machine_name, package_versions
from fsr_hf.testing.small_llava import clip_image_processor, llava_processor

from .clip import train_clip
from .llava import encode_scenes, make_llava, train_llava, train_with_dropped_tokens
from .recipe import RECIPES, Recipe
from .scenes import Scenes
from .vocabulary import make_clip_tokenizer, make_tokenizer


__all__ = ["run", "run_from", "save"]


def run(recipe: Recipe, work: Path, *, device: str = "cpu", seed: int = 0, compiled: bool = True) -> None:
    """Train in `work`, which holds everything that a later run goes on from, and the stock checkpoints at the end."""
    log = _start_log(work, seed)
    scenes = Scenes(work, recipe.num_scenes, recipe.image_size)
    clip_tokenizer, tokenizer = make_clip_tokenizer(), make_tokenizer()
    clip = train_clip(recipe, scenes, clip_tokenizer, work, device, seed, compiled, log)
    features = encode_scenes(recipe, scenes, clip.vision_model, work / "features.npy", device)
    torch.manual_seed(seed)
    llava = make_llava(recipe, clip, tokenizer).to(device, torch.bfloat16)
    train_llava(recipe, scenes, features, llava, tokenizer, work, seed, compiled, log)
    train_with_dropped_tokens(recipe, scenes, features, llava, tokenizer, work, seed, compiled, log)
    save(recipe, clip, clip_tokenizer, llava, tokenizer, work)


def run_from(
    folder: Path, recipe: Recipe, work: Path, *, device: str = "cpu", seed: int = 0, compiled: bool = True
) -> FSRLlavaForConditionalGeneration:
    """The third stage alone, from the weights of a Hub folder on."""
    log = _start_log(work, seed)
    scenes = Scenes(work, recipe.num_scenes, recipe.image_size)
    llava = FSRLlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    features = encode_scenes(recipe, scenes, llava.model.vision_tower, work / "features.npy", device)
    train_with_dropped_tokens(recipe, scenes, features, llava, make_tokenizer(), work, seed, compiled, log)
    return llava


def _start_log(work: Path, seed: int) -> Callable[[dict], None]:
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def log(entry: dict) -> None:
        with open(work / "log.jsonl", "a", encoding="utf-8") as file:
            rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in entry.items()}
            file.write(json.dumps(rounded | {"seconds": round(time.perf_counter() - started)}) + "\n")

    log({"machine": machine_name(), "threads": torch.get_num_threads(), "seed": seed, **package_versions()})
    return log


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
    parser.add_argument("--from", dest="start", type=Path, help="Hub folder of the first two stages: run the third")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    options = {"device": arguments.device, "seed": arguments.seed, "compiled": not arguments.no_compile}
    if arguments.start is not None:
        folder = arguments.output or arguments.work / "shapes-vqa-fsr"
        llava = run_from(arguments.start, recipe, arguments.work, **options)
        llava.save_pretrained(folder)
        FSRLlavaProcessor.from_pretrained(arguments.start).save_pretrained(folder)
        _report(folder)
        return
    run(recipe, arguments.work, **options)
    folder = export(
        arguments.work / "llava",
        arguments.output or arguments.work / "shapes-vqa-fsr",
        text_encoder=arguments.work / "clip",
        fsr_config={"num_visual_tokens": recipe.num_patches // 9},
        base_model="shapes-vqa",
        force=True,
    )
    _report(folder)


def _report(folder: Path) -> None:
    print(f"{folder}: {sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB")
    print(f"python -m benchmarks.quality --model {folder} measures it.")


if __name__ == "__main__":
    main()
