"""LLaVA-NeXT with FSR."""

from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration, LlavaNextModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..configuration.configuration_fsr_llava_next import FSRLlavaNextConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import check_views, list_sizes, split_views, take_views
from .checkpoint_keys import register_stock_keys
from .clip_tower import CLIPTowerMixin, resolve_clip_layer
from .generation import FSRGenerationMixin
from .offload import offloaded_params_loaded
from .pools import VisualTokens
from .prompt import VisualItem


__all__ = ["FSRLlavaNextForConditionalGeneration", "FSRLlavaNextModel"]


class FSRLlavaNextModel(CLIPTowerMixin, LlavaNextModel):
    """
    [`LlavaNextModel`] that keeps the visual tokens of each image that matter for the question (Focus-Scan-Refine,
    [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    An image is a base view and tiles, whose padding the stock class cuts off before it ends every row of them with a
    newline. By default each view is a pool of its own, with a share of the budget in proportion to the tokens that are
    left of it (`fsr_config.pool="item"`: one pool for the image). Newlines are dropped. An image that is within its
    budget stays as it is, newlines included.

    Args:
        config (`FSRLlavaNextConfig`):
            With `fsr_config.text_encoder_config`, the model has the CLIP text tower as `text_encoder` and ranks tokens
            by saliency and relevance; without, by saliency alone.
    """

    config_class = FSRLlavaNextConfig
    config: FSRLlavaNextConfig
    visual_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def build_items(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> list[VisualItem]:
        resolve_clip_layer(self.config, vision_feature_layer, vision_feature_select_strategy)
        sizes = list_sizes(image_sizes)
        check_views(pixel_values, self._num_views(sizes))
        fsr: Any = self.config.fsr_config
        items = []
        for patches in self._pack(sizes):
            is_newline = patches < 0
            view, place = patches // self._side**2, patches % self._side**2
            grid = torch.stack([view, place // self._side, place % self._side], dim=-1)
            grid = grid.masked_fill(is_newline[:, None], -1)
            pools = split_views(view if fsr.pool == "view" else view.clamp(max=0), is_newline)
            items.append(VisualItem("image", grid, pools))
        return items

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        sizes = list_sizes(visual["image_sizes"])
        pixel_values = take_views(visual["pixel_values"], self._num_views(sizes), numbers["image"])
        return visual | {"pixel_values": pixel_values, "image_sizes": [sizes[number] for number in numbers["image"]]}

    def encode_items(
        self,
        items: list[VisualItem],
        query: torch.Tensor | None,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> tuple[VisualTokens, dict[str, Any]]:
        num_views = self._num_views(list_sizes(image_sizes))
        rows = [item.row for item, number in zip(items, num_views) for _ in range(number)]
        with offloaded_params_loaded(self):
            choice = {"layer": vision_feature_layer, "strategy": vision_feature_select_strategy}
            outputs, saliency, relevance = self.run_clip_tower(
                pixel_values, rows, query, **choice, image_sizes=image_sizes
            )
        # Each placeholder's patch among those of all views; any patch for a newline.
        firsts = torch.tensor([0, *num_views])[:-1].cumsum(0)
        grid = torch.cat([item.grid.clamp(min=0) + torch.tensor([first, 0, 0]) for item, first in zip(items, firsts)])
        patch = (grid @ torch.tensor([self._side**2, self._side, 1])).to(saliency.device, non_blocking=True)
        relevance = None if relevance is None else relevance.flatten(0, 1)[patch]
        return VisualTokens(outputs.pooler_output, saliency.flatten()[patch], relevance), {"image": outputs}

    @property
    def _side(self) -> int:
        """Patches on a side of a view."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    def _num_views(self, sizes: list[list[int]]) -> list[int]:
        """Views of each image that the tower sees: the base view and the tiles."""
        side = self.config.vision_config.image_size
        return [image_size_to_num_patches(size, self.config.image_grid_pinpoints, side) for size in sizes]

    def _pack(self, sizes: list[list[int]]) -> list[torch.Tensor]:
        """
        For each image, which patch fills each of its placeholders, `(placeholders,)`: its number over all views, -1
        for a newline. The stock class packs the numbers as if they were features.
        """
        if not sizes:
            return []
        area = self._side**2
        numbers = [torch.arange(views * area).view(views, area, 1) for views in self._num_views(sizes)]
        runs, _ = self.pack_image_features(numbers, sizes, "default", image_newline=torch.tensor([-1]))
        return [run[:, 0] for run in runs]


class FSRLlavaNextForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, LlavaNextForConditionalGeneration):
    r"""
    [`LlavaNextForConditionalGeneration`] on an [`FSRLlavaNextModel`]: `generate()` and `forward()` prune the visual
    tokens of each image.

    The setting of the published results, 2880 tokens down to 960, 640 or 320 with an equal budget for each of five
    views, needs `image_grid_pinpoints=[[672, 672]]` in the config and in the image processor, and pictures that were
    padded to a square.

    Args:
        config (`FSRLlavaNextConfig`):
            As for [`FSRLlavaNextModel`].

    Example:

    ```python
    >>> from PIL import ImageOps
    >>> from transformers import AutoModel, AutoProcessor

    >>> grid = {"image_grid_pinpoints": [[672, 672]]}  # the published setting
    >>> model = AutoModel.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True, **grid)
    >>> processor = AutoProcessor.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True, **grid)
    >>> image = ImageOps.pad(image, (max(image.size),) * 2)
    >>> inputs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
    >>> out = model.generate(**inputs, num_visual_tokens=640, max_new_tokens=64)  # 5 x 128
    ```
    """

    config_class = FSRLlavaNextConfig
    config: FSRLlavaNextConfig
    inner_class = FSRLlavaNextModel


register_stock_keys(FSRLlavaNextForConditionalGeneration, "llava_next")
register_stock_keys(FSRLlavaNextModel, "LlavaNextModel")
