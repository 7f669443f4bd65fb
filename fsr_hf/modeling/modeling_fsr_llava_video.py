"""LLaVA-Video with FSR."""

import math
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils.generic import can_return_tuple

from ..configuration.configuration_fsr_llava_video import FSRLlavaVideoConfig
from ..configuration.remote_code import RemoteCodeMixin
from .anyres import count_views, image_items, list_sizes, make_item, tiles_of
from .checkpoint_keys import register_stock_keys
from .compression import FSRModelMixin
from .generation import FSRGenerationMixin
from .prompt import VisualItem
from .saliency import patch_attention, resolve_tower_layer


__all__ = ["FSRLlavaVideoForConditionalGeneration", "FSRLlavaVideoModel"]

_resolve_layer = partial(resolve_tower_layer, "siglip_vision_model")
_IMAGE_INPUTS = ("image_sizes", "batch_num_images", "vision_aspect_ratio")


class FSRLlavaVideoModel(FSRModelMixin, LlavaOnevisionModel):
    """
    LLaVA-Video that keeps the share `fsr_config.retention_ratio` of the visual tokens of each video, or image
    (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)): those whose patches receive most
    attention in a SigLIP tower, and some that cover the rest.

    It is [`LlavaOnevisionModel`] but for its videos: the patches of each frame are pooled
    (`config.spatial_pool_mode`), and every row of every frame ends with a newline, which makes 14 x 15 tokens a frame
    in LLaVA-Video-7B. The stock class ends a whole video with one newline. By default a whole video is one pool, so
    that Scan leaves out what repeats from frame to frame (`fsr_config.pool="view"`: a pool for every frame). Newlines
    are dropped. A video within its budget stays as it is, newlines included.
    """

    config_class = FSRLlavaVideoConfig
    visual_inputs = (
        *("pixel_values", *_IMAGE_INPUTS, "pixel_values_videos", "video_num_frames", "image_sizes_videos"),
        *("vision_feature_layer", "vision_feature_select_strategy"),
    )
    pixel_inputs = ("pixel_values", "pixel_values_videos")

    def __init__(self, config: FSRLlavaVideoConfig):
        _resolve_layer(config)
        super().__init__(config)

    def build_items(self, pixel_values=None, pixel_values_videos=None, **visual: Any) -> list[VisualItem]:
        _resolve_layer(self.config, visual.get("vision_feature_layer"), visual.get("vision_feature_select_strategy"))
        items = []
        if pixel_values is not None:
            items = image_items(pixel_values, self._tiles(**visual), partial(self._pack, **visual), self.config)
        if pixel_values_videos is not None:
            rows, columns = torch.arange(self._pooled_side), torch.tensor([*range(self._pooled_side), -1])
            for frames in self._num_frames(pixel_values_videos, visual.get("video_num_frames")):
                grid = torch.cartesian_prod(torch.arange(frames), rows, columns)
                items.append(make_item("video", grid, grid[:, 0], self.config))
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

    def encode(self, modality: str, **visual: Any):
        return self._encode_images(**visual) if modality == "image" else self._encode_videos(**visual)

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
        As the stock method, in LLaVA-Video's layout: of each of the `(videos, frames, channels, height, width)`, the
        first `video_num_frames` are frames of the video, the others padding. `pooler_output` holds what fills the
        placeholders of the videos, one after the other, newlines included: `(sum of frames * rows * (columns + 1), 1,
        hidden_size)`.
        """
        layer = _resolve_layer(self.config, vision_feature_layer, vision_feature_select_strategy)
        numbers = self._num_frames(pixel_values_videos, video_num_frames)
        frames = torch.cat([video[:number] for video, number in zip(pixel_values_videos, numbers)])
        # Index lists of older versions count outputs of blocks, those of newer ones the input of the first block, too.
        states = [layer - 2, layer - 1, layer] if layer > 1 else True
        outputs = self.vision_tower(frames, **{**kwargs, "output_hidden_states": states}, return_dict=True)
        features = self._pool(self.multi_modal_projector(self._hidden_state(outputs, layer)))
        newlines = self.image_newline.to(features).expand(*features.shape[:2], 1, -1)
        outputs.pooler_output = torch.cat([features, newlines], dim=2).flatten(0, 2)[:, None]
        return outputs

    def _encode_videos(self, pixel_values_videos, video_num_frames=None, vision_feature_layer=None, **visual):
        layer = _resolve_layer(self.config, vision_feature_layer)
        outputs = self.get_video_features(pixel_values_videos, layer, video_num_frames=video_num_frames)
        saliency = self._pool(self._saliency(outputs, layer)[..., None])
        saliency = nn.functional.pad(saliency, (0, 0, 0, 1)).flatten()  # [placeholders of all videos]
        area = self._pooled_side * (self._pooled_side + 1)
        lengths = [frames * area for frames in self._num_frames(pixel_values_videos, video_num_frames)]
        return outputs, outputs.pooler_output[:, 0].split(lengths), saliency.split(lengths)

    def _encode_images(self, pixel_values, vision_feature_layer=None, image_numbers=None, **visual):
        layer = _resolve_layer(self.config, vision_feature_layer)
        outputs = self.get_image_features(
            pixel_values,
            **{name: visual.get(name) for name in _IMAGE_INPUTS},
            vision_feature_layer=layer,
            output_hidden_states=[layer - 1, layer],
            return_dict=True,
        )
        saliency = self._saliency(outputs, layer)[..., None]  # [views, area, 1]
        packed = self._pack(saliency.split(count_views(self._tiles(**visual))), saliency.new_zeros(1), **visual)
        numbers = range(len(packed)) if image_numbers is None else image_numbers
        return outputs, [outputs.pooler_output[n] for n in numbers], [packed[n][:, 0] for n in numbers]

    def _hidden_state(self, outputs: Any, number: int) -> torch.Tensor:
        """The input of block `number`, or of what follows the last; that of the first may be missing in `outputs`."""
        missing = self.config.vision_config.num_hidden_layers + 1 - len(outputs.hidden_states)
        return outputs.hidden_states[number - missing]

    def _saliency(self, outputs: Any, layer: int) -> torch.Tensor:
        """Of each patch of a view, in the block whose output is `layer`: `(views, area)`."""
        return patch_attention(self.vision_tower.encoder.layers[layer - 1], self._hidden_state(outputs, layer - 1))

    def _pool(self, patches: torch.Tensor) -> torch.Tensor:
        """Pool the patches of each frame over space: `(frames, area, size)` to `(frames, rows, columns, size)`."""
        grid = patches.unflatten(1, (self._side, self._side)).permute(0, 3, 1, 2).contiguous()
        if self.config.spatial_pool_mode == "average":
            grid = nn.functional.avg_pool2d(grid, 2)
        else:
            grid = nn.functional.interpolate(grid, size=[self._pooled_side] * 2, mode="bilinear")
        return grid.permute(0, 2, 3, 1)

    @property
    def _side(self) -> int:
        """Patches on a side of a view or a frame."""
        return self.config.vision_config.image_size // self.config.vision_config.patch_size

    @property
    def _pooled_side(self) -> int:
        """Tokens on a side of a frame."""
        return self._side // 2 if self.config.spatial_pool_mode == "average" else math.ceil(self._side / 2)

    def _num_frames(self, pixel_values_videos: torch.Tensor, video_num_frames: torch.Tensor | None) -> list[int]:
        """Frames of each video."""
        shape, side = tuple(pixel_values_videos.shape), self.config.vision_config.image_size
        if len(shape) != 5 or shape[-2:] != (side, side):
            raise ValueError(
                f"`pixel_values_videos` must have the shape (videos, frames, channels, {side}, {side}), not {shape}."
            )
        numbers = [shape[1]] * shape[0] if video_num_frames is None else torch.as_tensor(video_num_frames).tolist()
        if len(numbers) != shape[0] or not all(1 <= number <= shape[1] for number in numbers):
            raise ValueError(
                f"`video_num_frames` is {numbers}, and `pixel_values_videos` of shape {shape} holds {shape[0]} videos "
                f"of up to {shape[1]} frames: each needs a number, and at least 1 frame."
            )
        return numbers

    def _pack(self, parts, newline: torch.Tensor, image_sizes=None, vision_aspect_ratio=None, **_: Any):
        """What the stock class makes of the views of each image: `(views, area, size)` to `(placeholders, size)`."""
        ratio = vision_aspect_ratio or self.config.vision_aspect_ratio
        return self.pack_image_features(parts, list_sizes(image_sizes), newline, vision_aspect_ratio=ratio)[0]

    def _tiles(self, image_sizes=None, batch_num_images=None, **_: Any) -> list[tuple[int, int]]:
        """Rows and columns of the tiles of each image; none where a row of the prompt has more than one image."""
        tiles = tiles_of(image_sizes, self.config)
        numbers = [1] * len(tiles) if batch_num_images is None else torch.as_tensor(batch_num_images).tolist()
        if sum(numbers) != len(tiles):
            raise ValueError(
                f"`batch_num_images` {numbers} adds up to {sum(numbers)} images, but `image_sizes` has {len(tiles)}."
            )
        is_alone = [number == 1 for number in numbers for _ in range(number)]
        return [shape if alone else (0, 0) for shape, alone in zip(tiles, is_alone)]


class FSRLlavaVideoForConditionalGeneration(
    RemoteCodeMixin, FSRGenerationMixin, LlavaOnevisionForConditionalGeneration
):
    """
    [`LlavaOnevisionForConditionalGeneration`] on an [`FSRLlavaVideoModel`]: `generate()` and `forward()` prune the
    visual tokens of each video and image.

    ```python
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
    inner_class = FSRLlavaVideoModel


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
