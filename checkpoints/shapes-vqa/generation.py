# Generated from fsr_hf 0.1.0 (fsr_hf.modeling.generation), do not edit.
"""`generate()` and `forward()` over prompts whose visual tokens FSR has pruned."""

import copy
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils import TransformersKwargs, logging

from .caller import CallerView
from .fsr import VisualSelection
from .pools import VisualPools, select_from_pools
from .prompt import CompressedPrompt, VisualItem, lay_out, restore_logits


__all__ = ["FSRGenerationMixin"]

logger = logging.get_logger(__name__)


class FSRGenerationMixin(GenerationMixin):
    """
    Prunes the visual tokens of a prompt before the language model sees it. It stands before a stock
    `...ForConditionalGeneration` class, which does all the rest: `generate()` and `forward()` of that class run on the
    embeddings of the compressed prompt.

    A family says what its visual inputs are and where tokens and scores come from: `visual_inputs`,
    [`~FSRGenerationMixin.find_items`], [`~FSRGenerationMixin.encode_visuals`] and, where it has its own positions,
    [`~FSRGenerationMixin.full_position_ids`].
    """

    # Inputs that only the towers (and the search for placeholders) read; the first of each modality holds its pixels.
    visual_inputs: ClassVar[tuple[str, ...]] = ()
    pixel_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    # `guidance_scale` runs a second prompt through the model, which not every family can give positions to.
    supports_guidance: ClassVar[bool] = True

    # ------------------------------------------------------------------ what a family says

    def placeholder_ids(self) -> list[int]:
        """Ids of the placeholders that pixels fill."""
        return [self.config.image_token_id]

    def find_items(self, input_ids: torch.Tensor, **visual: Any) -> list[VisualItem]:
        """
        The images and videos of a prompt (on the CPU), from shapes and grids alone; raises `ValueError` on a mismatch.
        """
        raise NotImplementedError

    def num_candidates(self, items: list[VisualItem], **visual: Any) -> list[int]:
        """How many tokens of each item can be kept or dropped: its placeholders without newlines."""
        return [item.length for item in items]

    def encode_visuals(self, items: list[VisualItem], query: torch.Tensor | None, **visual: Any) -> VisualPools:
        """
        Run the towers. `query`: `(batch, projection_dim)` from [`CLIPRelevance`], one row for each row of the prompt.
        """
        raise NotImplementedError

    def full_position_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **visual: Any) -> torch.Tensor:
        """
        Positions of the whole prompt, used with `positions="original"`: `(batch, length)`, or `(axes, batch, length)`
        for a model that rotates by several.
        """
        return _positions(attention_mask)

    def runs_stock(self, visual: dict[str, Any]) -> bool:
        """
        Whether the stock class has the right embeddings for a prompt that is not pruned. If not, the prompt goes the
        way of a pruned one, and nothing is dropped.
        """
        return True

    # ------------------------------------------------------------------ compression

    def _compress(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        visual: dict[str, Any],
        query: tuple[torch.Tensor | None, torch.Tensor | None],
        fsr,
        return_selections: bool = False,
    ) -> tuple[CompressedPrompt | None, list[VisualSelection] | None]:
        """
        Prune the prompt `(batch, length)` under the settings `fsr`.

        All checks come first, on the host: one copy of ids and mask is the only wait for the device.

        Returns:
            The compressed prompt, or `None` if every image is within its budget and the stock class can run it; and
            one [`VisualSelection`] for each image or video if `return_selections`.
        """
        host_ids, host_mask = input_ids.cpu(), attention_mask.cpu()
        items = self.find_items(host_ids, **visual)
        candidates = self.num_candidates(items, **visual)
        budgets = [fsr.budget(number) if fsr.enabled else number for number in candidates]
        is_pruned = [budget < number for budget, number in zip(budgets, candidates)]
        is_stock = not any(is_pruned) and self.runs_stock(visual)
        if is_stock and not return_selections:
            return None, None

        question = self._check_query(query, fsr, len(input_ids)) if any(is_pruned) or return_selections else None
        embeddings = None
        if question is not None:
            if not question[1].cpu()[[item.row for item in items]].any(-1).all():
                logger.warning_once("A row has no question: FSR ranks its visual tokens by saliency alone.")
            embeddings = self.text_encoder.encode_query(*(tensor.to(input_ids.device) for tensor in question))
        pools = self.encode_visuals(items, embeddings, **visual)
        indices, features, kept, selections = select_from_pools(
            pools, items, budgets, is_pruned, fsr, return_selections
        )
        if is_stock:
            return None, selections

        layout = lay_out(host_mask, items, kept, indices.to(input_ids.device))
        ids, mask = layout.gather(input_ids), layout.attention_mask(attention_mask)
        embeds = layout.embeds(self.get_input_embeddings()(ids), features)
        position_ids = _positions(mask)
        if fsr.positions == "original":
            full = layout.gather(self.full_position_ids(input_ids, attention_mask, **visual))
            # Masks are made from a first row without gaps: a gap would be read as the end of a packed sequence.
            position_ids = full if full.ndim == 2 else torch.cat([position_ids[None], full])
        return CompressedPrompt(layout, ids, embeds, mask, position_ids), selections

    def _check_query(self, query, fsr, batch_size: int):
        """The question as `encode_query` takes it, or `None` (saliency alone), with a warning where it is missing."""
        if fsr.relevance == "none":
            return None
        if not fsr.uses_relevance:
            logger.warning_once(
                "This model has no CLIP text encoder, so FSR ranks visual tokens by saliency alone. Export it with "
                '`text_encoder=` for relevance to the question, or set `fsr_config.relevance = "none"`.'
            )
            return None
        input_ids, attention_mask = query
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

    def _pop_visual(self, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Take the visual inputs out of `kwargs`; `None` (and nothing taken) if there are no pixels."""
        if kwargs.get("pixel_values_videos") is not None and "pixel_values_videos" not in self.visual_inputs:
            raise ValueError(
                f"`pixel_values_videos` is not supported: {type(self).__name__} takes images alone. Pass frames as "
                "images, or use a model for videos (FSRLlavaVideo, FSRQwen2_5_VL)."
            )
        if all(kwargs.get(name) is None for name in self.pixel_inputs):
            return None
        return {name: kwargs.pop(name) for name in self.visual_inputs if name in kwargs}

    def _check_prompt(self, input_ids, attention_mask, kwargs, refused: tuple[str, ...]) -> torch.Tensor:
        """The ids, after the refusal of what cannot stand beside pixels."""
        if input_ids is None:
            raise ValueError(
                "Pixels need `input_ids`: FSR finds the placeholders of images in them. (PEFT prompt tuning takes "
                "them away: use an adapter on the weights, such as LoRA.)"
            )
        if _cached_length(kwargs.get("past_key_values")):
            raise ValueError(
                "`past_key_values` already holds tokens: going on from a cache with images in the prompt is not "
                "supported with FSR. Pass the whole conversation without `past_key_values`, or `fsr_enabled=False` to "
                "run unpruned. (PEFT prefix tuning fills the cache: use an adapter on the weights, such as LoRA.)"
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
        return input_ids

    # ------------------------------------------------------------------ generate

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model=None,
        streamer: BaseStreamer | None = None,
        query_input_ids: torch.LongTensor | None = None,
        query_attention_mask: torch.LongTensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        output_visual_selection: bool = False,
        **kwargs,
    ):
        r"""
        As [`~transformers.GenerationMixin.generate`], on a prompt whose visual tokens have been pruned. What goes in
        and what comes out refers to the whole prompt: `sequences` begins with `input_ids`, `max_length` counts them,
        and streamers, logits processors and stopping criteria see them. Only the cache, `attentions` and
        `hidden_states` have the compressed length.

        Args:
            query_input_ids (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
                The question in ids of CLIP's tokenizer, made by the model's processor.
            query_attention_mask (`torch.LongTensor` of shape `(batch, chunks * 77)`, *optional*):
                Its mask. Chunks whose mask is 0 are skipped.
            num_visual_tokens (`int`, *optional*):
                Budget of each image or video for this call, in place of the config's.
            retention_ratio (`float`, *optional*):
                The same as a share of its tokens. Not both.
            fsr_enabled (`bool`, *optional*):
                Whether to prune in this call, in place of the config's `enabled`.
            output_visual_selection (`bool`, *optional*, defaults to `False`):
                Whether the output has `visual_selections`: a [`VisualSelection`] for each image or video. Needs
                `return_dict_in_generate=True`.

        Raises:
            `ValueError`: before any work, if placeholders and pixels do not match, or for an option that cannot be
            right with a compressed prompt (the message says why).
        """
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
        }
        if getattr(generation_config, "is_assistant", False):
            # This model drafts for another one. Embeddings of that one's prompt are of use if they have our width.
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None and embeds.shape[-1] != self.config.get_text_config().hidden_size:
                del kwargs["inputs_embeds"]
            return super().generate(inputs, generation_config, **arguments, **kwargs)

        fsr = self.config.fsr_config.override(num_visual_tokens, retention_ratio, fsr_enabled)
        options = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        options.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        model_kwargs = options.update(**kwargs)
        if output_visual_selection and not (options.return_dict_in_generate and fsr.enabled):
            raise ValueError(
                "`output_visual_selection=True` needs `return_dict_in_generate=True`, which has a place for the "
                "selections, and pruning that is enabled."
            )
        if not fsr.enabled and self.runs_stock(kwargs):
            _refuse_pruned_cache(kwargs.get("past_key_values"))
            return super().generate(inputs, generation_config, **arguments, **kwargs)

        visual = self._pop_visual(kwargs)
        self._check_generation(options, model_kwargs, arguments, kwargs)
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if visual is None:
            self._check_text_prompt(input_ids, kwargs)
            output = super().generate(inputs, generation_config, **arguments, **kwargs)
            if output_visual_selection:
                output["visual_selections"] = []
            return output

        attention_mask = kwargs.get("attention_mask")
        input_ids = self._check_prompt(input_ids, attention_mask, kwargs, ("position_ids",))
        length = input_ids.shape[1]
        if options.max_new_tokens is None and options.max_length is not None and length >= options.max_length:
            raise ValueError(
                f"Input length of input_ids is {length}, but `max_length` is set to {options.max_length}. This can "
                "lead to unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        device = input_ids.device if self.device.type == "meta" else self.device
        mask = _infer_attention_mask(input_ids, options) if attention_mask is None else attention_mask
        prompt, selections = self._compress(
            *(input_ids.to(device), mask.to(device), visual, (query_input_ids, query_attention_mask), fsr),
            return_selections=output_visual_selection,
        )
        if prompt is None:
            output = super().generate(inputs, generation_config, **arguments, **{**visual, **kwargs})
            if output_visual_selection:
                output["visual_selections"] = selections
            return output

        kwargs = {name: value for name, value in kwargs.items() if name not in ("input_ids", "attention_mask")}
        difference = length - prompt.input_ids.shape[1]
        lengths = {}
        if options.max_new_tokens is None and options.max_length is not None:
            lengths["max_length"] = options.max_length - difference
        if options.min_new_tokens is None and options.min_length:
            lengths["min_length"] = max(options.min_length - difference, 0)
        if generation_config is None or lengths.keys() & kwargs.keys():
            kwargs |= lengths
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.update(**lengths)

        view = CallerView(input_ids, prompt.input_ids.shape[1])
        output = super().generate(
            generation_config=generation_config,
            input_ids=prompt.input_ids,
            inputs_embeds=prompt.inputs_embeds,
            attention_mask=prompt.attention_mask,
            position_ids=prompt.position_ids,
            **view.wrap(arguments, options),
            **kwargs,
        )
        if isinstance(output, torch.Tensor):
            sequences = view.restore(output)
        else:
            sequences = output.sequences = view.restore(output.sequences)
            _mark_pruned(output.past_key_values, prompt)
        _mark_pruned(kwargs.get("past_key_values"), prompt)
        if output_visual_selection:
            output["visual_selections"] = selections
        return sequences if isinstance(output, torch.Tensor) else output

    def _check_generation(self, options: GenerationConfig, model_kwargs, arguments, kwargs) -> None:
        """Refuse what would be wrong with a compressed prompt, and names that nothing reads."""
        mode = options.get_generation_mode(arguments["assistant_model"]).value
        refused = {
            "prefill_chunk_size": (
                options.prefill_chunk_size is not None,
                "transformers drops embeddings when it splits the prefill, so images would be lost without a word",
            ),
            "token_healing": (
                options.token_healing,
                "it rewrites the ids of the prompt, which its embeddings do not follow",
            ),
            "cache_implementation": (
                options.cache_implementation == "paged",
                "continuous batching takes ids alone, so images would be lost",
            ),
            "custom_generate": (
                kwargs.get("custom_generate") is not None
                or mode in ("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search"),
                f"a decoding loop from elsewhere ({mode}) need not keep the embeddings of the compressed prompt",
            ),
            "encoder_repetition_penalty": (
                options.encoder_repetition_penalty not in (None, 1.0),
                "it reads the ids of the prompt as if they were an encoder's",
            ),
            "encoder_no_repeat_ngram_size": (
                bool(options.encoder_no_repeat_ngram_size),
                "it reads the ids of the prompt as if they were an encoder's",
            ),
            "guidance_scale": (
                not self.supports_guidance and options.guidance_scale not in (None, 1, 1.0),
                "the prompt without the condition would get the positions of the one with it",
            ),
            "inputs_embeds": (
                kwargs.get("inputs_embeds") is not None,
                "images in it would run unpruned; pass `input_ids` and pixels",
            ),
            "mm_encoder_outputs": (
                kwargs.get("mm_encoder_outputs") is not None,
                "images in it would run unpruned; pass `input_ids` and pixels",
            ),
        }
        for name, (is_refused, reason) in refused.items():
            if is_refused:
                raise ValueError(
                    f"`{name}` is not supported with FSR: {reason}. `fsr_enabled=False` runs the stock model."
                )
        # PEFT puts its own method on the model while it generates.
        adapter: Any = getattr(
            getattr(self.prepare_inputs_for_generation, "__self__", None), "active_peft_config", None
        )
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT {adapter.peft_type} is not supported with FSR: it adds virtual tokens to the prompt after it "
                "was compressed. Use an adapter on the weights, such as LoRA."
            )
        known = {
            *inspect.signature(self.forward).parameters,
            *TransformersKwargs.__optional_keys__,
            *("inputs_embeds", "tokenizer", "assistant_tokenizer", "trust_remote_code", "custom_generate"),
            *("negative_prompt_ids", "negative_prompt_attention_mask"),
        }
        unknown = [name for name, value in model_kwargs.items() if value is not None and name not in known]
        if unknown:
            raise ValueError(
                f"The following `model_kwargs` are not used by the model: {unknown} (note: typos in the generate "
                "arguments will also show up in this list)"
            )

    def _check_text_prompt(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """A prompt without pixels must be one without placeholders."""
        _refuse_pruned_cache(kwargs.get("past_key_values"))
        if input_ids is None:
            return
        cached = _cached_length(kwargs.get("past_key_values"))
        new = input_ids[:, cached if cached < input_ids.shape[1] else 0 :]  # what is cached ran unpruned
        is_placeholder = torch.isin(new, torch.tensor(self.placeholder_ids(), device=new.device))
        if is_placeholder.any():
            raise ValueError(
                f"The prompt has {int(is_placeholder.sum())} placeholders (ids {self.placeholder_ids()}) but there "
                f"are no pixels ({', '.join(f'`{name}`' for name in self.pixel_inputs)}) to fill them. Pass what the "
                "processor returns, whole."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values=None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ):
        # The stock method takes either embeddings or ids. While assisted decoding verifies its first candidates, and
        # while an assistant reads the prompt, the prompt's embeddings are followed by ids.
        if inputs_embeds is not None and next_sequence_length != 1:
            cached = _cached_length(past_key_values)
            prompt_length = inputs_embeds.shape[1]
            if cached < prompt_length:
                if input_ids.shape[1] > prompt_length:
                    new_embeds = self.get_input_embeddings()(input_ids[:, prompt_length:])
                    inputs_embeds = torch.cat([inputs_embeds, new_embeds.to(inputs_embeds)], dim=1)
                is_first_iteration = True
                next_sequence_length = inputs_embeds.shape[1] - cached
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # `generate` has compressed the prompt by now, or decided to run it as it is.
        return {**model_inputs, "fsr_enabled": False}

    # ------------------------------------------------------------------ forward

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """What the `forward` of every family does; its signature and docstring are the family's."""
        if mm_encoder_outputs:  # older versions do not know the name
            if fsr_enabled is not False and self.config.fsr_config.enabled:
                raise ValueError(
                    "`mm_encoder_outputs` is not supported with FSR: images in it would run unpruned; pass "
                    "`input_ids` and pixels. `fsr_enabled=False` runs the stock model."
                )
            kwargs["mm_encoder_outputs"] = mm_encoder_outputs
        stock = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": logits_to_keep,
        }
        visual = None if fsr_enabled is False and self.runs_stock(kwargs) else self._pop_visual(kwargs)
        if visual is None:
            _go_on_from_pruned_cache(attention_mask, input_ids, kwargs)
            return super().forward(**stock, **kwargs)
        fsr = self.config.fsr_config.override(num_visual_tokens, retention_ratio, fsr_enabled)
        if not fsr.enabled and self.runs_stock(visual):
            return super().forward(**stock, **visual, **kwargs)

        refused = ("inputs_embeds", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "shift_labels")
        input_ids = self._check_prompt(input_ids, attention_mask, kwargs, refused)
        _check_forward(kwargs, labels, input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompt, _ = self._compress(input_ids, mask, visual, (query_input_ids, query_attention_mask), fsr)
        if prompt is None:
            return super().forward(**stock, **visual, **kwargs)

        if labels is not None:
            masked = labels
            for placeholder in self.placeholder_ids():
                masked = masked.masked_fill(input_ids == placeholder, -100)
            if kwargs.get("num_items_in_batch") is not None:
                # Trainer counted the labels of placeholders, too. With several micro-batches to a step only this one's
                # share of them is known here, and stands for the others'.
                counted, counts = (tensor[:, 1:].ne(-100).sum() for tensor in (labels, masked))
                kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * counts / counted.clamp(min=1)
            labels = prompt.layout.labels(masked)
        return_dict = kwargs.pop("return_dict", None)
        # All logits for the loss, and for positions that differ from row to row; else no more than are asked for.
        is_number = isinstance(logits_to_keep, int)
        kwargs |= {
            "inputs_embeds": prompt.inputs_embeds,
            "attention_mask": prompt.attention_mask,
            "position_ids": prompt.position_ids,
            "labels": labels,
            "logits_to_keep": min(logits_to_keep, prompt.input_ids.shape[1]) if is_number and labels is None else 0,
        }
        outputs = super().forward(return_dict=True, **kwargs)
        _mark_pruned(outputs.past_key_values, prompt)
        outputs["logits"] = restore_logits(outputs.logits, prompt.layout.columns, input_ids.shape[1], logits_to_keep)
        if return_dict is None:
            return_dict = self.config.return_dict
        return outputs if return_dict else outputs.to_tuple()

    # ------------------------------------------------------------------ the text tower

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As the stock method; a checkpoint without the weights of the text tower that its config names is refused."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        lost = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        lost = [key for key in lost if key.startswith("text_encoder.")]
        if lost:
            raise ValueError(
                f"The checkpoint lacks {len(lost)} weights of the CLIP text encoder that "
                f"`fsr_config.text_encoder_config` describes, or has them in another shape ({lost[0]}, ...): "
                "relevance would be random. Export it with `text_encoder=`, or load with "
                '`fsr_config={"text_encoder_config": None}`.'
            )
        return (model, info) if output_loading_info else model

    def requires_grad_(self, requires_grad: bool = True):
        super().requires_grad_(requires_grad)
        if getattr(self, "text_encoder", None) is not None:
            self.text_encoder.requires_grad_(False)
        return self


def _check_forward(kwargs: dict[str, Any], labels: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """What the stock `forward` would take without a word: a misspelt argument of FSR; or fail on after the tower."""
    arguments = ("query_input_ids", "query_attention_mask", "num_visual_tokens", "retention_ratio", "fsr_enabled")
    for name in kwargs:
        if meant := get_close_matches(name, arguments, n=1, cutoff=0.8):
            raise ValueError(f"`{name}` is no argument of the model. Did you mean `{meant[0]}`?")
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(
            f"`labels` must have the shape of `input_ids`, {tuple(input_ids.shape)}, but their shape is "
            f"{tuple(labels.shape)}."
        )


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _cached_length(cache) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _mark_pruned(cache, prompt: CompressedPrompt) -> None:
    if cache is not None:
        cache.is_fsr_pruned = True
        # Add the number of a cache entry, and this is the position of what was written after the prompt.
        cache.fsr_offset = prompt.position_ids[..., -1:] + 1 - prompt.input_ids.shape[1]


def _refuse_pruned_cache(cache) -> None:
    if getattr(cache, "is_fsr_pruned", False) and _cached_length(cache):
        raise ValueError(
            "`past_key_values` comes from a prompt that FSR compressed, so its entries are not those of `input_ids`: "
            "going on from it is not supported. Pass the whole conversation, pixels included, without "
            "`past_key_values`."
        )


def _go_on_from_pruned_cache(attention_mask, input_ids, kwargs) -> None:
    """A step of a caller's own decoding loop after a forward with pixels: its mask and its positions."""
    cache = kwargs.get("past_key_values")
    if not getattr(cache, "is_fsr_pruned", False):
        return
    cached = _cached_length(cache)
    if not cached:  # emptied, and used anew
        cache.is_fsr_pruned = False
        return
    new = input_ids if input_ids is not None else kwargs["inputs_embeds"]
    expected = cached + new.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] != expected:
        raise ValueError(
            f"`attention_mask` has {attention_mask.shape[1]} columns, but the cache of the compressed prompt and the "
            f"new tokens have {expected}. Its columns are those of the cache, not of the caller's prompt."
        )
    if kwargs.get("position_ids") is None:
        # The stock class would count the entries of the cache, or go on from what another call left behind.
        offset = cache.fsr_offset.repeat_interleave(len(new) // cache.fsr_offset.shape[-2], dim=-2)
        kwargs["position_ids"] = offset + torch.arange(cached, expected, device=offset.device)


def _infer_attention_mask(input_ids: torch.Tensor, options: GenerationConfig) -> torch.Tensor:
    """The mask that transformers would infer: from padding, if the prompt has any and it is not EOS."""
    pad, eos = options.pad_token_id, options.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    if pad is None or pad in eos:
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()
