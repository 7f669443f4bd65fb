"""Qwen2.5-VL with FSR."""

from itertools import pairwise
from typing import Any

import torch
from transformers import GenerationMixin, Qwen2_5_VLForConditionalGeneration
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from ..configuration.configuration_fsr_qwen2_5_vl import FSRQwen2_5_VLConfig
from ..configuration.remote_code import RemoteCodeMixin
from .generation import FSRGenerationMixin
from .pools import VisualPools, pool_views
from .prompt import VisualItem, find_visual_items
from .saliency import attention_received


__all__ = ["FSRQwen2_5_VLForConditionalGeneration"]

# For each modality, the names of its pixels and of its grids.
_INPUTS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class FSRQwen2_5_VLForConditionalGeneration(RemoteCodeMixin, FSRGenerationMixin, Qwen2_5_VLForConditionalGeneration):
    """
    [`Qwen2_5_VLForConditionalGeneration`] that keeps the visual tokens of each image and video that matter
    (Focus-Scan-Refine, [arXiv 2602.05809](https://arxiv.org/abs/2602.05809)).

    Tokens are ranked by the attention that they receive in the last block of the vision tower: there is no [CLS], and
    no text encoder for relevance to the question. An image or a video is one pool, whatever its resolution
    (`fsr_config.pool="view"`: each temporal slice of a video is a pool of its own, with an equal share of the budget).
    Kept tokens and text keep the positions (time, height, width) of the full prompt
    (`fsr_config.positions="compact"`: one by one, as if all were text). The stock processor is used as it is.

    Args:
        config (`FSRQwen2_5_VLConfig`):
            The last block of its vision tower must be one of full attention.
    """

    config_class = FSRQwen2_5_VLConfig
    config: FSRQwen2_5_VLConfig
    # Token types are found from the ids: those of the whole prompt do not fit the compressed one.
    visual_inputs = (*_INPUTS["image"], *_INPUTS["video"], "second_per_grid_ts", "mm_token_type_ids")
    pixel_inputs = tuple(pixels for pixels, _ in _INPUTS.values())
    supports_guidance = False

    def __init__(self, config: FSRQwen2_5_VLConfig):
        vision = config.vision_config
        if vision.depth < 2 or vision.depth - 1 not in vision.fullatt_block_indexes:
            raise ValueError(
                f"`vision_config.depth={vision.depth}` and `vision_config.fullatt_block_indexes="
                f"{list(vision.fullatt_block_indexes)}` are not supported: FSR reads saliency from the attention of "
                f"the last block (index {vision.depth - 1}), which must be one of full attention and have another "
                "block before it."
            )
        super().__init__(config)

    # ------------------------------------------------------------------ images and videos of a prompt

    def placeholder_ids(self) -> list[int]:
        return [self._placeholder_id(modality) for modality in _INPUTS]

    def _placeholder_id(self, modality: str) -> int:
        return self.config.image_token_id if modality == "image" else self.config.video_token_id

    def find_items(self, input_ids: torch.Tensor, **visual) -> list[VisualItem]:
        area = self.config.vision_config.spatial_merge_size**2
        items = []
        for modality in _INPUTS:
            lengths = [t * h * w // area for t, h, w in self._check_grids(modality, visual)]
            items += find_visual_items(input_ids, self._placeholder_id(modality), lengths, modality)
        items.sort(key=lambda item: (item.row, item.start))  # images and videos as the prompt has them
        for item, following in pairwise(items):
            is_same_run = (item.row, item.start + item.length) == (following.row, following.start)
            if is_same_run and item.modality == following.modality:
                raise ValueError(
                    f"{item.modality.capitalize()} tokens do not match the {item.modality}s: in row {item.row}, two "
                    f"stand side by side at column {following.start}. Positions need a token between them, such as "
                    f"`vision_end_token_id` ({self.config.vision_end_token_id})."
                )
        return items

    def _check_grids(self, modality: str, visual: dict[str, Any]) -> list[list[int]]:
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
        grids = grid.tolist()
        merge = self.config.vision_config.spatial_merge_size
        for number, (t, h, w) in enumerate(grids):
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise ValueError(
                    f"`{grid_name}` has {[t, h, w]} for {modality} {number}: each number must be at least 1, and "
                    f"height and width multiples of {merge}. "
                    + ("An empty video has no tokens." if t < 1 else "Build it with the model's processor.")
                )
        patches, expected = pixels.shape[:-1].numel(), sum(t * h * w for t, h, w in grids)
        if patches != expected:
            raise ValueError(
                f"`{pixels_name}` of shape {tuple(pixels.shape)} hold {patches} patches, but the {len(grids)} rows of "
                f"`{grid_name}` {grids} need {expected}. Pass all that the processor returns."
            )
        seconds = visual.get("second_per_grid_ts")
        if modality == "video" and seconds is not None and len(seconds) != len(grids):
            raise ValueError(
                f"`second_per_grid_ts` has {len(seconds)} numbers for {len(grids)} videos: it must have one for each."
            )
        return grids

    # ------------------------------------------------------------------ tokens and scores

    def encode_visuals(self, items: list[VisualItem], query: None, **visual) -> VisualPools:
        fsr: Any = self.config.fsr_config
        merge = self.config.vision_config.spatial_merge_size
        encoded: dict[str, Any] = {}
        for modality, names in _INPUTS.items():
            if any(item.modality == modality for item in items):
                encoded[modality] = self._encode(modality, *(visual[name] for name in names))

        runs, saliency, shapes = zip(*(next(encoded[item.modality]) for item in items))
        grid = [torch.cartesian_prod(*map(torch.arange, (t, h // merge, w // merge))) for t, h, w in shapes]
        views = [places[:, 0] if fsr.pool == "view" else torch.zeros_like(places[:, 0]) for places in grid]
        return pool_views(list(runs), views, torch.cat(saliency), None, grid)

    def _encode(self, modality: str, pixels: torch.Tensor, grid: torch.Tensor):
        """For each image (or video): its tokens `(tokens, hidden_size)`, their saliency `(tokens,)`, and its grid."""
        get_features = self.get_image_features if modality == "image" else self.get_video_features
        last = self.config.vision_config.depth - 1
        # Hidden state k is the input of block k or, in 5.17, its output: of both, the one before the last is the input
        # of the last block.
        outputs: Any = get_features(pixels, grid, output_hidden_states=[last - 1, last], return_dict=True)
        runs = outputs.pooler_output
        saliency = self._saliency(outputs.hidden_states[-2], grid).to(runs[0].device)
        return zip(runs, saliency.split([len(run) for run in runs]), grid.tolist())

    @torch.no_grad()
    def _saliency(self, hidden_states: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """
        Attention received by each token in the last block (Eq. 1).

        Args:
            hidden_states (`torch.FloatTensor` of shape `(patches, vision_hidden_size)`):
                The input of the block, in window order: the patches of a token stand together, tokens by windows.
            grid (`torch.LongTensor` of shape `(items, 3)`):
                Time, height and width of each image (or video) in patches.

        Returns:
            `torch.FloatTensor` of shape `(tokens,)`, float32, in the order of the merger's output.
        """
        tower: Any = self.model.visual
        merge, block = tower.spatial_merge_size, tower.blocks[-1]
        attention = block.attn
        window_index, _ = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        window_index = window_index.to(hidden_states.device)
        positions = tower.rotary_pos_emb(hidden_states, get_vision_position_ids(grid, merge))  # cos and sin
        cos, sin = (
            tower.permute_input_for_window_attn(part.to(hidden_states.device), window_index, seq_len=len(part))
            for part in positions
        )
        query, key = attention.qkv(block.norm1(hidden_states)).chunk(3, dim=-1)[:2]
        query, key = (states.unflatten(-1, (attention.num_heads, -1)) for states in (query, key))
        query, key = apply_rotary_pos_emb_vision(query, key, cos.to(query.device), sin.to(query.device))
        # Windows do not cross slices, so slices are segments in window order, too.
        slices = [h * w for t, h, w in grid.tolist() for _ in range(t)]
        received = attention_received(query, key, slices, attention.scaling)
        received = received.unflatten(0, (-1, merge**2)).mean(-1)  # [tokens]
        return torch.empty_like(received).index_copy(0, window_index.to(received.device), received)

    def _check_query(self, query, fsr, batch_size: int) -> None:
        if fsr.uses_relevance:
            raise ValueError(
                f"`fsr_config.relevance={fsr.relevance!r}` is not supported: no text encoder shares a space with the "
                'vision tower of Qwen2.5-VL. Set it to "none": FSR ranks tokens by saliency alone here.'
            )

    # ------------------------------------------------------------------ positions

    def full_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **visual) -> torch.Tensor:
        """Time, height and width of the whole prompt: `(3, batch, length)`. Computed on the host, item by item."""
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        ids, mask, *rest = (
            value.cpu() if isinstance(value, torch.Tensor) else value
            for value in (input_ids, attention_mask, *(visual.get(name) for name in names))
        )
        types = (ids == self.config.image_token_id).long() + 2 * (ids == self.config.video_token_id).long()
        inputs = {"mm_token_type_ids": types, "attention_mask": mask, **dict(zip(names, rest))}
        positions, _ = self.model.get_rope_index(ids, **inputs)
        return positions.to(input_ids.device, non_blocking=True)

    def _get_candidate_generator(self, model_kwargs: dict[str, Any], assistant_model=None, **kwargs):
        # A text model can draft, too, if it gets the positions of text: the first of the four rows.
        positions = model_kwargs.get("position_ids")
        if assistant_model is not None and positions is not None and positions.ndim == 3:
            stock = GenerationMixin._prepare_position_ids_for_generation
            if type(assistant_model)._prepare_position_ids_for_generation is stock:
                model_kwargs = {**model_kwargs, "position_ids": positions[0]}
        return super()._get_candidate_generator(model_kwargs=model_kwargs, assistant_model=assistant_model, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        video_grid_thw: torch.LongTensor | None = None,
        mm_token_type_ids: torch.LongTensor | None = None,
        second_per_grid_ts: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        mm_encoder_outputs: dict | None = None,  # `generate` of the stock class encodes images ahead
        **kwargs,
    ):
        r"""
        As [`Qwen2_5_VLForConditionalGeneration.forward`]. With pixels the prompt is compressed first: the loss is that
        of the compressed sequence, where labels on placeholders never count; `logits` stand at the caller's positions,
        zeros at dropped ones, and `logits_to_keep` means those; `hidden_states`, `attentions` and `past_key_values`
        have the compressed length. `position_ids`, packed sequences and `inputs_embeds` cannot stand beside pixels.

        Args:
            mm_token_type_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*):
                Which ids are placeholders of images (1) and videos (2). Pruned prompts have it from `input_ids`; what
                is not pruned goes to the stock class, which falls back to positions of text without it.
            second_per_grid_ts (`torch.Tensor` of shape `(videos,)`, *optional*):
                Seconds between the temporal slices of each video.
            num_visual_tokens (`int`, *optional*):
                Budget of each image and video for this call.
            retention_ratio (`float`, *optional*):
                The same as a share of its tokens.
            fsr_enabled (`bool`, *optional*):
                Whether to prune in this call.

        Example:

        ```python
        >>> from transformers import AutoModel, AutoProcessor

        >>> model = AutoModel.from_pretrained("org/Qwen2.5-VL-7B-Instruct-fsr", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("org/Qwen2.5-VL-7B-Instruct-fsr")
        >>> content = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": content}],
        ...     add_generation_prompt=True,
        ...     tokenize=True,
        ...     return_dict=True,
        ...     return_tensors="pt",
        ... )
        >>> out = model.generate(**inputs, max_new_tokens=64)
        ```
        """
        # The stock class keeps the offset from entries of the cache to positions on the model, where an earlier call,
        # whatever its prompt was, has left its own. It belongs to the cache.
        is_start = position_ids is None and (past_key_values is None or not past_key_values.get_seq_length())
        if position_ids is None:
            deltas = None if is_start else getattr(past_key_values, "rope_deltas", self.model.rope_deltas)
            self.model.rope_deltas = deltas
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            second_per_grid_ts=second_per_grid_ts,
            logits_to_keep=logits_to_keep,
            num_visual_tokens=num_visual_tokens,
            retention_ratio=retention_ratio,
            fsr_enabled=fsr_enabled,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        cache = getattr(outputs, "past_key_values", past_key_values)
        if is_start and cache is not None:
            cache.rope_deltas = self.model.rope_deltas
        return outputs


# transformers knows the layouts of stock classes alone: without this an old checkpoint leaves every weight random.
register_checkpoint_conversion_mapping(
    "FSRQwen2_5_VLForConditionalGeneration",
    get_checkpoint_conversion_mapping("Qwen2VLForConditionalGeneration"),
    overwrite=True,
)
