"""LLaVA-Video with FSR."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightRenaming
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import check_views, list_sizes, newlines_of_rows
from .generation import FSRGenerationMixin
from .offload import own_weights
from .pools import VisualPools, pool_views
from .prompt import VisualItem, find_visual_items
from .saliency import attention_received


__all__ = ["FSRLlavaVideoForConditionalGeneration"]


class _Layout(NamedTuple):
    """
    What the run of placeholders of an image or a video holds, from its shape alone.

    Args:
        grid (`torch.LongTensor` of shape `(placeholders, 3)`): View or frame, row, column; column -1 is a newline.
        view (`torch.LongTensor` of shape `(placeholders,)`): Its pool, if views are pools; -1 is a newline.
        newline (`torch.LongTensor` of shape `(placeholders,)`): Place of the newline that ends its row, -1 for none.
    """

    grid: torch.Tensor
    view: torch.Tensor
    newline: torch.Tensor


class FSRLlavaVideoForConditionalGeneration(
    RemoteCodeMixin, FSRGenerationMixin, LlavaOnevisionForConditionalGeneration
):
    """
    LLaVA-Video that keeps the share `fsr_config.retention_ratio` of the visual tokens of each video, or image
    (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    It is [`LlavaOnevisionForConditionalGeneration`] but for its videos: the patches of each frame are pooled
    (`config.spatial_pool_mode`), and every row of every frame ends with a newline, which makes 14 x 15 tokens a frame
    in LLaVA-Video-7B. The stock class ends a whole video with one newline, so it never embeds a video here, pruned or
    not.

    By default a whole video is one pool, so that Scan leaves out what repeats from frame to frame
    (`fsr_config.pool="view"`: every frame is a pool of its own), and newlines are dropped
    (`fsr_config.newline="keep"`: those of rows that still hold a token stay, on top of the budget). A video within its
    budget stays as it is, newlines included. Tokens are ranked by the attention that their patches receive; there is
    no relevance to the question.

    Args:
        config (`FSRLlavaVideoConfig`):
            The vision tower has to be a SigLIP.
    """

    config_class = FSRLlavaVideoConfig
    config: FSRLlavaVideoConfig
    visual_inputs = (
        "pixel_values",
        "image_sizes",
        "batch_num_images",
        "vision_aspect_ratio",
        "pixel_values_videos",
        "video_num_frames",
        "image_sizes_videos",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )
    pixel_inputs = ("pixel_values", "pixel_values_videos")

    def __init__(self, config: FSRLlavaVideoConfig):
        _check_tower(config, config.vision_feature_layer, config.vision_feature_select_strategy)
        super().__init__(config)

    # ------------------------------------------------------------------ what FSR asks of a family

    def placeholder_ids(self) -> list[int]:
        return [self.config.image_token_id, self.config.video_token_id]

    def runs_stock(self, visual: dict[str, Any]) -> bool:
        return visual.get("pixel_values_videos") is None

    def find_items(self, input_ids: torch.Tensor, **visual: Any) -> list[VisualItem]:
        self._feature_layer(**visual)
        images = [len(layout.grid) for layout in self._image_layouts(**visual)]
        videos = [len(layout.grid) for layout in self._video_layouts(**visual)]
        items = find_visual_items(input_ids, self.config.image_token_id, images)
        items += find_visual_items(input_ids, self.config.video_token_id, videos, "video")
        return sorted(items, key=lambda item: (item.row, item.start))

    def num_candidates(self, items: list[VisualItem], **visual: Any) -> list[int]:
        return [int((layout.view >= 0).sum()) for layout in self._layouts(items, **visual)]

    def encode_visuals(self, items: list[VisualItem], query: None, **visual: Any) -> VisualPools:
        encoded = {"image": self._encode_images(**visual), "video": self._encode_videos(**visual)}
        runs, saliency = zip(*(next(encoded[item.modality]) for item in items))
        fsr: Any = self.config.fsr_config
        layouts = self._layouts(items, **visual)
        views = [layout.view if fsr.pool == "view" else layout.view.clamp(max=0) for layout in layouts]
        grids, newlines = [layout.grid for layout in layouts], [layout.newline for layout in layouts]
        return pool_views(list(runs), views, torch.cat(saliency), None, grids, newlines)

    def _check_query(self, query, fsr, batch_size: int) -> None:
        if fsr.uses_relevance:
            raise ValueError(
                f"`fsr_config.relevance={fsr.relevance!r}` is not supported: no text encoder shares a space with the "
                'vision tower of LLaVA-Video. Set it to "none": FSR ranks tokens by saliency alone here.'
            )

    def _pop_visual(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        visual = super()._pop_visual(kwargs)
        # Only the host reads these: one copy here in place of one for every item and use.
        for name in ("image_sizes", "batch_num_images", "video_num_frames"):
            if visual is not None and isinstance(visual.get(name), torch.Tensor):
                visual[name] = visual[name].cpu()
        return visual

    # ------------------------------------------------------------------ features and saliency

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_num_frames: torch.LongTensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs,
    ):
        """
        As the stock method, in LLaVA-Video's layout.

        Args:
            pixel_values_videos (`torch.FloatTensor` of shape `(videos, frames, channels, height, width)`):
                The frames of each video.
            video_num_frames (`torch.LongTensor` of shape `(videos,)`, *optional*):
                How many of them are frames of the video; the others are padding.

        Returns:
            The output of the vision tower. Its `pooler_output` holds for each video the tokens that fill its run of
            placeholders, newlines included: `(frames * rows * (columns + 1), hidden_size)`.
        """
        layer = self._feature_layer(vision_feature_layer, vision_feature_select_strategy)
        num_frames = self._num_frames(pixel_values_videos, video_num_frames)
        frames = torch.cat([video[:number] for video, number in zip(pixel_values_videos, num_frames)])
        # An index of 5.17 counts the outputs of blocks, later ones count the input of the first block, too.
        states = [layer - 2, layer - 1, layer] if layer > 1 else True
        outputs = self.model.vision_tower(frames, **{"output_hidden_states": states, **kwargs}, return_dict=True)
        with own_weights(self.model):
            features = self._pool(self.model.multi_modal_projector(self._hidden_state(outputs, layer)))
            newlines = self.model.image_newline.to(features).expand(*features.shape[:2], 1, -1)
            features = torch.cat([features, newlines], dim=2)  # [frames, rows, columns + 1, D]
        outputs.pooler_output = [video.flatten(0, 2) for video in features.split(num_frames)]
        return outputs

    def _encode_videos(self, pixel_values_videos: torch.Tensor | None = None, **visual: Any):
        """For each video, its tokens `(placeholders, hidden_size)` and their saliency `(placeholders,)`."""
        if pixel_values_videos is None:
            return
        layer = self._feature_layer(**visual)
        outputs = self.get_video_features(pixel_values_videos, visual.get("video_num_frames"), layer)
        saliency = self._pool(self._saliency(layer, self._hidden_state(outputs, layer - 1))[..., None])
        saliency = nn.functional.pad(saliency, (0, 0, 0, 1)).flatten()  # [placeholders of all videos]
        yield from zip(outputs.pooler_output, saliency.split([len(run) for run in outputs.pooler_output]))

    def _encode_images(self, pixel_values: torch.Tensor | None = None, **visual: Any):
        """For each image, its tokens `(placeholders, hidden_size)` and their saliency `(placeholders,)`."""
        if pixel_values is None:
            return
        layer = self._feature_layer(**visual)
        names = ("image_sizes", "batch_num_images", "vision_aspect_ratio")
        with own_weights(self.model):
            outputs = self.get_image_features(
                pixel_values,
                **{name: visual.get(name) for name in names},
                vision_feature_layer=layer,
                output_hidden_states=[layer - 1, layer],
                return_dict=True,
            )
        saliency = self._saliency(layer, self._hidden_state(outputs, layer - 1))[..., None]  # [views, area, 1]
        num_views = [1 + rows * columns for rows, columns in self._tiles(**visual)]
        packed = self._pack(saliency.split(num_views), saliency.new_zeros(1), **visual)
        yield from zip(outputs.pooler_output, (score[:, 0] for score in packed))

    def _hidden_state(self, outputs: Any, number: int) -> torch.Tensor:
        """The input of block `number`, or of what follows the last; that of the first may be missing in `outputs`."""
        missing = self.config.vision_config.num_hidden_layers + 1 - len(outputs.hidden_states)
        return outputs.hidden_states[number - missing]

    def _saliency(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attention that each patch of a view receives in the block whose output is `layer`: `(views, area)`."""
        block = self.model.vision_tower.encoder.layers[layer - 1]
        attention = block.self_attn
        with torch.no_grad():
            hidden_states = block.layer_norm1(hidden_states)
            query, key = (
                project(hidden_states).flatten(0, 1).unflatten(-1, (attention.num_heads, -1))
                for project in (attention.q_proj, attention.k_proj)
            )
        views, area, _ = hidden_states.shape
        return attention_received(query, key, [area] * views, attention.scale).view(views, area)

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Pool the patches of each frame over space: `(frames, area, size)` to `(frames, rows, columns, size)`."""
        grid = patches.unflatten(1, (self._side, self._side)).permute(0, 3, 1, 2).contiguous()
        if self.config.spatial_pool_mode == "average":
            grid = nn.functional.avg_pool2d(grid, 2)
        else:
            grid = nn.functional.interpolate(grid, size=[self._pooled_side] * 2, mode="bilinear")
        return grid.permute(0, 2, 3, 1)

    def _feature_layer(
        self, vision_feature_layer: int | None = None, vision_feature_select_strategy: str | None = None, **_: Any
    ) -> int:
        """The block, counted from 1, whose output becomes the features."""
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        _check_tower(self.config, layer, vision_feature_select_strategy or "full")
        return layer % (self.config.vision_config.num_hidden_layers + 1)

    # ------------------------------------------------------------------ layouts, from shapes alone

    @property
    def _side(self) -> int:
        """Patches on a side of a view or a frame."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def _pooled_side(self) -> int:
        """Tokens on a side of a frame."""
        return self._side // 2 if self.config.spatial_pool_mode == "average" else math.ceil(self._side / 2)

    def _layouts(self, items: list[VisualItem], **visual: Any) -> list[_Layout]:
        layouts = {"image": iter(self._image_layouts(**visual)), "video": iter(self._video_layouts(**visual))}
        return [next(layouts[item.modality]) for item in items]

    def _video_layouts(
        self, pixel_values_videos: torch.Tensor | None = None, video_num_frames: torch.Tensor | None = None, **_: Any
    ) -> list[_Layout]:
        if pixel_values_videos is None:
            return []
        rows, columns = torch.arange(self._pooled_side), torch.tensor([*range(self._pooled_side), -1])
        layouts = []
        for number in self._num_frames(pixel_values_videos, video_num_frames):
            grid = torch.cartesian_prod(torch.arange(number), rows, columns)
            is_newline = grid[:, 2] < 0
            layouts.append(_Layout(grid, grid[:, 0].masked_fill(is_newline, -1), newlines_of_rows(is_newline)))
        return layouts

    def _num_frames(self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None) -> list[int]:
        """Frames of each video."""
        shape, side = tuple(pixel_values_videos.shape), self.config.vision_config.image_size
        if len(shape) != 5 or shape[-2:] != (side, side):
            raise ValueError(
                f"`pixel_values_videos` must have the shape (videos, frames, channels, {side}, {side}), but its shape "
                f"is {shape}. The model's processor makes it."
            )
        if video_num_frames is None:
            numbers = [shape[1]] * shape[0]
        else:
            numbers = torch.as_tensor(video_num_frames).tolist()
        if len(numbers) != shape[0] or not all(1 <= number <= shape[1] for number in numbers):
            raise ValueError(
                f"`video_num_frames` is {numbers}, and `pixel_values_videos` of shape {shape} holds {shape[0]} videos "
                f"of up to {shape[1]} frames: each needs a number, and at least 1 frame."
            )
        return numbers

    def _image_layouts(self, pixel_values: torch.Tensor | None = None, **visual: Any) -> list[_Layout]:
        if pixel_values is None:
            return []
        tiles = self._tiles(**visual)
        check_views(pixel_values, [1 + rows * columns for rows, columns in tiles])
        # The stock class packs, for each patch, whether it is of a tile, its row and its column as if they were a
        # feature. Rows and columns count on from tile to tile, since it interpolates a large picture as a whole.
        patches = torch.cartesian_prod(torch.arange(self._side), torch.arange(self._side)).double()
        parts = []
        for rows, columns in tiles:
            corners = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, None] * self._side
            views = [(0.0, patches[None]), (1.0, corners + patches)]
            parts.append(torch.cat([nn.functional.pad(view, (1, 0), value=is_tile) for is_tile, view in views]))
        runs = self._pack(parts, torch.full((3,), -1.0, dtype=torch.double), **visual)
        return [self._image_layout(run, columns) for run, (_, columns) in zip(runs, tiles)]

    def _image_layout(self, run: torch.Tensor, columns: int) -> _Layout:
        """The layout of an image whose tiles stand in `columns`; an interpolated token goes by the nearest patch."""
        side, nearest = self._side, run.round().long()
        is_tile, row, column = nearest.unbind(-1)
        is_newline = is_tile < 0
        view = torch.where(is_tile > 0, 1 + row // side * columns + column // side, 0).masked_fill(is_newline, -1)
        grid = torch.stack([view, row % side, column % side], dim=-1).masked_fill(is_newline[:, None], -1)
        if not torch.equal(run, nearest.double()):  # tokens between patches, which may be of two views
            view = view.clamp(max=0)
        return _Layout(grid, view, newlines_of_rows(is_newline, first=side**2 if columns else 0))

    def _pack(
        self, parts, newline: torch.Tensor, image_sizes=None, vision_aspect_ratio: str | None = None, **_: Any
    ) -> list[torch.Tensor]:
        """What the stock class makes of the views of each image: `(views, area, size)` to `(placeholders, size)`."""
        if not parts:
            return []
        ratio = vision_aspect_ratio or self.config.vision_aspect_ratio
        return self.model.pack_image_features(parts, list_sizes(image_sizes), newline, vision_aspect_ratio=ratio)[0]

    def _tiles(self, image_sizes=None, batch_num_images=None, **_: Any) -> list[tuple[int, int]]:
        """Rows and columns of the tiles of each image; none where a row of the prompt has more than one image."""
        sizes, side = list_sizes(image_sizes), self.config.vision_config.image_size
        numbers = [1] * len(sizes) if batch_num_images is None else torch.as_tensor(batch_num_images).tolist()
        if sum(numbers) != len(sizes):
            raise ValueError(
                f"`batch_num_images` {numbers} adds up to {sum(numbers)} images, but `image_sizes` has {len(sizes)}."
            )
        has_tiles = [number == 1 for number in numbers for _ in range(number)]
        return [
            get_anyres_image_grid_shape(size, self.config.image_grid_pinpoints, side) if split else (0, 0)
            for size, split in zip(sizes, has_tiles)
        ]

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.LongTensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_sizes_videos: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        vision_aspect_ratio: str | None = None,
        batch_num_images: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        video_num_frames: torch.LongTensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        mm_encoder_outputs: dict | None = None,  # `generate` of the stock class encodes images ahead
        **kwargs,
    ):
        r"""
        As [`LlavaOnevisionForConditionalGeneration.forward`]. With `pixel_values` or `pixel_values_videos` the prompt
        is compressed first: the loss is that of the compressed sequence, where labels on placeholders never count;
        `logits` stand at the caller's positions, zeros at dropped ones, and `logits_to_keep` means those;
        `hidden_states`, `attentions` and `past_key_values` have the compressed length. `position_ids`, packed
        sequences and `inputs_embeds` cannot stand beside pixels.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(images, max_views, channels, height, width)`):
                Base view and tiles of each image, padded with views that nothing looks at; or all views in one
                `(views, channels, height, width)`.
            image_sizes (`torch.LongTensor` of shape `(images, 2)`):
                Height and width of each image before preprocessing.
            batch_num_images (`torch.LongTensor`, *optional*):
                Images in each row that has any. Where there are more than one, they have no tiles.
            pixel_values_videos (`torch.FloatTensor` of shape `(videos, frames, channels, height, width)`):
                The frames of each video.
            video_num_frames (`torch.LongTensor` of shape `(videos,)`, *optional*):
                How many of them are frames of the video; the others are padding.
            num_visual_tokens (`int`, *optional*):
                Budget of each image or video for this call.
            retention_ratio (`float`, *optional*):
                The same as a share of its tokens.
            fsr_enabled (`bool`, *optional*):
                Whether to prune in this call.

        Example:

        ```python
        >>> from transformers import AutoModel, AutoProcessor

        >>> model = AutoModel.from_pretrained("org/LLaVA-Video-7B-Qwen2-fsr", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("org/LLaVA-Video-7B-Qwen2-fsr", trust_remote_code=True)
        >>> content = [{"type": "video", "path": "video.mp4"}, {"type": "text", "text": "What happens?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        ...     processor_kwargs={"num_frames": 32},
        ... )
        >>> out = model.generate(**inputs, max_new_tokens=64)
        ```
        """
        if video_num_frames is not None:  # no input of the stock class
            kwargs["video_num_frames"] = video_num_frames
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            pixel_values_videos=pixel_values_videos,
            image_sizes_videos=image_sizes_videos,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            vision_aspect_ratio=vision_aspect_ratio,
            batch_num_images=batch_num_images,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            num_visual_tokens=num_visual_tokens,
            retention_ratio=retention_ratio,
            fsr_enabled=fsr_enabled,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )


def _check_tower(config: PreTrainedConfig, layer, strategy) -> None:
    """
    Raises:
        `ValueError`: for a tower or a choice of features whose tokens are not the patches that a block's attention is
            received by.
    """
    tower, depth = config.vision_config.model_type, config.vision_config.num_hidden_layers
    if tower != "siglip_vision_model":
        raise ValueError(
            f'`vision_config.model_type="{tower}"` is not supported: FSR reads saliency from the attention that '
            'patches receive in a SigLIP tower ("siglip_vision_model") in this family.'
        )
    if not isinstance(layer, int) or not (1 <= layer <= depth or -depth <= layer <= -1):
        raise ValueError(
            f"`vision_feature_layer={layer!r}` is not supported: FSR needs one int that names the output of a block, "
            f"1 to {depth} or -{depth} to -1, since saliency is the attention of that block."
        )
    if strategy != "full":
        raise ValueError(
            f'`vision_feature_select_strategy="{strategy}"` is not supported: it would drop a patch, since the tower '
            'has no [CLS]. Use "full".'
        )


class _OriginalName(WeightRenaming):
    """A name of an original checkpoint, which is read and never written: a saved model has the stock names."""

    __slots__ = ()

    def reverse_transform(self) -> "WeightRenaming":
        return WeightRenaming(r"(?!)", "")


# transformers knows the layouts of stock classes alone: without this an old checkpoint leaves `lm_head` random.
register_checkpoint_conversion_mapping(
    "FSRLlavaVideoForConditionalGeneration",
    [
        _OriginalName(r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
        _OriginalName(r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        _OriginalName(r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        _OriginalName(r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
        *get_checkpoint_conversion_mapping("llava_next"),
    ],
    overwrite=True,
)
