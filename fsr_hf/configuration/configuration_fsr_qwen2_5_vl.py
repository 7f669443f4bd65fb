"""Configuration of Qwen2.5-VL with FSR."""

from typing import ClassVar

from transformers import PreTrainedConfig, Qwen2_5_VLConfig

from .configuration_fsr import FSRConfig, FSRConfigMixin, register_generative_class
from .remote_code import RemoteCodeMixin


__all__ = ["FSRQwen2_5_VLConfig"]


class FSRQwen2_5_VLConfig(RemoteCodeMixin, FSRConfigMixin, Qwen2_5_VLConfig):
    """
    [`Qwen2_5_VLConfig`] with an [`FSRConfig`]. By default an image or a video keeps half of its tokens, whatever its
    resolution, and the kept ones keep the positions (time, height, width) that they had in the full prompt.

    Args:
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. All other arguments are those of [`Qwen2_5_VLConfig`]. Here a `"view"`
            is a temporal slice of a video (two frames). `positions="compact"` numbers what
            is left of the prompt one by one, visual tokens as if they were text. `relevance="clip"` is refused: this
            vision tower comes from no CLIP, so there is no text encoder that a question could be compared in.
    """

    model_type = "fsr_qwen2_5_vl"
    sub_configs: ClassVar[dict] = {**Qwen2_5_VLConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {
        "retention_ratio": 0.5,
        "relevance": "none",
        "pool": "item",
        "positions": "original",
    }
    no_relevance_reason = "the vision tower comes from no CLIP, so no text encoder shares a space with its patches."

    fsr_config: dict | PreTrainedConfig | None = None


register_generative_class("fsr_qwen2_5_vl", "FSRQwen2_5_VLForConditionalGeneration")
