"""LLaVA-Video with FSR."""

import math
from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.core_model_loading import WeightRenaming
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import check_views, list_sizes, split_views
from .checkpoint_keys import register_stock_keys
from .compression import FSRModelMixin
from .generation import FSRGenerationMixin
from .offload import offloaded_params_loaded, sharded_params_gathered
from .pools import VisualTokens
from .prompt import VisualItem
from .saliency import attention_received, resolve_feature_layer


__all__ = ["FSRLlavaVideoForConditionalGeneration", "FSRLlavaVideoModel"]

_IMAGE_INPUTS = ("image_sizes", "batch_num_images", "vision_aspect_ratio")


class FSRLlavaVideoModel(FSRModelMixin, LlavaOnevisionModel):
    """
    LLaVA-Video that keeps the share `fsr_config.retention_ratio` of the visual tokens of each video, or image
    (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    It is [`LlavaOnevisionModel`] but for its videos: the patches of each frame are pooled
    (`config.spatial_pool_mode`), and every row of every frame ends with a newline, which makes 14 x 15 tokens a frame
    in LLaVA-Video-7B. The stock class ends a whole video with one newline.

    By default a whole video is one pool, so that Scan leaves out what repeats from frame to frame
    (`fsr_config.pool="view"`: every frame is a pool of its own). Newlines are dropped. A video within its budget stays
    as it is, newlines included. Tokens are ranked by the attention that their patches receive; there is no relevance
    to the question.

    Args:
        config (`FSRLlavaVideoConfig`):
            The vision tower has to be a SigLIP.
    """

    config_class = FSRLlavaVideoConfig
    config: FSRLlavaVideoConfig
    visual_inputs = (
        *("pixel_values", *_IMAGE_INPUTS, "pixel_values_videos", "video_num_frames", "image_sizes_videos"),
        *("vision_feature_layer", "vision_feature_select_strategy"),
    )
    pixel_inputs = ("pixel_values", "pixel_values_videos")

    def __init__(self, config: FSRLlavaVideoConfig):
        _resolve_layer(config)
        super().__init__(config)

    # ------------------------------------------------------------------ what FSR asks of a family

    def build_items(self, pixel_values=None, pixel_values_videos=None, **visual: Any) -> list[VisualItem]:
        _resolve_layer(self.config, visual.get("vision_feature_layer"), visual.get("vision_feature_select_strategy"))
        items = [] if pixel_values is None else self._image_items(pixel_values, **visual)
        if pixel_values_videos is not None:
            rows, columns = torch.arange(self._pooled_side), torch.tensor([*range(self._pooled_side), -1])
            for frames in self._num_frames(pixel_values_videos, visual.get("video_num_frames")):
                grid = torch.cartesian_prod(torch.arange(frames), rows, columns)
                items.append(self._make_item("video", grid, grid[:, 0], grid[:, 2] < 0))
        return items

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        taken = {name: visual.get(name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}
        if numbers["image"]:  # whether an image has tiles depends on the others of its row: all are encoded
            taken |= {name: visual.get(name) for name in ("pixel_values", *_IMAGE_INPUTS)}
            taken["image_numbers"] = numbers["image"]
        if videos := numbers["video"]:
            frames = torch.tensor(self._num_frames(visual["pixel_values_videos"], visual.get("video_num_frames")))
            taken |= {"pixel_values_videos": visual["pixel_values_videos"][videos], "video_num_frames": frames[videos]}
        return taken

    def encode_items(self, items: list[VisualItem], query: None, **visual: Any) -> tuple[VisualTokens, dict[str, Any]]:
        outputs, encoded = {}, {}
        for modality in dict.fromkeys(item.modality for item in items):
            encode = self._encode_images if modality == "image" else self._encode_videos
            outputs[modality], runs, scores = encode(**visual)
            encoded[modality] = zip(runs, scores)
        features, saliency = zip(*(next(encoded[item.modality]) for item in items))
        return VisualTokens(list(features), torch.cat(saliency)), outputs

    def has_own_layout(self, visual: dict[str, Any]) -> bool:
        return visual.get("pixel_values_videos") is not None

    def _forward_stock(self, **inputs):
        videos = (inputs.get("mm_encoder_outputs") or {}).get("video")
        if videos is None or isinstance(videos.pooler_output, torch.Tensor):
            return super()._forward_stock(**inputs)
        # The stock class takes one tensor here; `generate` has split the list between beams by rows before.
        video = type(videos)(pooler_output=torch.cat(videos.pooler_output)[:, None])
        inputs["mm_encoder_outputs"] = {**inputs["mm_encoder_outputs"], "video": video}
        outputs = super()._forward_stock(**inputs)
        if "video_outputs" in outputs:
            outputs["video_outputs"] = videos
        return outputs

    # ------------------------------------------------------------------ features and saliency

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        video_num_frames: torch.Tensor | None = None,
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
            The output of the vision tower. Its `pooler_output` holds what fills the placeholders of the videos, one
            after the other, newlines included: `(sum of frames * rows * (columns + 1), 1, hidden_size)`.
        """
        layer = _resolve_layer(self.config, vision_feature_layer, vision_feature_select_strategy)
        numbers = self._num_frames(pixel_values_videos, video_num_frames)
        frames = torch.cat([video[:number] for video, number in zip(pixel_values_videos, numbers)])
        # Index lists of older versions count outputs of blocks, those of newer ones the input of the first block, too.
        states = [layer - 2, layer - 1, layer] if layer > 1 else True
        outputs = self.vision_tower(frames, **{**kwargs, "output_hidden_states": states}, return_dict=True)
        with offloaded_params_loaded(self):
            features = self._pool(self.multi_modal_projector(self._hidden_state(outputs, layer)))
            newlines = self.image_newline.to(features).expand(*features.shape[:2], 1, -1)
            outputs.pooler_output = torch.cat([features, newlines], dim=2).flatten(0, 2)[:, None]
        return outputs

    def _encode_videos(self, pixel_values_videos, video_num_frames=None, vision_feature_layer=None, **visual):
        layer = _resolve_layer(self.config, vision_feature_layer)
        outputs = self.get_video_features(pixel_values_videos, layer, video_num_frames=video_num_frames)
        saliency = self._pool(self._saliency(layer, self._hidden_state(outputs, layer - 1))[..., None])
        saliency = nn.functional.pad(saliency, (0, 0, 0, 1)).flatten()  # [placeholders of all videos]
        area = self._pooled_side * (self._pooled_side + 1)
        lengths = [frames * area for frames in self._num_frames(pixel_values_videos, video_num_frames)]
        return outputs, outputs.pooler_output[:, 0].split(lengths), saliency.split(lengths)

    def _encode_images(self, pixel_values, vision_feature_layer=None, image_numbers=None, **visual):
        layer = _resolve_layer(self.config, vision_feature_layer)
        with offloaded_params_loaded(self):
            outputs = self.get_image_features(
                pixel_values,
                **{name: visual.get(name) for name in _IMAGE_INPUTS},
                vision_feature_layer=layer,
                output_hidden_states=[layer - 1, layer],
                return_dict=True,
            )
        saliency = self._saliency(layer, self._hidden_state(outputs, layer - 1))[..., None]  # [views, area, 1]
        tiles = self._tiles(visual["image_sizes"], visual.get("batch_num_images"))
        views = saliency.split([1 + rows * columns for rows, columns in tiles])
        packed = self._pack(views, saliency.new_zeros(1), **visual)
        numbers = range(len(tiles)) if image_numbers is None else image_numbers
        return outputs, [outputs.pooler_output[n] for n in numbers], [packed[n][:, 0] for n in numbers]

    def _hidden_state(self, outputs: Any, number: int) -> torch.Tensor:
        """The input of block `number`, or of what follows the last; that of the first may be missing in `outputs`."""
        missing = self.config.vision_config.num_hidden_layers + 1 - len(outputs.hidden_states)
        return outputs.hidden_states[number - missing]

    @torch.no_grad()
    def _saliency(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attention that each patch of a view receives in the block whose output is `layer`: `(views, area)`."""
        block = self.vision_tower.encoder.layers[layer - 1]
        attention = block.self_attn
        with sharded_params_gathered(block, attention):
            hidden_states = block.layer_norm1(hidden_states)
            query, key = (
                project(hidden_states).flatten(0, 1).unflatten(-1, (attention.num_heads, attention.head_dim))
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

    # ------------------------------------------------------------------ layouts, from shapes alone

    @property
    def _side(self) -> int:
        """Patches on a side of a view or a frame."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def _pooled_side(self) -> int:
        """Tokens on a side of a frame."""
        return self._side // 2 if self.config.spatial_pool_mode == "average" else math.ceil(self._side / 2)

    def _make_item(self, modality: str, grid: torch.Tensor, view: torch.Tensor, is_newline: torch.Tensor):
        fsr: Any = self.config.fsr_config
        pools = split_views(view if fsr.pool == "view" else view * 0, is_newline)
        return VisualItem(modality, grid, pools)

    def _num_frames(self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None) -> list[int]:
        """Frames of each video."""
        shape, side = tuple(pixel_values_videos.shape), self.config.vision_config.image_size
        if len(shape) != 5 or shape[-2:] != (side, side):
            raise ValueError(
                f"`pixel_values_videos` must have the shape (videos, frames, channels, {side}, {side}), but its shape "
                f"is {shape}. The model's processor makes it."
            )
        numbers = [shape[1]] * shape[0] if video_num_frames is None else torch.as_tensor(video_num_frames).tolist()
        if len(numbers) != shape[0] or not all(1 <= number <= shape[1] for number in numbers):
            raise ValueError(
                f"`video_num_frames` is {numbers}, and `pixel_values_videos` of shape {shape} holds {shape[0]} videos "
                f"of up to {shape[1]} frames: each needs a number, and at least 1 frame."
            )
        return numbers

    def _image_items(self, pixel_values, image_sizes=None, batch_num_images=None, **visual) -> list[VisualItem]:
        tiles = self._tiles(image_sizes, batch_num_images)
        check_views(pixel_values, [1 + rows * columns for rows, columns in tiles])
        # The stock class packs, for each patch, whether it is of a tile, its row and its column as if they were a
        # feature. Rows and columns count on from tile to tile, since it interpolates a large picture as a whole.
        side, patches = self._side, torch.cartesian_prod(torch.arange(self._side), torch.arange(self._side)).double()
        parts = []
        for rows, columns in tiles:
            corners = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))[:, None] * side
            views = [(0.0, patches[None]), (1.0, corners + patches)]
            parts.append(torch.cat([nn.functional.pad(view, (1, 0), value=is_tile) for is_tile, view in views]))
        items = []
        packed = self._pack(parts, torch.full((3,), -1.0, dtype=torch.double), image_sizes, **visual)
        for run, (_, columns) in zip(packed, tiles):
            nearest = run.round().long()  # an interpolated token goes by the nearest patch
            is_tile, row, column = nearest.unbind(-1)
            is_newline = is_tile < 0
            view = torch.where(is_tile > 0, 1 + row // side * columns + column // side, 0)
            grid = torch.stack([view, row % side, column % side], dim=-1).masked_fill(is_newline[:, None], -1)
            is_interpolated = not torch.equal(run, nearest.double())  # tokens between patches, maybe of two views
            items.append(self._make_item("image", grid, view * 0 if is_interpolated else view, is_newline))
        return items

    def _pack(self, parts, newline: torch.Tensor, image_sizes=None, vision_aspect_ratio=None, **_: Any):
        """What the stock class makes of the views of each image: `(views, area, size)` to `(placeholders, size)`."""
        ratio = vision_aspect_ratio or self.config.vision_aspect_ratio
        return self.pack_image_features(parts, list_sizes(image_sizes), newline, vision_aspect_ratio=ratio)[0]

    def _tiles(self, image_sizes=None, batch_num_images=None) -> list[tuple[int, int]]:
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


class FSRLlavaVideoForConditionalGeneration(
    RemoteCodeMixin, FSRGenerationMixin, LlavaOnevisionForConditionalGeneration
):
    """
    [`LlavaOnevisionForConditionalGeneration`] on an [`FSRLlavaVideoModel`]: `generate()` and `forward()` prune the
    visual tokens of each video and image.

    Args:
        config (`FSRLlavaVideoConfig`):
            As for [`FSRLlavaVideoModel`].

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

    config_class = FSRLlavaVideoConfig
    config: FSRLlavaVideoConfig
    inner_class = FSRLlavaVideoModel


def _resolve_layer(config: Any, layer: Any = None, strategy: str | None = None) -> int:
    """
    The block, counted from 1, whose output becomes the features.

    Raises:
        `ValueError`: for a tower or a choice of features whose tokens are not the patches that a block's attention is
            received by.
    """
    tower, strategy = config.vision_config.model_type, strategy or config.vision_feature_select_strategy
    if tower != "siglip_vision_model":
        raise ValueError(
            f'`vision_config.model_type="{tower}"` is not supported: FSR reads saliency from the attention that '
            'patches receive in a SigLIP tower ("siglip_vision_model") in this family.'
        )
    if strategy != "full":
        raise ValueError(
            f'`vision_feature_select_strategy="{strategy}"` is not supported: it would drop a patch, since the tower '
            'has no [CLS]. Use "full".'
        )
    return resolve_feature_layer(config, layer)


class _OriginalName(WeightRenaming):
    """A name of an original checkpoint, which is read and never written: a saved model has the stock names."""

    __slots__ = ()

    def reverse_transform(self) -> "WeightRenaming":
        return WeightRenaming(r"(?!)", "")


_ORIGINAL_NAMES = (
    _OriginalName(r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    _OriginalName(r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    _OriginalName(r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    _OriginalName(r"^model\.(embed_tokens|layers|norm)\.", r"language_model.model.\1."),
)
register_stock_keys(FSRLlavaVideoForConditionalGeneration, "llava_next", _ORIGINAL_NAMES)
register_stock_keys(FSRLlavaVideoModel, "LlavaOnevisionModel", _ORIGINAL_NAMES)
