"""Configuration of LLaVA-1.5 with FSR."""

from typing import ClassVar

from transformers import LlavaConfig, PreTrainedConfig

from .configuration_fsr import CLIP_TOWER_SETTINGS, FSRConfig, FSRConfigMixin, register_generative_class
from .remote_code import RemoteCodeMixin


__all__ = ["FSRLlavaConfig"]


class FSRLlavaConfig(RemoteCodeMixin, FSRConfigMixin, LlavaConfig):
    """
    [`LlavaConfig`] with an [`FSRConfig`]. By default an image keeps 128 of its 576 tokens, in their positions.

    Args:
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. All other arguments are those of [`LlavaConfig`].
    """

    model_type = "fsr_llava"
    sub_configs: ClassVar[dict] = {**LlavaConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {"num_visual_tokens": 128, "pool": "item", "positions": "original"}
    fsr_settings: ClassVar[dict] = CLIP_TOWER_SETTINGS

    fsr_config: dict | PreTrainedConfig | None = None


register_generative_class("fsr_llava", "FSRLlavaForConditionalGeneration")
