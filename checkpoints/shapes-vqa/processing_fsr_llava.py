# Generated from fsr_hf 0.1.0 (fsr_hf.processing.processing_fsr_llava), do not edit.
"""The processor of LLaVA-1.5 with FSR: the stock one, plus the query for CLIP's text tower."""

from typing import Any

from transformers import LlavaProcessor, ProcessorMixin

from .remote_code import RemoteCodeMixin
from .query import QueryProcessorMixin, check_query_tokenizer


__all__ = ["FSRLlavaProcessor"]


class FSRLlavaProcessor(QueryProcessorMixin, RemoteCodeMixin, LlavaProcessor):
    r"""
    [`LlavaProcessor`] that also emits `query_input_ids` and `query_attention_mask`: what Focus looks for in an image.

    Args:
        image_processor ([`CLIPImageProcessor`]):
            As in [`LlavaProcessor`].
        tokenizer ([`PreTrainedTokenizerBase`]):
            The language model's tokenizer.
        query_tokenizer ([`CLIPTokenizer`]):
            The tokenizer of the CLIP text tower. Saved in a subfolder of its own name.
        patch_size (`int`, *optional*):
            Patch size of the vision tower.
        vision_feature_select_strategy (`str`, *optional*):
            As in the model's config.
        chat_template (`str`, *optional*):
            The template of a conversation.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            The placeholder of an image, where the tokenizer names none.
        num_additional_image_tokens (`int`, *optional*, defaults to 0):
            Tokens that the vision tower adds to the patches of an image, such as 1 for [CLS].
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        query_tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        **kwargs: Any,
    ):
        # The assignments of `LlavaProcessor.__init__`, which takes no third attribute.
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = tokenizer.encode(self.image_token, add_special_tokens=False)[0]
        query_tokenizer = check_query_tokenizer(query_tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, query_tokenizer, chat_template=chat_template)


from typing import TYPE_CHECKING  # noqa: E402


if TYPE_CHECKING:
    # transformers copies and downloads the files that it finds named in imports. These names keep the code together
    # when a config or a processor is loaded or saved by itself. After an interrupted download it asks again only for
    # files that this one names: so it names them all.
    from .configuration_fsr import FSRConfig  # noqa: F401
    from .configuration_fsr_llava import FSRLlavaConfig  # noqa: F401
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
