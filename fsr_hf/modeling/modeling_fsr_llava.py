"""LLaVA-1.5 with FSR."""

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaModel

from ..configuration.configuration_fsr_llava import FSRLlavaConfig
from ..configuration.remote_code import RemoteCodeMixin
from .checkpoint_keys import register_stock_keys
from .clip_tower import CLIPTowerMixin, resolve_clip_layer
from .generation import FSRGenerationMixin
from .pools import VisualTokens
from .prompt import VisualItem


__all__ = ["FSRLlavaForConditionalGeneration", "FSRLlavaModel"]


class FSRLlavaModel(CLIPTowerMixin, LlavaModel):
    """
    [`LlavaModel`] that keeps the `fsr_config.num_visual_tokens` visual tokens of each image that matter for the
    question (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)). With
    `fsr_config.text_encoder_config`, it has the CLIP text tower as `text_encoder` and ranks tokens by saliency and
    relevance; without, by saliency alone.
    """

    config_class = FSRLlavaConfig
    visual_inputs = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")

    def build_items(self, pixel_values: torch.Tensor, image_sizes: None = None, **choice: Any) -> list[VisualItem]:
        resolve_clip_layer(self.config, **choice)
        if pixel_values.ndim != 4:
            raise ValueError(
                "`pixel_values` must have the shape (images, channels, height, width), but its shape is "
                f"{tuple(pixel_values.shape)}."
            )
        size = self.config.vision_config.patch_size
        height, width = (side // size for side in pixel_values.shape[-2:])
        grid = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
        return [VisualItem("image", grid, [torch.arange(len(grid))]) for _ in pixel_values]

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        return visual | {"pixel_values": visual["pixel_values"][numbers["image"]]}

    def encode_items(self, items, query, pixel_values, image_sizes=None, **choice):
        rows = [item.row for item in items]
        outputs, saliency, relevance = self.run_clip_tower(pixel_values, rows, query, **choice)
        relevance = None if relevance is None else relevance.flatten(0, 1)
        return VisualTokens(outputs.pooler_output, saliency.flatten(), relevance), {"image": outputs}


class FSRLlavaForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, LlavaForConditionalGeneration):
    r"""
    [`LlavaForConditionalGeneration`] on an [`FSRLlavaModel`]: `generate()` and `forward()` prune the visual tokens of
    each image.

    ```python
    >>> model = AutoModel.from_pretrained("org/llava-1.5-7b-fsr", trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained("org/llava-1.5-7b-fsr", trust_remote_code=True)
    >>> inputs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    >>> out = model.generate(**inputs, max_new_tokens=64)
    ```
    """

    config_class = FSRLlavaConfig
    inner_class = FSRLlavaModel


register_stock_keys(FSRLlavaForConditionalGeneration, "llava")
register_stock_keys(FSRLlavaModel, "LlavaModel")
