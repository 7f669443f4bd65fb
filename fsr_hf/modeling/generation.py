"""`generate()` over prompts whose visual tokens FSR has pruned."""

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, NoRepeatNGramLogitsProcessor
from transformers.utils import TransformersKwargs

from .caller import FullPromptView
from .compression import check_prompt
from .conversation import (
    Conversation,
    forget,
    get_conversation,
    remember,
    remember_positions,
)
from .guards import UNPRUNED, VERSION, Draft, PromptGuard, get_cache, guarded, is_filled
from .offload import is_sharded, offloaded_params_loaded
from .outer import OuterModelMixin
from .prompt import CompressedPrompt, check_no_placeholders, compact_positions, infer_attention_mask
from .signatures import FSR_ARGUMENTS, adopt_signature, check_arguments


__all__ = ["FSRGenerationMixin"]

_SELECTION_DOCS = """        output_visual_selection (`bool`, *optional*, defaults to `False`):
            Whether the output has `visual_selections`: a [`VisualSelection`] for each image or video. Needs
            `return_dict_in_generate=True`.
"""
_NO_PIXELS = "continuous batching takes ids alone, so images would be lost"
_CALLBACKS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer")
_ARGUMENTS_OF_GENERATE = (*_CALLBACKS, "generation_config", "synced_gpus", "assistant_model", "custom_generate")


class FSRGenerationMixin(OuterModelMixin, GenerationMixin):
    """
    `generate()` of a stock `...ForConditionalGeneration` class whose inner model prunes: it compresses the prompt
    once, up front, and runs the stock method on it. What goes in and what comes out refers to the whole prompt.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.generate is FSRGenerationMixin.generate:
            intro = (
                "As the stock method, on a prompt whose visual tokens have been pruned. `sequences` begins with "
                "`input_ids`, `max_length` counts them, and streamers, logits processors and stopping criteria see "
                "them; the cache, `attentions` and `hidden_states` have the compressed length. With the cache of an "
                "earlier call and the whole conversation as `input_ids`, only what is new is run.\n\nRaises "
                "`ValueError` before any work if placeholders and pixels do not match, or for an option that cannot "
                "be right with a compressed prompt (the message says why)."
            )
            own = FSR_ARGUMENTS | {"output_visual_selection": "bool"}
            adopt_signature(cls, "generate", intro, own, _SELECTION_DOCS)

    @torch.no_grad()
    def generate(self, inputs=None, output_visual_selection=None, **kwargs):
        for name in self.model.pixel_inputs:
            if name in kwargs and kwargs[name] is None:
                del kwargs[name]  # which the stock method would encode
        arguments = {name: kwargs.pop(name) for name in _ARGUMENTS_OF_GENERATE if name in kwargs}
        generation_config, cache = arguments.get("generation_config"), get_cache(kwargs)
        if getattr(generation_config, "is_assistant", False):  # this model drafts for another one, on its prompt
            outputs = None if is_filled(cache) else kwargs.get("mm_encoder_outputs")
            with guarded(Draft(outputs) if outputs else UNPRUNED):
                return super().generate(inputs, **arguments, **kwargs)

        call = {name: kwargs.pop(name, None) for name in FSR_ARGUMENTS}
        call |= _budget_of_call(call, generation_config, self.generation_config)
        fsr = self.config.fsr_config.for_call(call)
        options = GenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        options.update(**self.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        model_kwargs = options.update(**kwargs)
        if output_visual_selection and not (options.return_dict_in_generate and fsr.enabled):
            raise ValueError(
                "`output_visual_selection=True` needs `return_dict_in_generate=True`, which has a place for the "
                "selections, and pruning that is enabled."
            )
        conversation, has_own_layout = get_conversation(cache), self.model.has_own_layout(kwargs)
        if not fsr.enabled and conversation is not None and conversation.pruned_rows.any():
            raise ValueError(
                "`past_key_values` (`cache`) comes from a prompt that FSR compressed: it cannot go on with "
                "`fsr_enabled=False`. Pass the whole conversation, pixels included, without a cache."
            )
        if not fsr.enabled and not has_own_layout and conversation is None:
            with guarded(UNPRUNED), offloaded_params_loaded(self.model):
                return super().generate(inputs, **arguments, **kwargs)

        visual = self.model.pop_visual(kwargs)
        self._check_generation(options, model_kwargs, arguments, kwargs)
        input_ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        if conversation is not None:
            self._check_continuation(options, arguments)
        attention_mask: Any = kwargs.get("attention_mask")
        if attention_mask is None and input_ids is not None:
            attention_mask = infer_attention_mask(input_ids, options.pad_token_id, options.eos_token_id)
        words = {"input_ids": input_ids, "attention_mask": attention_mask}
        if visual is None and conversation is None:
            if input_ids is not None:
                cached = 0 if cache is None else int(cache.get_seq_length())
                starts = [cached if cached < input_ids.shape[1] else 0] * len(input_ids)  # what is cached ran unpruned
                check_no_placeholders(input_ids, starts, self.model.placeholder_ids, self.model.pixel_inputs)
            selections: Any = [] if output_visual_selection else None
            return self._generate_unpruned(inputs, options, arguments, kwargs, words, {}, selections)
        if conversation is None and is_filled(cache):
            raise ValueError(
                "`past_key_values` (`cache`) already holds tokens that no FSR model wrote, so images cannot join "
                "them: pass the whole conversation without it, or `fsr_enabled=False` to run unpruned. (PEFT prefix "
                "tuning fills the cache: use an adapter on the weights, such as LoRA.)"
            )
        check_prompt(input_ids, attention_mask, {"position_ids": kwargs.get("position_ids")})
        length = input_ids.shape[1]
        if options.max_new_tokens is None and options.max_length is not None and length >= options.max_length:
            raise ValueError(
                f"Input length of input_ids is {length}, but `max_length` is set to {options.max_length}. This can "
                "lead to unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        device = input_ids.device if self.device.type == "meta" else self.device
        caller_ids, caller_mask = input_ids.to(device), attention_mask.to(device)
        prompt = self.model.compress(
            caller_ids,
            caller_mask,
            **call,
            output_visual_selection=bool(output_visual_selection),
            conversation=conversation,
            # Without a cache, transformers reads gaps in positions as packed sequences once it has dropped a mask of
            # ones: a masked column keeps the mask.
            with_slack=options.use_cache is False and fsr.positions == "original",
            by_row=True,
            **(visual or {}),
        )
        is_pruned = prompt is not None and bool(has_own_layout or prompt.pruned_rows.any() or is_sharded(self.model))
        if conversation is None and not is_pruned:
            selections = None if prompt is None else prompt.selections
            return self._generate_unpruned(inputs, options, arguments, kwargs, words, visual, selections)

        for name in ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids"):
            kwargs.pop(name, None)
        view = FullPromptView(caller_ids, prompt.input_ids.shape[1])
        if conversation is not None:
            _check_room(cache, view.compressed_length, options, length)
        changes = {}  # lengths count the compressed prompt
        if options.max_new_tokens is None and options.max_length is not None:
            changes["max_length"] = options.max_length - length + view.compressed_length
        if options.min_new_tokens is None and options.min_length:
            changes["min_length"] = max(options.min_length - length + view.compressed_length, 0)
        if options.no_repeat_ngram_size:  # slack would make n-grams that no row has
            processors = [*(arguments.get("logits_processor") or ())]
            if not any(type(processor) is NoRepeatNGramLogitsProcessor for processor in processors):
                processors.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
            arguments["logits_processor"] = processors
            changes["no_repeat_ngram_size"] = 0
        if generation_config is None or changes.keys() & kwargs.keys():
            kwargs |= changes
        else:
            arguments["generation_config"] = copy.deepcopy(generation_config)
            arguments["generation_config"].update(**changes)
        if prompt.mm_encoder_outputs:
            kwargs["mm_encoder_outputs"] = prompt.mm_encoder_outputs
        past_length = 0 if conversation is None else conversation.length
        guard = PromptGuard(self.model, view.compressed_length, past_length, prompt.num_features, prompt.is_padded)
        with guarded(guard):
            output = super().generate(
                input_ids=prompt.input_ids,
                attention_mask=prompt.attention_mask,
                position_ids=prompt.position_ids,
                **view.wrap(arguments, options),
                **kwargs,
            )
            guard.check_end()
        ids = output if isinstance(output, torch.Tensor) else output.sequences
        sequences = view.restore(ids)
        self._remember(output, cache, options, sequences, caller_mask, ids, prompt)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        if output_visual_selection:
            output["visual_selections"] = prompt.selections
        return output

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and `generate_batch()` with it."""
        raise ValueError(
            f"Not supported with FSR: {_NO_PIXELS}. Use `generate()` with a batch, or the stock class for prompts of "
            "words alone."
        )

    def _generate_unpruned(self, inputs, options, arguments, kwargs, words, visual, selections):
        """The stock method on a prompt within its budget, or of words alone, whose cache a conversation may use."""
        cache = get_cache(kwargs)
        is_start = not is_filled(cache)  # else it holds what FSR did not write
        with guarded(UNPRUNED if visual else None), offloaded_params_loaded(self.model):
            output = super().generate(inputs, **arguments, **visual, **kwargs)
        is_tensor = isinstance(output, torch.Tensor)
        if is_start and words["input_ids"] is not None and not (is_tensor and cache is None):
            sequences = output if is_tensor else output.sequences
            positions = self.model.full_position_ids(**words, **visual)
            if positions.ndim == 3:
                positions = torch.cat([compact_positions(words["attention_mask"])[None], positions])
            no_rows = torch.zeros(len(words["input_ids"]), dtype=torch.bool)
            prompt = CompressedPrompt(**words, position_ids=positions, pruned_rows=no_rows)
            self._remember(output, cache, options, sequences, words["attention_mask"], sequences, prompt)
        if selections is not None:
            output["visual_selections"] = selections
        return output

    def _remember(self, output, cache, options, sequences, caller_mask, ids, prompt) -> None:
        """
        Keep with the cache what a conversation and a caller's own loop need to go on from it. The model made `ids` of
        the `prompt`, and the caller sees `sequences`, of which `caller_mask` masks the prompt.
        """
        cache = cache if isinstance(output, torch.Tensor) else get_cache(output)
        if cache is None:
            return
        cached, num_new = int(cache.get_seq_length()), ids.shape[1] - prompt.input_ids.shape[1]
        is_one_each = len(ids) == len(prompt.input_ids) and (options.num_beams or 1) == 1
        if not is_one_each or not prompt.input_ids.shape[1] <= cached <= ids.shape[1]:
            forget(cache)
            if prompt.pruned_rows.any():
                remember_positions(cache, prompt.position_ids)
            return
        steps = torch.arange(1, num_new + 1, device=prompt.position_ids.device)
        positions = torch.cat([prompt.position_ids, prompt.position_ids[..., -1:] + steps], dim=-1)
        pad = torch.nn.functional.pad
        eos = options.eos_token_id if isinstance(options.eos_token_id, list) else [options.eos_token_id]
        conversation = Conversation(
            caller_ids=sequences,
            caller_mask=pad(caller_mask, (0, num_new), value=1),
            input_ids=ids[:, :cached],
            attention_mask=pad(prompt.attention_mask, (0, num_new), value=1)[:, :cached],
            position_ids=positions[..., :cached],
            pruned_rows=prompt.pruned_rows,
            num_uncached=ids.shape[1] - cached,
            num_new=num_new,
            end_ids=[token for token in (*eos, options.pad_token_id) if token is not None],
        )
        remember(cache, conversation)

    def _check_generation(self, options: GenerationConfig, model_kwargs, arguments, kwargs) -> None:
        """Refuse what would be wrong with a compressed prompt, and names that nothing reads."""
        assistant_model, has_axes = arguments.get("assistant_model"), self.model.has_position_axes
        mode = options.get_generation_mode(assistant_model).value
        is_split = VERSION < (5, 23) and options.prefill_chunk_size is not None
        is_foreign_loop = arguments.get("custom_generate") is not None or mode in (
            *("contrastive_search", "dola_generation", "group_beam_search", "constrained_beam_search"),
        )
        foreign = f"a decoding loop from elsewhere ({mode}) need not keep the visual tokens of the compressed prompt"
        as_encoder = "it reads the ids of the prompt as if they were an encoder's"
        unpruned = "images in it would run unpruned; pass `input_ids` and pixels"
        guidance = "the prompt without the condition would get the positions of the one with it"
        assistant = "it would get the positions of this model, which have several axes: use a model of the same family"
        refused = (
            ("prefill_chunk_size", is_split, "before 5.23, transformers loses visual tokens by chunks"),
            ("token_healing", options.token_healing, "it rewrites the prompt, which its visual tokens do not follow"),
            ("cache_implementation", options.cache_implementation == "paged", _NO_PIXELS),
            ("custom_generate", is_foreign_loop, foreign),
            ("encoder_repetition_penalty", options.encoder_repetition_penalty not in (None, 1.0), as_encoder),
            ("encoder_no_repeat_ngram_size", options.encoder_no_repeat_ngram_size, as_encoder),
            ("guidance_scale", has_axes and options.guidance_scale not in (None, 1, 1.0), guidance),
            ("assistant_model", has_axes and _reads_text_positions(assistant_model), assistant),
            ("inputs_embeds", kwargs.get("inputs_embeds") is not None, unpruned),
            ("mm_encoder_outputs", kwargs.get("mm_encoder_outputs") is not None, unpruned),
        )
        _refuse(refused, "with FSR", "`fsr_enabled=False` runs the stock model.")
        # PEFT puts its own method on the model while it generates.
        peft_model = getattr(self.prepare_inputs_for_generation, "__self__", None)
        adapter: Any = getattr(peft_model, "active_peft_config", None)
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(
                f"PEFT {adapter.peft_type} is not supported with FSR: it adds virtual tokens to the prompt after it "
                "was compressed. Use an adapter on the weights, such as LoRA."
            )
        known = {
            *inspect.signature(self.forward).parameters,
            *TransformersKwargs.__optional_keys__,
            *("inputs_embeds", "tokenizer", "assistant_tokenizer", "trust_remote_code", "custom_generate"),
            *("cache", "past_key_values", "negative_prompt_ids", "negative_prompt_attention_mask"),
        }
        if unknown := [name for name, value in model_kwargs.items() if value is not None and name not in known]:
            raise ValueError(
                f"The following `model_kwargs` are not used by the model: {unknown} (note: typos in the generate "
                "arguments will also show up in this list)"
            )

    def _check_continuation(self, options: GenerationConfig, arguments) -> None:
        """Refuse what cannot go on from a cache."""
        has_assistant = arguments.get("assistant_model") is not None
        one_row, again = "the cache has one row for each prompt", "transformers would run what is in the cache again"
        refused = (
            ("num_beams", (options.num_beams or 1) > 1, one_row),
            ("num_return_sequences", (options.num_return_sequences or 1) > 1, one_row),
            ("assistant_model", has_assistant, "the assistant has no cache of the earlier turns"),
            ("prompt_lookup_num_tokens", options.prompt_lookup_num_tokens is not None, again),
            ("use_cache", options.use_cache is False, "the earlier turns are in the cache alone"),
        )
        remedy = "Leave it out, or pass the whole conversation, pixels included, without a cache."
        _refuse(refused, "where a conversation goes on from a cache", remedy)


def _refuse(options: Iterable[tuple[str, Any, str]], where: str, remedy: str) -> None:
    """Raise `ValueError` for the first option that is set: name, whether it is, and why it cannot be."""
    for name, is_set, reason in options:
        if is_set:
            raise ValueError(f"`{name}` is not supported {where}: {reason}. {remedy}")


def _budget_of_call(*sources: Any) -> dict[str, Any]:
    """
    What a call says of FSR: in its arguments, else in its generation config (where servers put what a request asks
    for), else in that of the model. A budget that is named takes the place of both of a later source.
    """
    for source in sources:
        if isinstance(source, GenerationConfig):  # which takes any name
            check_arguments(vars(source))
    found: dict[str, Any] = {}
    for names in (("num_visual_tokens", "retention_ratio"), ("fsr_enabled",)):
        for source in sources:
            values = [source.get(name) if isinstance(source, dict) else getattr(source, name, None) for name in names]
            if any(value is not None for value in values):
                found |= zip(names, values)
                break
    return found


def _reads_text_positions(model: Any) -> bool:
    """Whether `model` is one of text, with positions of one axis."""
    stock = GenerationMixin._prepare_position_ids_for_generation
    return model is not None and type(model)._prepare_position_ids_for_generation is stock


def _check_room(cache: Any, compressed_length: int, options: GenerationConfig, length: int) -> None:
    """Refuse a static cache without room for a turn."""
    room = getattr(cache.layers[0], "max_cache_len", None) if getattr(cache, "layers", None) else None
    num_new = options.max_new_tokens
    if num_new is None:
        num_new = 20 if options.max_length is None else options.max_length - length
    if isinstance(room, int) and 0 < room < compressed_length + num_new - 1:
        raise ValueError(
            f"The cache has room for {room} tokens, but this turn of the conversation needs {compressed_length} and "
            f"{num_new} new ones. Pass a `StaticCache` with a larger `max_cache_len` from the first turn on, or none."
        )
