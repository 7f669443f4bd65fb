# Generated from fsr_hf 0.1.0 (fsr_hf.configuration.configuration_fsr_llava), do not edit.
"""Configuration of LLaVA-1.5 with FSR."""

from typing import ClassVar

from transformers import LlavaConfig, PreTrainedConfig

from .configuration_fsr import FSRConfig, FSRConfigMixin
from .remote_code import RemoteCodeMixin


__all__ = ["FSRLlavaConfig"]


class FSRLlavaConfig(RemoteCodeMixin, FSRConfigMixin, LlavaConfig):
    r"""
    [`LlavaConfig`] with an [`FSRConfig`]. By default an image keeps 128 of its 576 tokens.

    Args:
        fsr_config (`FSRConfig` or `dict`, *optional*):
            The hyper-parameters of the pruning. All other arguments are those of [`LlavaConfig`].

    Example:

    ```python
    >>> from fsr_hf import FSRLlavaConfig, FSRLlavaForConditionalGeneration

    >>> config = FSRLlavaConfig(fsr_config={"num_visual_tokens": 64})
    >>> model = FSRLlavaForConditionalGeneration(config)
    ```
    """

    model_type = "fsr_llava"
    sub_configs: ClassVar[dict] = {**LlavaConfig.sub_configs, "fsr_config": FSRConfig}
    fsr_defaults: ClassVar[dict] = {
        "num_visual_tokens": 128,
        "pool": "item",
        "newline": "drop",
        "positions": "compact",
    }

    fsr_config: dict | PreTrainedConfig | None = None


from typing import TYPE_CHECKING  # noqa: E402


if TYPE_CHECKING:
    # transformers copies and downloads the files that it finds named in imports. These names keep the code together
    # when a config or a processor is loaded or saved by itself. After an interrupted download it asks again only for
    # files that this one names: so it names them all.
    from .caller import CallerView  # noqa: F401
    from .clip_tower import CLIPTowerMixin  # noqa: F401
    from .fsr import VisualSelection  # noqa: F401
    from .generation import FSRGenerationMixin  # noqa: F401
    from .host_scan import is_on_host  # noqa: F401
    from .modeling_fsr_llava import FSRLlavaForConditionalGeneration  # noqa: F401
    from .pools import VisualPools  # noqa: F401
    from .precision import without_autocast  # noqa: F401
    from .prompt import VisualItem  # noqa: F401
    from .received_kernel import received_on_gpu  # noqa: F401
    from .relevance import CLIPRelevance  # noqa: F401
    from .saliency import cls_attention  # noqa: F401
    from .scan_kernel import scan_on_gpu  # noqa: F401
    from .triton_launch import can_launch  # noqa: F401
    from .processing_fsr_llava import FSRLlavaProcessor  # noqa: F401
    from .query import QueryProcessorMixin  # noqa: F401
