"""From pixels to a compressed prompt: what the inner model of every family does before its language model runs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .conversation import Conversation, continue_positions, remember_positions
from .fsr import select_visual_tokens
from .guards import (
    VERSION,
    Draft,
    PlacementCounter,
    active_guard,
    cache_length,
    check_outputs,
    count_placed,
    get_cache,
    is_filled,
    is_unpruned,
    warn_if_untested,
)
from .offload import is_sharded
from .pools import VisualTokens, select_from_items
from .prompt import (
    CompressedPrompt,
    VisualItem,
    carry_states,
    check_no_placeholders,
    compact_positions,
    place_items,
    select_columns,
)
from .relevance import TextEncoderMixin
from .signatures import FSR_ARGUMENTS, adopt_signature, check_arguments


__all__ = ["FSRModelMixin", "KeptVisualOutput", "check_prompt"]

logger = logging.get_logger(__name__)

# What refers to the columns of the whole prompt, or stands in place of them.
REFUSED_WITH_PIXELS = (
    *("inputs_embeds", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "shift_labels"),
    "mm_encoder_outputs",
)


@dataclass
class KeptVisualOutput(BaseModelOutputWithPooling):
    """
    The kept visual tokens of one modality, `pooler_output`, handed to the stock model as features that were computed
    ahead. `last_hidden_state` is the tower's.
    """

    # Told by name: config, model and assistant may come from two copies of this module.
    is_fsr_kept: ClassVar[bool] = True


class FSRModelMixin(TextEncoderMixin):
    """
    Prunes the visual tokens of a prompt before the language model sees it. It stands before a stock inner model, such
    as [`LlavaModel`], and hands it fewer placeholders and fewer features; the stock class does all the rest.

    A family says what its visual inputs are, how a prompt holds them, and where tokens and scores come from:
    `visual_inputs`, [`~FSRModelMixin.build_items`], [`~FSRModelMixin.encode_items`],
    [`~FSRModelMixin.take_items`] and, where it has its own positions, [`~FSRModelMixin.full_position_ids`].
    """

    # Inputs that only the towers (and the search for placeholders) read, and those of them that hold pixels.
    visual_inputs: ClassVar[tuple[str, ...]] = ()
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    # What chooses among the tokens of a pool: takes and returns what `select_visual_tokens` does. Assign another one
    # to compare methods.
    selector: Callable = staticmethod(select_visual_tokens)
    # Whether positions have several axes, the first of which, for masks, has no gaps.
    has_position_axes: ClassVar[bool] = False
    # The CLIP text side, in families that have one.
    text_encoder: Any
    # Makes `query_input_ids` and `query_attention_mask` of a prompt that comes without (see the processor's
    # `bind_query`).
    query_reader: Callable | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.forward is FSRModelMixin.forward:
            intro = (
                "As the stock method. With pixels the prompt is compressed first: `last_hidden_state` stands at the "
                "caller's positions, where a dropped one holds the state of the last kept position before it; "
                "`hidden_states`, `attentions` and the cache have the compressed length."
            )
            adopt_signature(cls, "forward", intro, FSR_ARGUMENTS | dict.fromkeys(cls.visual_inputs, "Any"))

    def __init__(self, config):
        warn_if_untested()
        super().__init__(config)
        self.text_encoder = None

    # ------------------------------------------------------------------ what a family says

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """The id that pixels of each modality fill."""
        modalities = {"pixel_values": "image", "pixel_values_videos": "video"}
        return {modalities[name]: getattr(self.config, f"{modalities[name]}_token_id") for name in self.pixel_inputs}

    def build_items(self, **visual: Any) -> list[VisualItem]:
        """
        The images and videos of a call, from shapes and grids alone, each modality in the order of its pixels; raises
        `ValueError` for inputs that do not fit each other.
        """
        raise NotImplementedError

    def place_items(self, input_ids: torch.Tensor, items: list[VisualItem]) -> list[VisualItem]:
        """The items where the prompt (on the CPU) has them, in its order; see [`place_items`]."""
        return place_items(input_ids, items, self.placeholder_ids)

    def encode_items(
        self, items: list[VisualItem], query: torch.Tensor | None, **visual: Any
    ) -> tuple[VisualTokens, dict[str, Any]]:
        """
        Run the towers.

        Args:
            items (`list[VisualItem]`):
                In the order of the prompt; those of one modality in the order of its pixels.
            query (`torch.FloatTensor` of shape `(batch, projection_dim)`, *optional*):
                From [`CLIPRelevance`], one row for each row of the prompt.

        Returns:
            The tokens of the items in this order, and the stock output of each modality.
        """
        raise NotImplementedError

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        """The visual inputs of some items alone: of each modality, the numbers in the order of its pixels."""
        raise NotImplementedError

    def has_own_layout(self, visual: dict[str, Any]) -> bool:
        """Whether the stock class lays these visual inputs out in another way, so that it must not see the pixels."""
        return False

    def full_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **visual: Any) -> torch.Tensor:
        """
        Positions of the whole prompt: `(batch, length)`, or `(axes, batch, length)` for a model that rotates by
        several.
        """
        return compact_positions(attention_mask)

    # ------------------------------------------------------------------ compression

    def pop_visual(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Take the visual inputs out of `kwargs`; `None` (and nothing taken but empty ones) if there are no pixels."""
        if kwargs.get("pixel_values_videos") is not None and "pixel_values_videos" not in self.visual_inputs:
            raise ValueError(
                f"`pixel_values_videos` is not supported: {type(self).__name__} takes images alone. Pass frames as "
                "images, or use a model for videos (FSRLlavaVideo, FSRQwen2_5_VL)."
            )
        empty = [name for name in self.pixel_inputs if kwargs.get(name) is not None and not len(kwargs[name])]
        for name in empty:
            del kwargs[name]
        if all(kwargs.get(name) is None for name in self.pixel_inputs):
            for name in self.visual_inputs if empty else ():
                kwargs.pop(name, None)
            return None
        visual = {name: kwargs.pop(name) for name in self.visual_inputs if name in kwargs}
        # Only the host reads sizes, grids and numbers: one copy here in place of one for each use.
        return {
            name: value.cpu() if isinstance(value, torch.Tensor) and name not in self.pixel_inputs else value
            for name, value in visual.items()
        }

    def will_prune(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call of `forward()` with these arguments drops a token, from the shapes of the pixels alone."""
        fsr = self._override(kwargs)
        guard = active_guard()
        visual = self.pop_visual(dict(kwargs))
        if visual is None or not fsr.enabled or (is_unpruned(guard) and not self._is_nested(kwargs)):
            return False
        items = self.build_items(**visual)
        return any(fsr.budget(item.num_candidates) < item.num_candidates for item in items)

    def _override(self, kwargs: dict[str, Any]):
        names = ("num_visual_tokens", "retention_ratio", "fsr_enabled")
        return self.config.fsr_config.override(*(kwargs.get(name) for name in names))

    @torch.compiler.disable
    def compress(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.LongTensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        output_visual_selection: bool = False,
        conversation: Conversation | None = None,
        with_slack: bool = False,
        by_row: bool = False,
        **visual: Any,
    ) -> CompressedPrompt | None:
        """
        Prune a prompt. All checks come first, on the host: one copy of ids and mask is the only wait for the device.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), attention_mask (same shape, *optional*):
                The prompt.
            query_input_ids, query_attention_mask, num_visual_tokens, retention_ratio, fsr_enabled:
                As in `forward()`.
            output_visual_selection (`bool`, *optional*, defaults to `False`):
                Whether the result has a [`VisualSelection`] for each image or video.
            conversation ([`Conversation`], *optional*):
                What a cache holds of the prompt: only the rest is encoded.
            with_slack (`bool`, *optional*, defaults to `False`):
                Whether every row begins with a masked column.
            by_row (`bool`, *optional*, defaults to `False`):
                Whether `mm_encoder_outputs` has one tensor for each row with a picture, not for each picture. Below
                5.24, beams give a row with several pictures a wrong order of them.
            visual:
                The visual inputs of the model, such as `pixel_values`.

        Returns:
            [`CompressedPrompt`], with what the cache holds of a conversation before it; `None` if every image and
            video is within its budget, no selections are asked for and no conversation goes on.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        fsr = self.config.fsr_config.override(num_visual_tokens, retention_ratio, fsr_enabled)
        # FlashAttention, too, reads gaps in the positions of a single row as packed sequences; a mask stops it.
        is_flash = "flash" in (self.config.get_text_config()._attn_implementation or "")
        with_slack |= is_flash and fsr.positions == "original" and not self.has_position_axes
        host_ids, host_mask = input_ids.cpu(), attention_mask.cpu()
        starts, past_mask = [0] * len(host_ids), torch.ones(0)
        if conversation is not None:
            starts, past_mask = conversation.match(host_ids, host_mask)
        if visual:
            items = self.place_items(host_ids, self.build_items(**visual))
        else:  # a conversation goes on in words: pixels of what is in the cache are not needed
            items = []
            check_no_placeholders(host_ids, starts, self.placeholder_ids, self.pixel_inputs)
        full_visual = visual
        if conversation is not None and visual:
            items, visual = self._new_items(items, starts, visual)
        budgets = [fsr.budget(item.num_candidates) if fsr.enabled else item.num_candidates for item in items]
        pruned_rows = torch.zeros(len(host_ids), dtype=torch.bool)
        for item, budget in zip(items, budgets):
            pruned_rows[item.row] |= budget < item.num_candidates
        # Gathering shards is a step of all processes, so those with nothing to prune take it, too.
        needs_query = bool(pruned_rows.any()) or output_visual_selection or (bool(items) and is_sharded(self))
        if not needs_query and conversation is None and not self.has_own_layout(visual):
            return None

        question = None
        if needs_query:
            if query_input_ids is None and self.query_reader is not None and self.text_encoder is not None:
                query_input_ids, query_attention_mask = self.query_reader(host_ids, host_mask)
            question = self._check_query(query_input_ids, query_attention_mask, fsr, len(input_ids))
        embeddings = None
        if question is not None and items:
            if not question[1].cpu()[[item.row for item in items]].any(-1).all():
                logger.warning_once("A row has no question: FSR ranks its visual tokens by saliency alone.")
            embeddings = self.text_encoder.encode_query(*(tensor.to(input_ids.device) for tensor in question))

        kept, outputs = None, dict[str, Any]()
        if items:
            tokens, outputs = self.encode_items(items, embeddings, **visual)
            kept = select_from_items(tokens, items, budgets, fsr, self.selector, output_visual_selection)
        columns = select_columns(
            host_mask,
            items,
            kept.counts if kept else [],
            kept.indices.to(input_ids.device) if kept else input_ids.new_empty(0),
            starts,
            with_slack,
        )
        is_slack, source = columns < 0, columns.clamp(min=0)
        slack_ids = self._slack_ids(host_ids, host_mask).to(input_ids.device, non_blocking=True)
        ids = torch.where(is_slack, slack_ids, input_ids.gather(1, source))
        mask = attention_mask.gather(1, source).masked_fill(is_slack, 0)
        positions = self._positions(
            *(input_ids, attention_mask, full_visual, fsr, pruned_rows, columns, mask, conversation, past_mask)
        )
        counts = kept.counts if kept else []
        is_padded = self._is_padded(host_mask, items, counts, starts, columns.shape[1])
        if conversation is not None:
            device = ids.device
            # What no longer counts, such as padding behind an answer, is no word of the row.
            past_ids = torch.where(past_mask.to(device) == 0, slack_ids, conversation.input_ids.to(device))
            ids = torch.cat([past_ids, ids], dim=1)
            mask = torch.cat([past_mask.to(mask), mask], dim=1)
            positions = torch.cat([conversation.position_ids.to(device), positions], dim=-1)
            pruned_rows, is_padded = pruned_rows | conversation.pruned_rows, is_padded or not past_mask.all()
        return CompressedPrompt(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            mm_encoder_outputs=self._kept_outputs(items, kept, outputs, by_row) if kept else {},
            columns=columns,
            num_features=sum(counts),
            is_padded=is_padded,
            pruned_rows=pruned_rows,
            selections=(kept.selections if kept else []) if output_visual_selection else None,
        )

    def _new_items(self, items: list[VisualItem], starts: list[int], visual: dict[str, Any]):
        """The items that are not in the cache, and their share of the visual inputs."""
        new: list[VisualItem] = []
        numbers: dict[str, list[int]] = {modality: [] for modality in self.placeholder_ids}
        counts = dict.fromkeys(numbers, 0)
        for item in items:
            start = starts[item.row]
            if int(item.columns[0]) < start <= int(item.columns[-1]):
                raise ValueError(f"`input_ids` goes on in the middle of the {item.modality} of row {item.row}.")
            if int(item.columns[0]) >= start:
                new.append(item)
                numbers[item.modality].append(counts[item.modality])
            counts[item.modality] += 1
        return new, self.take_items(numbers, **visual) if new else {}

    def _slack_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """An id of each row that is no placeholder, `(batch, 1)`, on the CPU."""
        is_text = ~torch.isin(input_ids, torch.tensor(list(self.placeholder_ids.values()))) & (attention_mask != 0)
        first = is_text.long().argmax(-1, keepdim=True)
        pad = self.config.get_text_config().pad_token_id or 0
        return torch.where(is_text.any(-1, keepdim=True), input_ids.gather(1, first), pad)

    def _is_padded(self, attention_mask, items, counts, starts, width: int) -> bool:
        """Whether the compressed mask has a 0: slack, or a masked column between text."""
        for row, (mask, start) in enumerate(zip(attention_mask, starts)):
            mask = mask.bool().clone()
            mask[:start] = False
            number = 0
            for item, count in zip(items, counts):
                if item.row == row:
                    mask[item.columns] = False
                    number += count
            if int(mask.sum()) + number < width:
                return True
        return False

    def _positions(
        self, input_ids, attention_mask, visual, fsr, pruned_rows, columns, mask, conversation, past_mask
    ) -> torch.Tensor:
        """Positions `(..., batch, compressed_length)`; with several axes, one more before them that counts tokens."""
        text = compact = compact_positions(mask)
        if conversation is not None:
            pruned_rows = pruned_rows | conversation.pruned_rows
            # The largest position that counts: padding behind an answer has positions, too.
            past = conversation.position_ids.to(mask.device).masked_fill(past_mask.to(mask.device) == 0, -1)
            last = past.amax(-1, keepdim=True)
            text = text + 1 + (last[0] if last.ndim == 3 else last)
            compact = compact + 1 + (last[1:].amax(0) if last.ndim == 3 else last)
            if not visual:  # words alone count on
                return text if last.ndim == 2 else torch.cat([text[None], compact.expand(3, -1, -1)])
        full = self.full_position_ids(input_ids, attention_mask, **visual)
        original = full.gather(-1, columns.clamp(min=0).expand(*full.shape[:-1], -1))
        # By row, so that a row has the same positions in any batch: one that lost nothing has the stock model's.
        if fsr.positions == "original":
            chosen = original
        else:
            chosen = torch.where(pruned_rows.to(mask.device)[:, None], compact, original)
        # transformers reads a jump in the first axis as the start of a packed sequence, so it stays consecutive.
        return chosen if full.ndim == 2 else torch.cat([text[None], chosen])

    def _kept_outputs(self, items, kept, outputs, by_row: bool) -> dict[str, Any]:
        """The kept tokens of each modality, as the stock `forward()` takes them."""
        features = kept.features.split(kept.counts)
        result = {}
        for modality, output in outputs.items():
            groups: dict[int, list[torch.Tensor]] = {}
            for number, (part, item) in enumerate(zip(features, items)):
                if item.modality == modality:
                    groups.setdefault(item.row if by_row else number, []).append(part)
            own = [torch.cat(parts) for parts in groups.values()]
            result[modality] = self.make_output(own, output)
        return result

    def make_output(self, features: list[torch.Tensor], output: Any) -> KeptVisualOutput:
        """The kept tokens of a modality (and their companions), after its stock output."""
        return KeptVisualOutput(last_hidden_state=output.last_hidden_state, pooler_output=features)

    def _check_query(self, input_ids, attention_mask, fsr, batch_size: int):
        """The question as `encode_query` takes it, or `None` (saliency alone), with a warning where it is missing."""
        if fsr.relevance == "none":
            return None
        if self.text_encoder is None:
            if fsr.relevance == "clip":
                raise ValueError(
                    '`fsr_config.relevance="clip"` needs a CLIP text encoder, and this model has none: set it to '
                    '"none". (A LLaVA-1.5 or LLaVA-NeXT is exported with one by `text_encoder=`.)'
                )
            logger.warning_once(
                "This model has no CLIP text encoder, so FSR ranks visual tokens by saliency alone. Export it with "
                '`text_encoder=` for relevance to the question, or set `fsr_config.relevance = "none"`.'
            )
            return None
        if input_ids is None and self.training and torch.is_grad_enabled():
            raise ValueError(
                "`query_input_ids` is missing in a training step, which would rank visual tokens by saliency alone, "
                "and answers by the question. Pass all that the processor returns. For a trainer that drops it (TRL's "
                "GRPOTrainer, RLOOTrainer), call `processor.bind_query(model)` once; to train by saliency alone, set "
                '`model.config.fsr_config.relevance = "none"`.'
            )
        if input_ids is None:
            logger.warning_once(
                "FSR got no `query_input_ids`, so visual tokens are ranked by saliency alone. The processor of this "
                "model makes them from the question (`FSRLlavaProcessor`)."
            )
            return None
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        length = self.text_encoder.chunk_length
        if input_ids.ndim != 2 or len(input_ids) != batch_size or input_ids.shape[1] % length or not input_ids.numel():
            raise ValueError(
                f"`query_input_ids` must have the shape (batch, chunks * {length}), here ({batch_size}, n * "
                f"{length}), but its shape is {tuple(input_ids.shape)}. The model's processor makes it."
            )
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`query_attention_mask` must have the shape of `query_input_ids`, {tuple(input_ids.shape)}, but its "
                f"shape is {tuple(attention_mask.shape)}."
            )
        return input_ids, attention_mask

    # ------------------------------------------------------------------ forward

    def get_placeholder_mask(self, *args, **kwargs):
        """As the stock method, which `forward()` calls for the features that it puts into the prompt."""
        if not torch.compiler.is_compiling():
            count_placed(*args[2:], kwargs.get("image_features"), kwargs.get("video_features"))
        return super().get_placeholder_mask(*args, **kwargs)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        guard = active_guard()
        if is_unpruned(guard) and not self._is_nested(kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in FSR_ARGUMENTS}
            return self._forward_stock(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        check_arguments(kwargs)
        fsr = self._override(kwargs)
        call = {name: kwargs.pop(name, None) for name in FSR_ARGUMENTS}
        visual = self.pop_visual(kwargs) if fsr.enabled or self.has_own_layout(kwargs) else None
        if visual is None:
            return self._forward_as_it_is(guard, fsr, input_ids, attention_mask, kwargs)

        check_prompt(input_ids, attention_mask, kwargs)
        prompt = self.compress(input_ids, attention_mask, **call, **visual)
        if prompt is None:
            return self._forward_stock(input_ids=input_ids, attention_mask=attention_mask, **visual, **kwargs)
        names = ("input_ids", "attention_mask", "position_ids", "mm_encoder_outputs")
        outputs = self._forward_kept(**{**kwargs, **{name: getattr(prompt, name) for name in names}})
        if (cache := get_cache(outputs)) is not None:
            remember_positions(cache, prompt.position_ids)
        length = input_ids.shape[1]
        outputs["last_hidden_state"] = carry_states(outputs.last_hidden_state, prompt.columns, length)
        return outputs

    def _is_nested(self, kwargs: dict[str, Any]) -> bool:
        """
        Whether a callback of an unpruned `generate()` makes this call, which is its own affair: it has arguments of
        FSR, or pixels, which `generate` itself encodes ahead from 5.23 on.
        """
        names = (*FSR_ARGUMENTS, *(self.pixel_inputs if VERSION >= (5, 23) else ()))
        return any(kwargs.get(name) is not None for name in names)

    def _forward_as_it_is(self, guard, fsr, input_ids, attention_mask, kwargs):
        """A call without pixels: a step of `generate()` or of a caller's own loop, or text."""
        if isinstance(guard, Draft) and not kwargs.get("mm_encoder_outputs"):
            kwargs["mm_encoder_outputs"] = guard.take(self.config.get_text_config().hidden_size)
        kept = kwargs.get("mm_encoder_outputs")
        is_kept = bool(kept) and all(getattr(output, "is_fsr_kept", False) for output in kept.values())
        if kept and not is_kept and fsr.enabled and not isinstance(guard, Draft):
            raise ValueError(
                "`mm_encoder_outputs` is not supported with FSR: images in it would run unpruned; pass `input_ids` "
                "and pixels. `fsr_enabled=False` runs the stock model."
            )
        cache = get_cache(kwargs)
        if kwargs.get("position_ids") is None and cache is not None:
            new = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
            positions = None if new is None else continue_positions(attention_mask, new.shape[1], len(new), cache)
            if positions is not None:
                kwargs["position_ids"] = positions
        if getattr(guard, "model", None) is self:
            num_beyond = input_ids.shape[1] - guard.length + (0 if cache is None else guard.columns_fed)
            if is_kept and num_beyond > 0:
                kept = kwargs["mm_encoder_outputs"] = self._with_words(kept, input_ids, num_beyond)
            guard.check_inputs(input_ids.shape[1], _count_features(kept), {"attention_mask": attention_mask, **kwargs})
        if is_kept:
            return self._forward_kept(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return self._forward_stock(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def _with_words(self, kept: dict[str, Any], input_ids: torch.Tensor, num_beyond: int) -> dict[str, Any]:
        """
        The visual tokens of a prompt, and among them the embeddings of placeholders that stand in the last
        `num_beyond` columns: the model may write one, and prompt lookup may propose one. It is a word there.
        """
        kept = dict(kept)
        for modality, output in kept.items():
            is_placeholder = input_ids == self.placeholder_ids[modality]
            num_words = is_placeholder[:, -num_beyond:].sum(-1).tolist()  # waits for the device
            if not any(num_words):
                continue
            lengths = is_placeholder[:, :-num_beyond].sum(-1).tolist()
            word = self.get_input_embeddings()(input_ids[is_placeholder][:1])

            def add(features, value, lengths=lengths, num_words=num_words):
                parts = torch.cat(list(features)).split(lengths)
                return [torch.cat([part, value.to(part).expand(n, -1)]) for part, n in zip(parts, num_words)]

            values = {**output, "pooler_output": add(output.pooler_output, word)}
            if (depths := output.get("deepstack_features")) is not None:
                values["deepstack_features"] = [add(depth, torch.zeros_like(word)) for depth in depths]
            kept[modality] = type(output)(**values)
        return kept

    def _forward_stock(self, **inputs):
        return super().forward(**inputs, return_dict=True)

    def _forward_kept(self, **inputs):
        """The stock `forward()` of a prompt that is compressed already."""
        if torch.compiler.is_compiling():
            return self._forward_stock(**inputs)
        num_features = _count_features(inputs["mm_encoder_outputs"])
        cached = cache_length(get_cache(inputs))
        with PlacementCounter() as counter:
            outputs = self._forward_stock(**inputs)
        check_outputs(counter.placed, num_features, cached, inputs["input_ids"].shape[1], outputs)
        return outputs


def _count_features(mm_encoder_outputs: dict[str, Any] | None) -> int:
    return sum(len(features) for output in (mm_encoder_outputs or {}).values() for features in output.pooler_output)


def check_prompt(input_ids, attention_mask, kwargs: dict[str, Any], refused=REFUSED_WITH_PIXELS) -> None:
    """
    Reject what cannot stand beside pixels.

    Raises:
        ValueError: naming the argument, and what to do.
    """
    if input_ids is None:
        raise ValueError(
            "Pixels need `input_ids`: FSR finds the placeholders of images in them. (PEFT prompt tuning takes "
            "them away: use an adapter on the weights, such as LoRA.)"
        )
    if is_filled(get_cache(kwargs)):
        raise ValueError(
            "`past_key_values` (`cache`) already holds tokens, and `forward()` cannot tell which of `input_ids` they "
            "are: go on by `generate(**inputs_of_the_whole_conversation, past_key_values=cache)`, or leave it out. "
            "(PEFT prefix tuning fills the cache: use an adapter on the weights, such as LoRA.)"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, but its shape is "
            f"{tuple(attention_mask.shape)}: FSR drops columns of both."
        )
    for name in refused:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` together with pixels is not supported: it refers to the whole prompt, and FSR "
                "compresses it. Leave it out, or pass `fsr_enabled=False` to run unpruned."
            )
