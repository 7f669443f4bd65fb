"""A model of vLLM whose visual tokens come from FSR: the language model is vLLM's, all before it is transformers'."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix

from .checkpoint_names import make_rename
from .positions import PlacedItem, pack_positions, prompt_positions, write_kept_positions
from .tower import VisualEncoder, build_inner, item_positions
from .vllm_processing import PLAN


__all__ = ["FSRServedModel"]

_CACHE_OPTION = "fsr_tower_cache_mib"
_CACHE_MIB = 512


class FSRServedModel(nn.Module, SupportsMultiModal, SupportsPP, SupportsMRoPE):
    """
    The towers run whole in every rank: what they choose needs no exchange, and is the same everywhere. vLLM's own
    layers make up the language model.
    """

    supports_multimodal_pruning: ClassVar[bool] = True
    supported_video_pruning_methods: ClassVar[tuple[str, ...]] = ("evs",)
    # Of a prompt, for each modality: what a chat template writes for an image or a video.
    placeholder_text: ClassVar[dict[str, str]] = {"image": "<image>"}
    # Of vLLM.
    _mark_tower_model: Any
    _mark_language_model: Any
    configure_mm_token_handling: Any
    # The class of the language model, where the type of its config names no class of transformers.
    text_architecture: ClassVar[str | None] = None

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality not in cls.placeholder_text:
            raise ValueError(f"This model takes {', '.join(cls.placeholder_text)}, no {modality}.")
        return cls.placeholder_text[modality]

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        nn.Module.__init__(self)
        model_config = vllm_config.model_config
        config = self.config = model_config.hf_config
        text = config.get_text_config()
        # vLLM takes the tower away again where a server takes text alone: nothing here asks it.
        with self._mark_tower_model(vllm_config, set(self.placeholder_text)):
            self.tower = build_inner(config)
        self.placeholder_ids = [getattr(config, f"{modality}_token_id") for modality in self.placeholder_text]
        self.configure_mm_token_handling(vocab_size=text.vocab_size, mm_token_ids=self.placeholder_ids)
        self.has_positions = config.fsr_config.positions == "original"
        self.num_axes = 3 if "mrope_section" in (text.rope_parameters or {}) else 1
        if self.has_positions and self.num_axes == 1:
            # Prompts count what was dropped, so answers reach further than vLLM's limit of tokens. The rotary
            # embedding is a table: make it long enough.
            text = type(text).from_dict(text.to_dict())
            text.max_position_embeddings += model_config.max_model_len
        with self._mark_language_model(vllm_config):
            self.language_model = self.make_language_model(vllm_config, text, maybe_prefix(prefix, "language_model"))
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.encoder = VisualEncoder(
            self.tower,
            max_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            cache_bytes=_cache_bytes(vllm_config.additional_config),
            take_items=self.take_items,
        )

    # ------------------------------------------------------------------ what a family says

    def make_language_model(self, vllm_config: Any, text: Any, prefix: str) -> Any:
        """vLLM's language model of the config `text`."""
        architecture = self.text_architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text.model_type]
        return init_vllm_registered_model(
            vllm_config=vllm_config, hf_config=text, architectures=[architecture], prefix=prefix
        )

    def join_visual(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the inner model takes, out of the inputs of some items of one modality."""
        return {name: inputs[name] for name in self.tower.visual_inputs if inputs.get(name) is not None}

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        """The visual inputs of some items alone."""
        return self.tower.take_items(numbers, **visual)

    # ------------------------------------------------------------------ visual tokens

    @torch.no_grad()
    def embed_multimodal(self, **inputs: Any) -> Sequence[torch.Tensor]:
        plans = {
            modality: inputs[name]
            for modality in self.tower.placeholder_ids
            if inputs.get(name := PLAN.format(modality=modality)) is not None
        }
        embeds: list[torch.Tensor] = []
        for modality, plan in plans.items():  # vLLM hands over one modality at a time
            plan = _stack(plan)
            query = None
            if inputs.get("query_input_ids") is not None:
                ids, mask = (_pad(inputs[name]) for name in ("query_input_ids", "query_attention_mask"))
                fsr = self.tower.config.fsr_config
                query = self.tower.text_encoder.encode_query(ids, mask, less_empty=fsr.reads_values)
            visual = self.join_visual(inputs)
            keys = [row.numpy().tobytes() for row in plan[:, 3:]]
            kept = self.encoder(visual, plan[:, 0].tolist(), keys, query)
            for number, (item, part) in enumerate(zip(self.tower.build_items(**visual), kept)):
                features = part.features
                if self.has_positions:
                    numbers: dict[str, list[int]] = {name: [] for name in self.tower.placeholder_ids}
                    numbers[modality] = [number]
                    places, _ = item_positions(self.tower, item, self.take_items(numbers, **visual))
                    features = pack_positions(features, places.to(features.device)[:, part.indices])
                embeds.append(features)
        return embeds

    # ------------------------------------------------------------------ positions

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        items = []
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            num_kept, span, *_ = feature.data[PLAN.format(modality=feature.modality)].data.tolist()
            items.append(PlacedItem(feature.mm_position.offset, num_kept, span))
        return prompt_positions(len(input_tokens), items, self.num_axes)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        is_visual = torch.isin(ids, torch.tensor(self.placeholder_ids, device=ids.device))
        return write_kept_positions(
            mrope_positions, is_visual, multimodal_embeddings, num_computed_tokens, self.num_axes
        )

    # ------------------------------------------------------------------ language model

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if self.num_axes == 1 and positions.ndim == 2:
            positions = positions[0]
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    # ------------------------------------------------------------------ weights

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        rename = make_rename(self.tower.state_dict().keys())
        named = ((rename(name), weight) for name, weight in weights)
        return AutoWeightsLoader(self).load_weights((name, weight) for name, weight in named if name is not None)


def _cache_bytes(additional_config: Any) -> int:
    mib = additional_config.get(_CACHE_OPTION, _CACHE_MIB) if isinstance(additional_config, dict) else _CACHE_MIB
    if isinstance(mib, bool) or not isinstance(mib, (int, float)) or mib < 0:
        raise ValueError(
            f"`{_CACHE_OPTION}={mib!r}` of `--additional-config` is not allowed: it must be a number >= 0."
        )
    return int(mib * 2**20)


def _stack(rows: Any) -> torch.Tensor:
    rows = torch.stack(list(rows)) if isinstance(rows, (list, tuple)) else rows
    return rows.reshape(-1, rows.shape[-1]).cpu()


def _pad(rows: Any) -> torch.Tensor:
    """Questions of one or of several lengths: a chunk whose mask is 0 counts as no chunk."""
    if isinstance(rows, torch.Tensor):
        return rows.reshape(-1, rows.shape[-1])
    return nn.utils.rnn.pad_sequence([row.flatten() for row in rows], batch_first=True)
