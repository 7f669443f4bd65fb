"""The examples, each run as its reader would run it."""

import re

from isolated import ROOT, run_python


EXAMPLES = ROOT / "examples"

# Visual tokens, by hand: LLaVA-NeXT cuts a picture of 640 x 480 into 2 x 2 tiles of 24 x 24 patches, less 6 rows at
# top and bottom that unpadding takes, with a newline a row; Qwen2.5-VL sees 644 x 476 pixels of it in 23 x 17 tokens,
# Qwen3-VL 640 x 480 in 20 x 15, and frames of 320 x 256, of which two share a token;
# a frame of LLaVA-Video has 14 x 14 tokens and 14 newlines, and the budget is of the former.
NUMBERS = {
    ("fsr_llava", "image"): (576, 128),
    ("fsr_llava", "two images in a prompt"): (2 * 576, 2 * 128),
    ("fsr_llava", "batch of two prompts"): (2 * 576, 2 * 128),
    ("fsr_llava_next", "image"): (576 + 36 * 49, (576 + 36 * 48) // 9),
    ("fsr_qwen2_5_vl", "image"): (23 * 17, 196),
    ("fsr_qwen3_vl", "image"): (20 * 15, 150),
    ("fsr_qwen3_vl", "two images in a prompt"): (20 * 15 + 9 * 12, 150 + 54),
    ("fsr_qwen3_vl", "video of 8 frames"): (4 * 8 * 10, 160),
    ("fsr_llava_video", "video of 8 frames"): (8 * 14 * 15, round(8 * 14 * 14 / 5)),
}


def test_families(tmp_path):
    path = [EXAMPLES, ROOT]
    done = run_python(EXAMPLES / "families.py", cwd=tmp_path, path=path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "random" in done.stdout.partition("\n")[0]
    line = re.compile(r"(fsr_\w+) +(\S.*?) +(\d+) -> (\d+) +(\d+) -> (\d+) +(\d+) -> (\d+)  (\w.*)")
    rows = [match.groups() for match in map(line.fullmatch, done.stdout.splitlines()) if match]
    numbers = {(family, prompt): tuple(map(int, numbers)) for family, prompt, *numbers, _ in rows}
    assert {key: numbers[key][:2] for key in NUMBERS} == NUMBERS
    images, video = {"image", "two images in a prompt", "batch of two prompts"}, {"video of 8 frames"}
    for family in ("fsr_llava", "fsr_llava_next", "fsr_qwen2_5_vl", "fsr_qwen3_vl", "fsr_llava_video"):
        takes_videos = family not in ("fsr_llava", "fsr_llava_next")
        assert {prompt for of, prompt in numbers if of == family} == (images | video if takes_videos else images)
    for (_, prompt), (tokens, kept, length, pruned_length, size, pruned_size) in numbers.items():
        assert size / length == pruned_size / pruned_length
        if not prompt.startswith("batch"):
            assert length - pruned_length == tokens - kept
    for _, prompt, *_, answer in rows:
        assert [len(words.split()) for words in answer.split(" | ")] == [6] * (2 if prompt.startswith("batch") else 1)
