"""LLaVA-NeXT with FSR."""

from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from ..configuration.configuration_fsr_llava_next import FSRLlavaNextConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import check_views, list_sizes, newlines_of_rows
from .clip_tower import CLIPTowerMixin, check_clip_tower
from .offload import own_weights
from .pools import VisualPools, pool_views
from .prompt import VisualItem, find_visual_items


__all__ = ["FSRLlavaNextForConditionalGeneration"]


class FSRLlavaNextForConditionalGeneration(RemoteCodeMixin, CLIPTowerMixin, LlavaNextForConditionalGeneration):
    r"""
    [`LlavaNextForConditionalGeneration`] that keeps the visual tokens of each image that matter for the question
    (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    An image is a base view and tiles, whose padding the stock class cuts off before it ends every row of them with a
    newline. By default each view is a pool of its own, with a share of the budget in proportion to the tokens that are
    left of it (`fsr_config.pool="item"`: one pool for the image), and newlines are dropped
    (`fsr_config.newline="keep"`: one stays for every row that still holds a token, on top of the budget). An image
    that is within its budget stays as it is, newlines included.

    The setting of the published results, 2880 tokens down to 960, 640 or 320 with an equal budget for each of five
    views, needs `image_grid_pinpoints=[[672, 672]]` in the config and in the image processor, and pictures that were
    padded to a square.

    Args:
        config (`FSRLlavaNextConfig`):
            With `fsr_config.text_encoder_config`, the model has the CLIP text tower as `text_encoder` and ranks tokens
            by saliency and relevance; without, by saliency alone.

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
    visual_inputs = ("pixel_values", "image_sizes", "vision_feature_layer", "vision_feature_select_strategy")

    def find_items(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> list[VisualItem]:
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        check_clip_tower(self.config, layer, vision_feature_select_strategy or "default")
        sizes = list_sizes(image_sizes)
        check_views(pixel_values, self._num_views(sizes))
        return find_visual_items(input_ids, self.config.image_token_id, [len(run) for run in self._pack(sizes)])

    def num_candidates(self, items: list[VisualItem], image_sizes: torch.Tensor, **visual) -> list[int]:
        return [int((run >= 0).sum()) for run in self._pack(list_sizes(image_sizes))]

    def encode_visuals(
        self,
        items: list[VisualItem],
        query: torch.Tensor | None,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
    ) -> VisualPools:
        sizes = list_sizes(image_sizes)
        num_views = self._num_views(sizes)
        rows = [item.row for item, number in zip(items, num_views) for _ in range(number)]
        with own_weights(self.model):
            outputs, saliency, relevance = self.run_clip_tower(
                pixel_values, rows, query, vision_feature_layer, vision_feature_select_strategy, image_sizes=sizes
            )

        fsr: Any = self.config.fsr_config
        area = self._side**2
        runs = self._pack(sizes)
        if fsr.pool == "view":
            views = [run // area for run in runs]  # -1 for a newline
        else:
            views = [run.clamp(max=0) for run in runs]
        firsts = torch.tensor([0, *num_views]).cumsum(0) * area
        patch = torch.cat([run.clamp(min=0) + first for run, first in zip(runs, firsts)])  # anything for a newline
        patch = patch.to(saliency.device, non_blocking=True)
        return pool_views(
            outputs.pooler_output,
            views,
            saliency.flatten()[patch],
            None if relevance is None else relevance.flatten()[patch],
            grid=[self._grid(run) for run in runs],
            newlines=[newlines_of_rows(run < 0, first=area) for run in runs],
        )

    def _pop_visual(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        visual = super()._pop_visual(kwargs)
        # Only the host reads the sizes: one copy here in place of one for every image and use.
        if visual is not None and isinstance(visual.get("image_sizes"), torch.Tensor):
            visual["image_sizes"] = visual["image_sizes"].cpu()
        return visual

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

    def _grid(self, run: torch.Tensor) -> torch.Tensor:
        """View, row and column of each placeholder, `(placeholders, 3)`; -1 for a newline."""
        grid = torch.stack([run // self._side**2, run // self._side % self._side, run % self._side], dim=-1)
        return grid.masked_fill(run[:, None] < 0, -1)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.LongTensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        mm_encoder_outputs: dict | None = None,  # `generate` of the stock class encodes images ahead
        **kwargs,
    ):
        r"""
        As [`LlavaNextForConditionalGeneration.forward`]. With `pixel_values` the prompt is compressed first: the loss
        is that of the compressed sequence, where labels on image placeholders never count; `logits` stand at the
        caller's positions, zeros at dropped ones, and `logits_to_keep` means those; `hidden_states`, `attentions` and
        `past_key_values` have the compressed length. `position_ids`, packed sequences and `inputs_embeds` cannot stand
        beside `pixel_values`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, max_views, channels, height, width)`):
                Base view and tiles of each image, padded with views that nothing looks at; or all views in one
                `(views, channels, height, width)`.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`):
                Height and width of each image before preprocessing.
            query_input_ids (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
                The question in ids of CLIP's tokenizer, made by [`FSRLlavaNextProcessor`].
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

        >>> model = AutoModel.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("org/llava-v1.6-vicuna-7b-fsr", trust_remote_code=True)
        >>> inputs = processor(images=image, text="USER: <image>\nWhat is this? ASSISTANT:", return_tensors="pt")
        >>> out = model.generate(**inputs, max_new_tokens=64)
        ```
        """
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
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
    "FSRLlavaNextForConditionalGeneration", get_checkpoint_conversion_mapping("llava_next"), overwrite=True
)
