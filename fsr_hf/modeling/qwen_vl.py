"""What the families of Qwen-VL share: images and videos as grids of patches, attention received, positions."""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids

from .compression import FSRModelMixin
from .guards import cache_length, get_cache
from .offload import sharded_params_gathered
from .prompt import VisualItem
from .saliency import attention_received


__all__ = ["QwenVLMixin"]

# For each modality, the names of its pixels and of its grids.
_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class QwenVLMixin(FSRModelMixin):
    """
    Saliency is the attention received in the last block of the vision tower: there is no [CLS], and no text encoder
    for relevance to the question. Kept tokens and text keep the positions (time, height, width) of the full prompt.
    """

    # Token types are found from the ids: those of the whole prompt do not fit the compressed one.
    visual_inputs: ClassVar[tuple[str, ...]] = (*_INPUTS["image"], *_INPUTS["video"], "mm_token_type_ids")
    pixel_inputs = tuple(pixels for pixels, _ in _INPUTS.values())
    has_position_axes = True
    # What `get_rope_index` takes beside ids, mask and token types.
    rope_deltas: Any
    visual: Any
    rope_inputs: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw")

    def __getstate__(self) -> dict[str, Any]:
        # For hidden states of the tower, transformers puts hooks on its blocks that cannot be pickled. It puts them
        # there again when the next call asks for hidden states.
        if self.visual.__dict__.pop("_output_capturing_hooks_installed", False):
            for module in self.visual.modules():
                for number, hook in list(module._forward_hooks.items()):
                    if getattr(hook, "__module__", None) == "transformers.utils.output_capturing":
                        del module._forward_hooks[number]
        return dict(self.__dict__)

    def build_items(self, **visual: Any) -> list[VisualItem]:
        merge, by_view = self.config.vision_config.spatial_merge_size, self.config.fsr_config.pool == "view"
        items = []
        for modality in _INPUTS:
            for t, h, w in self.check_grids(modality, visual):
                grid = torch.cartesian_prod(*map(torch.arange, (t, h // merge, w // merge)))
                placeholders = torch.arange(len(grid))
                pools = list(placeholders.split(len(grid) // t)) if by_view else [placeholders]
                items.append(VisualItem(modality, grid, pools, self.run_lengths(modality, grid)))
        return items

    def run_lengths(self, modality: str, grid: torch.Tensor) -> list[int]:
        """Placeholders of each run of an image or a video."""
        return [len(grid)]

    def place_items(self, input_ids: torch.Tensor, items: list[VisualItem]) -> list[VisualItem]:
        items = super().place_items(input_ids, items)
        runs = sorted(
            (item.row, int(run[0]), int(run[-1]), item.modality)
            for item in items
            for run in item.columns.split(item.run_lengths)
        )
        for (row, _, end, modality), (next_row, start, _, next_modality) in pairwise(runs):
            if (row, end + 1, modality) == (next_row, start, next_modality):
                raise ValueError(
                    f"{modality.capitalize()} tokens do not match the {modality}s: in row {row}, two stand side by "
                    f"side at column {start}. Positions need a token between them (and between the frames of a video "
                    f"of several runs), such as `vision_end_token_id` ({self.config.vision_end_token_id})."
                )
        return items

    def check_grids(self, modality: str, visual: dict[str, Any]) -> list[list[int]]:
        """Time, height and width in patches of every image or video; none if there are no pixels."""
        pixels_name, grid_name = _INPUTS[modality]
        pixels, grid = visual.get(pixels_name), visual.get(grid_name)
        if pixels is None:
            if grid is not None and len(grid):
                raise ValueError(f"`{grid_name}` has {len(grid)} rows, but there are no `{pixels_name}`.")
            return []
        if not isinstance(grid, torch.Tensor) or grid.ndim != 2 or grid.shape[1] != 3:
            found = f"of shape {tuple(grid.shape)}" if isinstance(grid, torch.Tensor) else grid
            raise ValueError(
                f"`{pixels_name}` need `{grid_name}`, time, height and width in patches of each {modality} in a "
                f"tensor of shape ({modality}s, 3), but it is {found}. Pass all that the processor returns."
            )
        grids, merge = grid.tolist(), self.config.vision_config.spatial_merge_size
        for number, (t, h, w) in enumerate(grids):
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise ValueError(
                    f"`{grid_name}` has {[t, h, w]} for {modality} {number}: each number must be at least 1, height "
                    f"and width multiples of {merge}. An empty video has no tokens."
                )
        patches, expected = pixels.shape[:-1].numel(), sum(t * h * w for t, h, w in grids)
        if patches != expected:
            raise ValueError(
                f"`{pixels_name}` of shape {tuple(pixels.shape)} hold {patches} patches, but the {len(grids)} rows of "
                f"`{grid_name}` {grids} need {expected}. Pass all that the processor returns."
            )
        return grids

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        taken: dict[str, Any] = {}
        for modality, (pixels, grids) in _INPUTS.items():
            if numbers[modality]:
                parts = visual[pixels].split(visual[grids].prod(-1).tolist())
                taken[pixels] = torch.cat([parts[number] for number in numbers[modality]])
                taken[grids] = visual[grids][numbers[modality]]
        return taken

    def encode(self, modality: str, **visual: Any):
        get_features = self.get_image_features if modality == "image" else self.get_video_features
        pixels, grid = (visual[name] for name in _INPUTS[modality])
        grid, last = grid.to(pixels.device), self.config.vision_config.depth - 1
        # Hidden state k is the input of block k: the one before the last is the input of the last block.
        outputs: Any = get_features(pixels, grid, output_hidden_states=[last - 1, last], return_dict=True)
        runs = outputs.pooler_output
        saliency = self.saliency(outputs.hidden_states[-2], grid).to(runs[0].device)
        return outputs, runs, saliency.split([len(run) for run in runs])

    @torch.no_grad()
    def saliency(self, hidden_states: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """
        Attention received by each token in the last block (Eq. 1): the mean over heads, over the queries of the same
        image or slice of a video, and over the patches of the token. Takes the input of the block, `(patches,
        vision_hidden_size)`, where the patches of a token stand together, and time, height and width of each item in
        patches, `(items, 3)`. Returns `(tokens,)`, float32, in the order of the merger's output.
        """
        tower: Any = self.visual
        block, unit = tower.blocks[-1], tower.spatial_merge_size**2
        attention = block.attn
        order = self.block_order(grid)
        cos, sin = tower.rotary_pos_emb(hidden_states, get_vision_position_ids(grid, tower.spatial_merge_size))
        if order is not None:
            cos, sin = (part.unflatten(0, (-1, unit))[order.to(part.device)].flatten(0, 1) for part in (cos, sin))
        with sharded_params_gathered(block, attention):
            query, key = attention.qkv(block.norm1(hidden_states)).chunk(3, dim=-1)[:2]
        query, key = (states.unflatten(-1, (attention.num_heads, attention.head_dim)) for states in (query, key))
        query, key = apply_rotary_pos_emb_vision(query, key, cos.to(query.device), sin.to(query.device))
        slices = [h * w for t, h, w in grid.tolist() for _ in range(t)]  # an image, or a temporal slice of a video
        received = attention_received(query, key, slices, attention.scaling).unflatten(0, (-1, unit)).mean(-1)
        if order is None:
            return received
        return torch.empty_like(received).index_copy(0, order.to(received.device), received)

    def block_order(self, grid: torch.Tensor) -> torch.Tensor | None:
        """Which token of the merger's output each of the blocks' is, `(tokens,)`, if they reorder within slices."""
        return None

    def _forward_stock(self, **inputs):
        # The stock class keeps the offset from entries of the cache to positions on the model, where an earlier call,
        # whatever its prompt was, has left its own. It belongs to the cache.
        cache = get_cache(inputs)
        is_start = cache_length(cache) == 0
        if inputs.get("position_ids") is None:
            self.rope_deltas = None if is_start else getattr(cache, "rope_deltas", self.rope_deltas)
        outputs = super()._forward_stock(**inputs)
        if is_start and (cache := get_cache(outputs)) is not None:
            cache.rope_deltas = self.rope_deltas
        return outputs

    def full_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **visual: Any) -> torch.Tensor:
        """Time, height and width of the whole prompt: `(3, batch, length)`. Computed on the host, item by item."""
        ids, mask = input_ids.cpu(), attention_mask.cpu()
        types = (ids == self.config.image_token_id).long() + 2 * (ids == self.config.video_token_id).long()
        inputs = {name: visual.get(name) for name in self.rope_inputs}
        positions, _ = self.get_rope_index(ids, mm_token_type_ids=types, attention_mask=mask, **inputs)
        return positions.to(input_ids.device, non_blocking=True)
