"""Configuration of LLaVA-Video with FSR."""

from typing import Any, ClassVar, Literal

from transformers import LlavaOnevisionConfig, PreTrainedConfig

from .configuration_fsr import FSRConfig, FSRConfigMixin, register_generative_class
from .remote_code import RemoteCodeMixin


__all__ = ["FSRLlavaVideoConfig"]


class FSRLlavaVideoConfig(RemoteCodeMixin, FSRConfigMixin, LlavaOnevisionConfig):
    """
    [`LlavaOnevisionConfig`] with an [`FSRConfig`] and the video tokens of LLaVA-Video: the patches of a frame are
    pooled to half of their rows and columns, and every row of every frame ends with a newline. By default a video, or
    an image, keeps a fifth of its tokens.

    Args:
        spatial_pool_mode (`str`, *optional*, defaults to `"bilinear"`):
            How frames are pooled. For 27 x 27 patches: `"bilinear"`, to 14 x 14, or `"average"`, to 13 x 13.
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. There is no relevance: the text side of SigLIP is no part of it. All
            other arguments are those of [`LlavaOnevisionConfig`].
    """

    model_type = "fsr_llava_video"
    sub_configs: ClassVar[dict] = {**LlavaOnevisionConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {
        "retention_ratio": 0.2,
        "relevance": "none",
        "pool": "item",
        "positions": "compact",
    }

    spatial_pool_mode: Literal["bilinear", "average"] = "bilinear"
    no_relevance_reason = (
        "no CLIP shares a space with the patches of a SigLIP tower, whose own text side is no part of it."
    )

    fsr_config: dict | PreTrainedConfig | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "spatial_pool_mode" and value not in ("bilinear", "average"):
            raise ValueError(f'`spatial_pool_mode={value!r}` is not allowed: it must be "bilinear" or "average".')
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if "mm_vision_tower" in config_dict:
            raise ValueError(
                "This is the config of a checkpoint in the layout of LLaVA-Video's own code: make a folder of it with "
                "`fsr-hf export SOURCE OUTPUT_DIR`, and load that."
            )
        return super().from_dict(config_dict, **kwargs)


register_generative_class("fsr_llava_video", "FSRLlavaVideoForConditionalGeneration")
