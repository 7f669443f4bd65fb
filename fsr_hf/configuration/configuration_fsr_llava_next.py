"""Configuration of LLaVA-NeXT with FSR."""

from typing import ClassVar

from transformers import LlavaNextConfig, PreTrainedConfig

from .configuration_fsr import CLIP_TOWER_SETTINGS, FSRConfig, FSRConfigMixin, register_generative_class
from .remote_code import RemoteCodeMixin


__all__ = ["FSRLlavaNextConfig"]


class FSRLlavaNextConfig(RemoteCodeMixin, FSRConfigMixin, LlavaNextConfig):
    """
    [`LlavaNextConfig`] with an [`FSRConfig`]. By default an image keeps one ninth of its tokens: its base view and its
    tiles have shares in proportion to the tokens that each of them has.

    Args:
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. All other arguments are those of [`LlavaNextConfig`].
    """

    model_type = "fsr_llava_next"
    sub_configs: ClassVar[dict] = {**LlavaNextConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {"retention_ratio": 1 / 9, "pool": "view", "positions": "original"}
    fsr_settings: ClassVar[dict] = CLIP_TOWER_SETTINGS

    fsr_config: dict | PreTrainedConfig | None = None


register_generative_class("fsr_llava_next", "FSRLlavaNextForConditionalGeneration")
