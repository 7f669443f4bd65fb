"""
Every family but LLaVA-1.5 in a vLLM engine, with `enforce_eager` and compiled, against the transformers model: what
the encoder keeps, what the language model sees, and what it answers. Steps are so short that prompts are cut inside of
images.
"""

from typing import Any

import pytest
from serving_checks import Reference, drawn_picture, drawn_video, needs_vllm, run_engine

from fsr_hf.testing.small_families import export_small_model


pytestmark = needs_vllm

LLAVA = "USER: {}{} ASSISTANT:"
QWEN = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
QWEN_IMAGE, QWEN_VIDEO = "<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"
FACTS = {
    "fps": 2.0,
    "duration": 4.0,
    "total_num_frames": 8,
    "frames_indices": list(range(8)),
    "video_backend": "opencv",
}


def case(template: str, visual: str, question: str, images=(), videos=(), **settings: Any):
    """A request: the prompt, its pictures and videos, what it says about FSR."""
    return {"prompt": template.format(visual, question), "images": images, "videos": videos, "settings": settings}


def llava_cases():
    wide, tall = drawn_picture(1, 700, 300), drawn_picture(2, 200, 500)
    return [
        case(LLAVA, "<image>\n", "what animal is this", [wide]),
        case(LLAVA, "<image>\n", "which colour has the house", [wide]),
        case(LLAVA, "<image>\n", "how many trees", [tall], num_visual_tokens=40),
        case(LLAVA, "<image>\n", "how many trees", [tall], retention_ratio=0.3),
        case(LLAVA, "<image>\n", "how many trees", [tall], fsr_enabled=False),
        case(LLAVA, "<image>\n<image>\n", "what is above the house", [tall, wide], num_visual_tokens=60),
        case(LLAVA, "<image><image>", "what is near", [wide, tall], num_visual_tokens=33),
        case(LLAVA, "", "what is a house"),
    ]


def qwen_cases(with_videos: bool):
    wide, tall = drawn_picture(1, 504, 280), drawn_picture(2, 140, 420)
    cases = [
        case(QWEN, QWEN_IMAGE, "what animal is this", [wide]),
        case(QWEN, QWEN_IMAGE, "which colour has the house", [wide], retention_ratio=0.2),
        case(QWEN, QWEN_IMAGE, "how many trees", [tall], num_visual_tokens=7),
        case(QWEN, QWEN_IMAGE, "how many trees", [tall], fsr_enabled=False),
        case(QWEN, QWEN_IMAGE + " and " + QWEN_IMAGE, "what is near", [tall, wide], retention_ratio=0.3),
        case(QWEN, "", "what is a house"),
    ]
    if with_videos:
        video = drawn_video(3, 8, 168, 112)
        cases += [
            case(QWEN, QWEN_VIDEO, "what animal is this", videos=[video]),
            case(QWEN, QWEN_VIDEO, "what is above", videos=[video], retention_ratio=0.1),
            case(QWEN, QWEN_VIDEO, "what is above", videos=[video], fsr_enabled=False),
            case(QWEN, QWEN_IMAGE + QWEN_VIDEO, "what is near", [wide], [video], num_visual_tokens=20),
        ]
    return cases


def llava_video_cases():
    video, short, picture = drawn_video(3, 5, 160, 120), drawn_video(4, 2, 100, 200), drawn_picture(1, 700, 300)
    turn = "<|im_start|>user\n{}{}<|im_end|>\n<|im_start|>assistant\n"
    return [
        case(turn, "<video>\n", "what animal is this", videos=[video]),
        case(turn, "<video>\n", "how many trees", videos=[video], num_visual_tokens=50),
        case(turn, "<video>\n", "how many trees", videos=[video], fsr_enabled=False),
        case(turn, "<video>\n<video>\n", "what is near", videos=[short, video], retention_ratio=0.1),
        case(turn, "<image>\n", "what is above", [picture]),
        case(turn, "<image>\n<video>\n", "what is above", [picture], [short], num_visual_tokens=30),
    ]


CASES = {
    "fsr_llava_next": llava_cases,
    "fsr_qwen2_5_vl": lambda: qwen_cases(True),
    "fsr_qwen3_vl": lambda: qwen_cases(False),
    "fsr_llava_video": llava_video_cases,
}


def as_request(case: dict[str, Any], is_qwen: bool) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if case["images"]:
        data["image"] = list(case["images"])
    if case["videos"]:
        data["video"] = [
            (video, {**FACTS, "do_sample_frames": False}) if is_qwen else video for video in case["videos"]
        ]
    return {"prompt": case["prompt"], "multi_modal_data": data, "mm_processor_kwargs": case["settings"]}


def expected_answer(reference: Reference, case: dict[str, Any], is_qwen: bool):
    kwargs: dict[str, Any] = {}
    if case["images"]:
        kwargs["images"] = list(case["images"])
    if case["videos"]:
        kwargs["videos"] = list(case["videos"])
        if is_qwen:
            kwargs |= {"video_metadata": [dict(FACTS) for _ in case["videos"]], "do_sample_frames": False}
    return reference.answer(case["prompt"], kwargs, **case["settings"])


def refused_request(model_type: str) -> dict[str, Any]:
    """What a family does not take in vLLM."""
    picture, video = drawn_picture(1, 100, 100), drawn_video(3, 2, 100, 100)
    if model_type == "fsr_qwen3_vl":
        video_and_facts = (video, {**FACTS, "do_sample_frames": False})
        return {"prompt": QWEN.format(QWEN_VIDEO, "what"), "multi_modal_data": {"video": [video_and_facts]}}
    if model_type == "fsr_llava_video":
        return {"prompt": "<image><image>", "multi_modal_data": {"image": [picture, picture]}}
    visual = QWEN_IMAGE if model_type == "fsr_qwen2_5_vl" else "<image>"
    settings = {"mm_processor_kwargs": {"retention_ratio": 3}}
    return {"prompt": visual, "multi_modal_data": {"image": [picture]}, **settings}


REFUSALS = {
    "fsr_llava_next": "retention_ratio=3",
    "fsr_qwen2_5_vl": "retention_ratio=3",
    "fsr_qwen3_vl": "Videos of Qwen3-VL are not supported",
    "fsr_llava_video": "2 images in a prompt of LLaVA-Video",
}


@pytest.fixture(
    scope="module", params=[(name, is_eager) for name in CASES for is_eager in (True, False)],
    ids=lambda param: f"{param[0]}, {'eager' if param[1] else 'compiled'}",
)  # fmt: skip
def answers(request, tmp_path_factory):
    name, is_eager = request.param
    folder = export_small_model(name, tmp_path_factory.mktemp(name))
    cases, is_qwen = CASES[name](), "qwen" in name
    requests = [as_request(case, is_qwen) for case in cases]
    # Sizes are those of vLLM's profile run, which precedes compilation.
    limits: dict[str, Any] = {"image": {"count": 1 if name == "fsr_llava_video" else 2, "width": 512, "height": 512}}
    if name in ("fsr_qwen2_5_vl", "fsr_llava_video"):
        limits["video"] = {"count": 2, "num_frames": 4, "width": 160, "height": 160}
    overrides = {}
    if name == "fsr_qwen3_vl":  # the image of the profile run has 65 x 65 tokens, more than there are positions
        limits["image"] |= {"width": 65 * 32, "height": 65 * 32}
        overrides = {"text_config": {"max_position_embeddings": 4096}}
    results = run_engine(
        folder.parent,
        folder,
        [requests, requests, [requests[0]], [refused_request(name)]],
        hf_overrides=overrides,
        enforce_eager=is_eager,
        max_num_batched_tokens=160,
        max_num_seqs=8,
        limit_mm_per_prompt=limits,
    )
    reference = Reference(folder)
    expected = [expected_answer(reference, case, is_qwen) for case in cases]
    assert [result.get("is_compiled") for result in results[:3]] == [not is_eager] * 3
    return cases, results, expected, REFUSALS[name]


def test_the_language_model_sees_the_kept_tokens(answers):
    _, (first, *_), expected, _ = answers
    assert first["lengths"] == [answer.length for answer in expected]
    kept = sorted(run for answer in expected for run in answer.kept)
    assert sorted(first["kept"]) == kept


def test_answers_are_those_of_transformers(answers):
    _, (first, *_), expected, _ = answers
    assert first["tokens"] == [answer.tokens for answer in expected]
    for found, answer in zip(first["logprobs"], expected):
        assert found == pytest.approx(answer.logprobs, abs=2e-4)
    assert len({tuple(answer.tokens) for answer in expected}) > 3


def test_an_image_goes_through_the_tower_once(answers):
    """Whatever is asked about it, with whatever budget."""
    cases, (first, again, single, _), _, _ = answers
    distinct = {id(item) for case in cases for item in (*case["images"], *case["videos"])}
    assert first["num_encoded"] == first["num_cached"] == len(distinct)
    assert again["num_encoded"] == single["num_encoded"] == 0


def test_a_second_time_the_prefix_cache_answers(answers):
    _, (first, again, single, _), _, _ = answers
    assert again["tokens"] == first["tokens"] and single["tokens"] == first["tokens"][:1]
    # Blocks of 32 tokens, less the last token, which is always computed.
    assert single["prefix_hits"] == [(first["lengths"][0] - 1) // 32 * 32]


def test_what_a_family_does_not_take_is_refused(answers):
    _, (*_, refused), _, words = answers
    assert words in refused["error"]
