# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.modeling_fsr_llava), do not edit.
"""LLaVA-1.5 with FSR."""

import torch
from transformers import LlavaForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration_fsr_llava import FSRLlavaConfig
from .remote_code import RemoteCodeMixin
from .clip_tower import CLIPTowerMixin
from .pools import VisualPools
from .prompt import VisualItem, find_visual_items


__all__ = ["FSRLlavaForConditionalGeneration"]


class FSRLlavaForConditionalGeneration(RemoteCodeMixin, CLIPTowerMixin, LlavaForConditionalGeneration):
    """
    [`LlavaForConditionalGeneration`] that keeps the `fsr_config.num_visual_tokens` visual tokens of each image that
    matter for the question (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    Args:
        config (`FSRLlavaConfig`):
            With `fsr_config.text_encoder_config`, the model has the CLIP text tower as `text_encoder` and ranks tokens
            by saliency and relevance; without, by saliency alone.
    """

    config_class = FSRLlavaConfig
    config: FSRLlavaConfig
    visual_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def find_items(self, input_ids: torch.LongTensor, pixel_values: torch.Tensor, **visual) -> list[VisualItem]:
        if pixel_values.ndim != 4:
            raise ValueError(
                "`pixel_values` must have the shape (images, channels, height, width), but its shape is "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = self._grid(pixel_values)
        return find_visual_items(input_ids, self.config.image_token_id, [height * width] * len(pixel_values))

    def _grid(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        size = self.config.vision_config.patch_size
        return pixel_values.shape[-2] // size, pixel_values.shape[-1] // size

    def encode_visuals(
        self,
        items: list[VisualItem],
        query: torch.Tensor | None,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: None = None,
    ) -> VisualPools:
        rows = [item.row for item in items]
        outputs, saliency, relevance = self.run_clip_tower(
            pixel_values, rows, query, vision_feature_layer, vision_feature_select_strategy
        )
        height, width = self._grid(pixel_values)
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
        return VisualPools(
            features=torch.stack(outputs.pooler_output),
            saliency=saliency,
            relevance=relevance,
            items=list(range(len(items))),
            sizes=[height * width] * len(items),
            numbers=None,
            runs=outputs.pooler_output,
            grid=[grid] * len(items),
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_sizes: torch.Tensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.LongTensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        mm_encoder_outputs: dict | None = None,  # `generate` of the stock class encodes images ahead
        **kwargs,
    ):
        r"""
        As [`LlavaForConditionalGeneration.forward`]. With `pixel_values` the prompt is compressed first: the loss is
        that of the compressed sequence, where labels on image placeholders never count; `logits` stand at the caller's
        positions, zeros at dropped ones, and `logits_to_keep` means those; `hidden_states`, `attentions` and
        `past_key_values` have the compressed length. `position_ids`, packed sequences and `inputs_embeds` cannot stand
        beside `pixel_values`.

        Args:
            query_input_ids (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
                The question in ids of CLIP's tokenizer, made by [`FSRLlavaProcessor`].
            query_attention_mask (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
                Its mask.
            num_visual_tokens (`int`, *optional*):
                Budget of each image for this call.
            retention_ratio (`float`, *optional*):
                The same as a share of its tokens.
            fsr_enabled (`bool`, *optional*):
                Whether to prune in this call.

        Example:

        ```python
        >>> from transformers import AutoModel, AutoProcessor

        >>> model = AutoModel.from_pretrained("org/llava-1.5-7b-fsr", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("org/llava-1.5-7b-fsr", trust_remote_code=True)
        >>> inputs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
        >>> out = model.generate(**inputs, max_new_tokens=64)
        ```
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            image_sizes=image_sizes,
            query_input_ids=query_input_ids,
            query_attention_mask=query_attention_mask,
            num_visual_tokens=num_visual_tokens,
            retention_ratio=retention_ratio,
            fsr_enabled=fsr_enabled,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


# transformers knows the layouts of stock classes alone: without this an old checkpoint leaves `lm_head` random.
register_checkpoint_conversion_mapping(
    "FSRLlavaForConditionalGeneration", get_checkpoint_conversion_mapping("llava"), overwrite=True
)


from typing import TYPE_CHECKING  # noqa: E402


if TYPE_CHECKING:
    # transformers copies and downloads the files that it finds named in imports. These names keep the code together
    # when a config or a processor is loaded or saved by itself. After an interrupted download it asks again only for
    # files that this one names: so it names them all.
    from .configuration_fsr import FSRConfig  # noqa: F401
    from .caller import CallerView  # noqa: F401
    from .fsr import VisualSelection  # noqa: F401
    from .generation import FSRGenerationMixin  # noqa: F401
    from .host_scan import is_on_host  # noqa: F401
    from .precision import without_autocast  # noqa: F401
    from .received_kernel import received_on_gpu  # noqa: F401
    from .relevance import CLIPRelevance  # noqa: F401
    from .saliency import cls_attention  # noqa: F401
    from .scan_kernel import scan_on_gpu  # noqa: F401
    from .triton_launch import can_launch  # noqa: F401
    from .processing_fsr_llava import FSRLlavaProcessor  # noqa: F401
    from .query import QueryProcessorMixin  # noqa: F401
