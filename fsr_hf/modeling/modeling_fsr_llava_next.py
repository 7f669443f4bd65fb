"""LLaVA-NeXT with FSR."""

from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel

from ..configuration.configuration_fsr_llava_next import FSRLlavaNextConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import count_views, image_items, list_sizes, take_views, tiles_of
from .checkpoint_keys import register_stock_keys
from .clip_tower import CLIPTowerMixin, resolve_clip_layer
from .generation import FSRGenerationMixin
from .pools import VisualTokens
from .prompt import VisualItem, starts_of


__all__ = ["FSRLlavaNextForConditionalGeneration", "FSRLlavaNextModel"]


class FSRLlavaNextModel(CLIPTowerMixin, LlavaNextModel):
    """
    [`LlavaNextModel`] that keeps the visual tokens of each image that matter for the question, as [`FSRLlavaModel`]
    does. An image is a base view and tiles, whose padding the stock class cuts off before it ends every row of them
    with a newline. By default each view is a pool of its own, with a share of the budget in proportion to the tokens
    that are left of it (`fsr_config.pool="item"`: one pool for the image). Newlines are dropped. An image that is
    within its budget stays as it is, newlines included.
    """

    config_class = FSRLlavaNextConfig
    visual_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def build_items(self, pixel_values: torch.Tensor, image_sizes=None, **choice: Any) -> list[VisualItem]:
        resolve_clip_layer(self.config, **choice)

        def pack(views, newline):
            return self.pack_image_features(views, list_sizes(image_sizes), "default", image_newline=newline)[0]

        return image_items(pixel_values, tiles_of(image_sizes, self.config), pack, self.config)

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        sizes, images = list_sizes(visual["image_sizes"]), numbers["image"]
        views = take_views(visual["pixel_values"], count_views(tiles_of(sizes, self.config)), images)
        return visual | {"pixel_values": views, "image_sizes": [sizes[number] for number in images]}

    def encode_items(self, items, query, pixel_values, image_sizes, **choice):
        num_views = count_views(tiles_of(image_sizes, self.config))
        rows = [item.row for item, number in zip(items, num_views) for _ in range(number)]
        choice["image_sizes"] = image_sizes
        outputs, saliency, relevance = self.run_clip_tower(pixel_values, rows, query, **choice)
        # Each placeholder's patch among those of all views; any patch for a newline.
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        grid = torch.cat([item.grid.clamp(min=0) for item in items])
        grid[:, 0] += starts_of(num_views).repeat_interleave(torch.tensor([item.length for item in items]))
        patch = (grid @ torch.tensor([side**2, side, 1])).to(saliency.device, non_blocking=True)
        relevance = None if relevance is None else relevance.flatten(0, 1)[patch]
        return VisualTokens(outputs.pooler_output, saliency.flatten()[patch], relevance), {"image": outputs}


class FSRLlavaNextForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, LlavaNextForConditionalGeneration):
    r"""
    [`LlavaNextForConditionalGeneration`] on an [`FSRLlavaNextModel`]: `generate()` and `forward()` prune the visual
    tokens of each image.

    The setting of the published results, 2880 tokens down to 960, 640 or 320 with an equal budget for each of five
    views, needs `image_grid_pinpoints=[[672, 672]]` in the config and in the image processor, and pictures that were
    padded to a square:

    ```python
    >>> grid = {"image_grid_pinpoints": [[672, 672]]}
    >>> model = AutoModel.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True, **grid)
    >>> processor = AutoProcessor.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True, **grid)
    >>> image = ImageOps.pad(image, (max(image.size),) * 2)
    >>> inputs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    >>> out = model.generate(**inputs, num_visual_tokens=640, max_new_tokens=64)  # 5 x 128
    ```
    """

    config_class = FSRLlavaNextConfig
    inner_class = FSRLlavaNextModel


register_stock_keys(FSRLlavaNextForConditionalGeneration, "llava_next")
register_stock_keys(FSRLlavaNextModel, "LlavaNextModel")
