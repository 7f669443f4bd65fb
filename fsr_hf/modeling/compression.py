"""From pixels to a compressed prompt: what the inner model of every family does before its language model runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .conversation import Conversation, continue_positions, remember_positions
from .fsr import select_visual_tokens
from .guards import (
    UNPRUNED,
    VERSION,
    Draft,
    active_guard,
    count_placed,
    get_cache,
    is_filled,
    run_checked,
    warn_if_untested,
)
from .offload import is_sharded, offloaded_params_loaded
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
from .relevance import NO_TEXT_ENCODER, TextEncoderMixin
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
    """The kept visual tokens of one modality, `pooler_output`; `last_hidden_state` is the tower's."""

    # In place of `isinstance`: config, model and assistant may come from two copies of this module.
    is_fsr_kept: ClassVar[bool] = True


class FSRModelMixin(TextEncoderMixin):
    """
    Prunes the visual tokens of a prompt before the language model sees it. It stands before a stock inner model, such
    as [`LlavaModel`], and hands it fewer placeholders and fewer features; the stock class does all the rest. What a
    family says of itself comes first.
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
        Run the towers. The items are in the order of the prompt, those of one modality in the order of its pixels;
        `query`, of shape `(batch, projection_dim)`, is what [`CLIPRelevance`] makes of the questions, for families
        that have it. Returns the tokens of the items in this order, and the stock output of each modality.
        """
        outputs, encoded = {}, {}
        for modality in dict.fromkeys(item.modality for item in items):
            outputs[modality], runs, scores = self.encode(modality, **visual)
            encoded[modality] = zip(runs, scores)
        features, saliency = zip(*(next(encoded[item.modality]) for item in items))
        return VisualTokens(list(features), torch.cat(saliency)), outputs

    def encode(self, modality: str, **visual: Any) -> tuple[Any, Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The stock output of a modality, and features and saliency of each of its items, for `encode_items`."""
        raise NotImplementedError

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        """The visual inputs of some items alone: of each modality, the numbers in the order of its pixels."""
        raise NotImplementedError

    def make_output(self, features: list[torch.Tensor], output: Any) -> KeptVisualOutput:
        """The kept tokens of a modality (and their companions), after its stock output."""
        return KeptVisualOutput(last_hidden_state=output.last_hidden_state, pooler_output=features)

    def has_own_layout(self, visual: dict[str, Any]) -> bool:
        """Whether the stock class lays these visual inputs out in another way, so that it must not see the pixels."""
        return False

    def full_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **visual: Any) -> torch.Tensor:
        """Positions of the whole prompt: `(batch, length)`, or `(3, batch, length)` with `has_position_axes`."""
        return compact_positions(attention_mask)

    def pop_visual(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Take the visual inputs out of `kwargs`; `None` (and nothing taken but empty ones) if there are no pixels."""
        if kwargs.get("pixel_values_videos") is not None and "pixel_values_videos" not in self.visual_inputs:
            raise ValueError(
                f"`pixel_values_videos` is not supported: {type(self).__name__} takes images alone (frames, too)."
            )
        given = [name for name in self.pixel_inputs if kwargs.get(name) is not None]
        empty = [name for name in given if not len(kwargs[name])]
        if given == empty:
            for name in self.visual_inputs if empty else ():
                kwargs.pop(name, None)
            return None
        for name in empty:
            del kwargs[name]
        visual = {name: kwargs.pop(name) for name in self.visual_inputs if name in kwargs}
        for name in visual.keys() - {*self.pixel_inputs}:  # only the host reads sizes, grids and numbers
            visual[name] = visual[name].cpu() if isinstance(visual[name], torch.Tensor) else visual[name]
        return visual

    def will_prune(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call of `forward()` with these arguments drops a token, from the shapes of the pixels alone."""
        fsr, visual = self.config.fsr_config.for_call(kwargs), self.pop_visual(dict(kwargs))
        if visual is None or not fsr.enabled or self._runs_unpruned(kwargs):
            return False
        items = self.build_items(**visual)
        return any(fsr.budget(item.num_candidates) < item.num_candidates for item in items)

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
        Prune a prompt `(batch, length)`. All checks come first, on the host: one copy of ids and mask is the only wait
        for the device. Arguments that are not named here are those of `forward()`.

        Args:
            output_visual_selection (`bool`, *optional*, defaults to `False`):
                Whether the result has a [`VisualSelection`] for each image or video.
            conversation ([`Conversation`], *optional*):
                What a cache holds of the prompt: only the rest is encoded.
            with_slack (`bool`, *optional*, defaults to `False`):
                Whether every row begins with a masked column.
            by_row (`bool`, *optional*, defaults to `False`):
                Whether `mm_encoder_outputs` has one tensor for each row with a picture, not for each picture. Below
                5.24, beams give a row with several pictures a wrong order of them.

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
        starts, past_mask = [0] * len(host_ids), None
        if conversation is not None:
            starts, past_mask = conversation.match(host_ids, host_mask)
        items, full_visual = list[VisualItem](), visual
        if visual:
            items = self.place_items(host_ids, self.build_items(**visual))
            if conversation is not None:
                items, visual = self._new_items(items, starts, visual)
        else:  # a conversation goes on in words: pixels of what is in the cache are not needed
            check_no_placeholders(host_ids, starts, self.placeholder_ids, self.pixel_inputs)
        budgets = [fsr.budget(item.num_candidates) if fsr.enabled else item.num_candidates for item in items]
        pruned_rows = torch.zeros(len(host_ids), dtype=torch.bool)
        for item, budget in zip(items, budgets):
            pruned_rows[item.row] |= budget < item.num_candidates
        # Gathering shards is a step of all processes, so those with nothing to prune take it, too.
        needs_query = bool(pruned_rows.any()) or output_visual_selection or (bool(items) and is_sharded(self))
        if not needs_query and conversation is None and not self.has_own_layout(visual):
            return None

        kept, outputs, embeddings, question = None, dict[str, Any](), None, None
        if needs_query:
            if query_input_ids is None and self.query_reader is not None and self.text_encoder is not None:
                query_input_ids, query_attention_mask = self.query_reader(host_ids, host_mask)
            is_pruned = bool(pruned_rows.any())
            question = self._check_query(query_input_ids, query_attention_mask, fsr, len(input_ids), is_pruned)
        if question and items:
            if not question[1].cpu()[[item.row for item in items]].any(-1).all():
                logger.warning_once("A row has no question: FSR ranks its visual tokens by saliency alone.")
            ids_and_mask = (tensor.to(input_ids.device) for tensor in question)
            embeddings = self.text_encoder.encode_query(*ids_and_mask, less_empty=fsr.reads_values)
        if items:
            with offloaded_params_loaded(self):
                tokens, outputs = self.encode_items(items, embeddings, **visual)
            kept = select_from_items(tokens, items, budgets, fsr, self.selector, output_visual_selection)
        counts = kept.counts if kept else []
        indices = kept.indices.to(input_ids.device) if kept else input_ids.new_empty(0)
        columns, is_padded = select_columns(host_mask, items, counts, indices, starts, with_slack)
        is_slack, source = columns < 0, columns.clamp(min=0)
        slack_ids = self._slack_ids(host_ids, host_mask).to(input_ids.device, non_blocking=True)
        ids = torch.where(is_slack, slack_ids, input_ids.gather(1, source))
        mask = attention_mask.gather(1, source).masked_fill(is_slack, 0)
        past = None
        if conversation is not None and past_mask is not None:
            is_padded |= not past_mask.all()
            pruned_rows |= conversation.pruned_rows
            past_mask, past = past_mask.to(mask), conversation.position_ids.to(mask.device)
            # What no longer counts, such as padding behind an answer, is no word of the row.
            past_ids = torch.where(past_mask == 0, slack_ids, conversation.input_ids.to(mask.device))
            ids = torch.cat([past_ids, ids], dim=1)
        full = self.full_position_ids(input_ids, attention_mask, **full_visual) if full_visual else None
        positions = self._positions(full, fsr, pruned_rows, source, mask, past, past_mask)
        return CompressedPrompt(
            input_ids=ids,
            attention_mask=mask if past_mask is None else torch.cat([past_mask, mask], dim=1),
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

    def _positions(self, full, fsr, pruned_rows, source, mask, past, past_mask) -> torch.Tensor:
        """
        Positions `(..., batch, compressed_length)`, behind the `past` ones of a conversation; with several axes, one
        more before them that counts tokens. `full` are those of the whole prompt; without, words alone count on.
        """
        text = compact = compact_positions(mask)
        if past is not None:
            # The largest position that counts: padding behind an answer has positions, too.
            last = past.masked_fill(past_mask == 0, -1).amax(-1, keepdim=True)
            last = last if last.ndim == 3 else last[None]
            text, compact = text + 1 + last[0], compact + 1 + last[-3:].amax(0)
        chosen = compact
        if full is not None:
            chosen = full.gather(-1, source.expand(*full.shape[:-1], -1))
            if fsr.positions == "compact":
                # By row, so that a row has the same positions in any batch: the stock model's if it lost nothing.
                chosen = torch.where(pruned_rows.to(mask.device)[:, None], compact, chosen)
        if self.has_position_axes:
            # transformers reads a jump in the first axis as the start of a packed sequence, so it stays consecutive.
            chosen = torch.cat([text[None], chosen.expand(3, -1, -1)])
        return chosen if past is None else torch.cat([past, chosen], dim=-1)

    def _kept_outputs(self, items, kept, outputs, by_row: bool) -> dict[str, Any]:
        """The kept tokens of each modality, as the stock `forward()` takes them."""
        features = kept.features.split(kept.counts)
        result = {}
        for modality, output in outputs.items():
            groups: dict[int, list[torch.Tensor]] = {}
            for number, (part, item) in enumerate(zip(features, items)):
                if item.modality == modality:
                    groups.setdefault(item.row if by_row else number, []).append(part)
            result[modality] = self.make_output([torch.cat(parts) for parts in groups.values()], output)
        return result

    def _check_query(self, input_ids, attention_mask, fsr, batch_size: int, is_pruned: bool):
        """The question as `encode_query` takes it, or `None` (saliency alone), with a warning where it is missing."""
        if self.text_encoder is None and fsr.uses_relevance:
            raise ValueError(NO_TEXT_ENCODER.format(fsr.relevance))
        if self.text_encoder is None and fsr.relevance is None:
            logger.warning_once(
                "This model has no CLIP text encoder, so FSR ranks visual tokens by saliency alone. Export it with "
                '`text_encoder=` for relevance to the question, or set `fsr_config.relevance = "none"`.'
            )
        if self.text_encoder is None or fsr.relevance == "none":
            return None
        if input_ids is None and is_pruned and self.training and torch.is_grad_enabled():
            raise ValueError(
                "`query_input_ids` is missing in a training step, which would rank visual tokens by saliency alone, "
                "and answers by the question. Pass all that the processor returns. For a trainer that drops it (TRL's "
                "GRPOTrainer, RLOOTrainer), call `processor.bind_query(model)` once; to train by saliency alone, set "
                '`model.config.fsr_config.relevance = "none"`.'
            )
        if input_ids is None:
            logger.warning_once(
                "FSR got no `query_input_ids`, so visual tokens are ranked by saliency alone. The processor of this "
                "model makes them from the question (`FSRLlavaProcessor`). After its `bind_query` only the models "
                "that it was given read the question."
            )
            return None
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        shape, length = tuple(input_ids.shape), self.text_encoder.chunk_length
        if len(shape) != 2 or shape[0] != batch_size or shape[1] % length or not input_ids.numel():
            raise ValueError(
                f"`query_input_ids` must have the shape (batch, chunks * {length}) and {batch_size} rows, but its "
                f"shape is {shape}. The model's processor makes it."
            )
        if attention_mask.shape != shape:
            raise ValueError(
                f"`query_attention_mask` must have the shape of `query_input_ids`, {shape}, as the processor makes it."
            )
        return input_ids, attention_mask

    def get_placeholder_mask(self, *args, **kwargs):
        """As the stock method, which `forward()` calls for the features that it puts into the prompt."""
        if not torch.compiler.is_compiling():
            count_placed(*args[2:], kwargs.get("image_features"), kwargs.get("video_features"))
        return super().get_placeholder_mask(*args, **kwargs)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if self._runs_unpruned(kwargs):
            kwargs = {name: value for name, value in kwargs.items() if name not in FSR_ARGUMENTS}
            return self._forward_stock(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        check_arguments(kwargs)
        fsr = self.config.fsr_config.for_call(kwargs)
        call = {name: kwargs.pop(name, None) for name in FSR_ARGUMENTS}
        visual = self.pop_visual(kwargs) if fsr.enabled or self.has_own_layout(kwargs) else None
        if visual is None:
            return self._forward_as_it_is(fsr, input_ids, attention_mask, kwargs)

        check_prompt(input_ids, attention_mask, kwargs)
        prompt = self.compress(input_ids, attention_mask, **call, **visual)
        if prompt is None:
            return self._forward_stock(input_ids=input_ids, attention_mask=attention_mask, **visual, **kwargs)
        kwargs |= {"position_ids": prompt.position_ids, "mm_encoder_outputs": prompt.mm_encoder_outputs}
        outputs = self._forward_kept(input_ids=prompt.input_ids, attention_mask=prompt.attention_mask, **kwargs)
        if (cache := get_cache(outputs)) is not None:
            remember_positions(cache, prompt.position_ids)
        outputs["last_hidden_state"] = carry_states(outputs.last_hidden_state, prompt.columns, input_ids.shape[1])
        return outputs

    def _runs_unpruned(self, kwargs: dict[str, Any]) -> bool:
        """
        Whether this call is one of a `generate()` that prunes nothing. A call that a callback of it makes is not: it
        has arguments of FSR, or pixels, which `generate` itself encodes ahead from 5.23 on.
        """
        names = (*FSR_ARGUMENTS, *(self.pixel_inputs if VERSION >= (5, 23) else ()))
        return active_guard() == UNPRUNED and all(kwargs.get(name) is None for name in names)

    def _forward_as_it_is(self, fsr, input_ids, attention_mask, kwargs):
        """A call without pixels: a step of `generate()` or of a caller's own loop, or text."""
        guard, cache = active_guard(), get_cache(kwargs)
        if isinstance(guard, Draft) and not kwargs.get("mm_encoder_outputs"):
            kwargs["mm_encoder_outputs"] = guard.take(self.config.get_text_config().hidden_size)
        kept = kwargs.get("mm_encoder_outputs")
        is_kept = bool(kept) and all(getattr(output, "is_fsr_kept", False) for output in kept.values())
        if kept and not is_kept and fsr.enabled and not isinstance(guard, Draft):
            raise ValueError(
                "`mm_encoder_outputs` is not supported with FSR: images in it would run unpruned; pass `input_ids` "
                "and pixels. `fsr_enabled=False` runs the stock model."
            )
        new = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        if kwargs.get("position_ids") is None and cache is not None and new is not None:
            positions = continue_positions(attention_mask, new.shape[1], len(new), cache)
            kwargs |= {} if positions is None else {"position_ids": positions}
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
        kept, length = dict(kept), input_ids.shape[1]
        for modality, output in kept.items():
            is_placeholder = input_ids == self.placeholder_ids[modality]
            if not is_placeholder[:, -num_beyond:].any():  # waits for the device
                continue
            in_prompt = torch.arange(length, device=input_ids.device) < length - num_beyond
            in_prompt = in_prompt.expand_as(input_ids)[is_placeholder]
            words = self.get_input_embeddings()(input_ids[is_placeholder])
            values = {**output, "pooler_output": _fill_in(words, in_prompt, output.pooler_output)}
            if (depths := output.get("deepstack_features")) is not None:
                nothing = torch.zeros_like(words)
                values["deepstack_features"] = [_fill_in(nothing, in_prompt, depth) for depth in depths]
            kept[modality] = type(output)(**values)
        return kept

    def _forward_stock(self, **inputs):
        return super().forward(**inputs, return_dict=True)

    def _forward_kept(self, **inputs):
        """The stock `forward()` of a prompt that is compressed already."""
        if torch.compiler.is_compiling():
            return self._forward_stock(**inputs)
        return run_checked(self._forward_stock, _count_features(inputs["mm_encoder_outputs"]), inputs)


def _fill_in(words: torch.Tensor, in_prompt: torch.Tensor, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The features of a prompt at the places that are in it, `(placeholders,)`, and `words` at the others."""
    return [words.to(features[0]).index_put((in_prompt,), torch.cat([*features]))]


def _count_features(mm_encoder_outputs: dict[str, Any] | None) -> int:
    return sum(len(features) for output in (mm_encoder_outputs or {}).values() for features in output.pooler_output)


def check_prompt(input_ids, attention_mask, kwargs: dict[str, Any], labels=None) -> None:
    """Reject what cannot stand beside pixels: `ValueError`, with the argument and what to do."""
    if input_ids is None:
        raise ValueError(
            "Pixels need `input_ids`, in which FSR finds the placeholders of images. (PEFT prompt tuning takes them "
            "away: use an adapter on the weights, such as LoRA.)"
        )
    if is_filled(get_cache(kwargs)):
        raise ValueError(
            "`past_key_values` (`cache`) already holds tokens, and `forward()` cannot tell which of `input_ids` they "
            "are: go on by `generate(**inputs_of_the_whole_conversation, past_key_values=cache)`, or leave it out. "
            "(PEFT prefix tuning fills the cache: use an adapter on the weights, such as LoRA.)"
        )
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids`, {tuple(input_ids.shape)}, but its shape is "
                f"{tuple(tensor.shape)}: FSR drops columns of both."
            )
    for name in REFUSED_WITH_PIXELS:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"`{name}` together with pixels is not supported: it refers to the whole prompt, which FSR "
                "compresses. Leave it out, or pass `fsr_enabled=False` to run unpruned."
            )
