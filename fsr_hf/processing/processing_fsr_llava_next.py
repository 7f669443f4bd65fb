"""The processor of LLaVA-NeXT with FSR: the stock one, plus the query for CLIP's text tower."""

from typing import Any

from transformers import LlavaNextProcessor, ProcessorMixin

from ..configuration.remote_code import RemoteCodeMixin
from .query import QueryProcessorMixin, check_query_tokenizer


__all__ = ["FSRLlavaNextProcessor"]


class FSRLlavaNextProcessor(QueryProcessorMixin, RemoteCodeMixin, LlavaNextProcessor):
    r"""
    [`LlavaNextProcessor`] that also emits `query_input_ids` and `query_attention_mask`: what Focus looks for in an
    image.

    Args:
        image_processor ([`LlavaNextImageProcessor`]):
            As in [`LlavaNextProcessor`]. Its `image_grid_pinpoints` have to be those of the model's config.
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
        # The assignments of `LlavaNextProcessor.__init__`, which takes no third attribute.
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token = getattr(tokenizer, "image_token", image_token)
        self.image_token_id = getattr(tokenizer, "image_token_id", None) or tokenizer.convert_tokens_to_ids(
            self.image_token
        )
        query_tokenizer = check_query_tokenizer(query_tokenizer)
        ProcessorMixin.__init__(self, image_processor, tokenizer, query_tokenizer, chat_template=chat_template)
