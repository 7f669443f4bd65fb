"""Options of vLLM that do not go together with FSR."""

from types import SimpleNamespace

import pytest
from serving_checks import needs_vllm

from fsr_hf import FSRLlavaConfig, FSRLlavaVideoConfig, FSRQwen2_5_VLConfig


pytestmark = needs_vllm

YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 2048}
LLAVA = {"text_config": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}}
QWEN = {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}}


def options(**changes):
    return SimpleNamespace(
        **{"video_pruning_rate": None, "enable_mm_embeds": False, "mm_processor_kwargs": None, **changes}
    )


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (FSRLlavaConfig(**LLAVA), {"video_pruning_rate": 0.5}, "video_pruning_rate=0.5"),
        (FSRLlavaConfig(**LLAVA), {"enable_mm_embeds": True}, "enable_mm_embeds"),
        (FSRLlavaConfig(**LLAVA), {"mm_processor_kwargs": {"num_visual_tokens": 3}}, "`num_visual_tokens`.*hf-over"),
        (FSRQwen2_5_VLConfig(**QWEN, fsr_config={"positions": "compact"}), {}, 'positions="compact".*several axes'),
        (FSRLlavaConfig(text_config={"model_type": "llama", "rope_parameters": YARN}), {}, "yarn.*compact"),
    ],
)
def test_refused_options(config, changes, words):
    from fsr_hf.serving.vllm_setup import check_options

    with pytest.raises(ValueError, match=words):
        check_options(config, options(**changes))


@pytest.mark.parametrize(
    "config",
    [
        FSRLlavaConfig(**LLAVA),
        FSRQwen2_5_VLConfig(**QWEN),
        FSRLlavaConfig(
            text_config={"model_type": "llama", "rope_parameters": YARN}, fsr_config={"positions": "compact"}
        ),
        FSRLlavaVideoConfig(),
    ],
)
def test_allowed_options(config):
    from fsr_hf.serving.vllm_setup import check_options

    check_options(config, options(mm_processor_kwargs={"max_pixels": 100}))
