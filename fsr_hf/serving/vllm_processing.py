"""
Requests of vLLM: an image or a video is as many placeholders as it keeps, from the beginning on. So the scheduler, the
KV cache and all other caches are right without knowing of FSR.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement

from .request import budget_settings, without_settings
from .tower import build_inner, item_positions


__all__ = ["PLAN", "FSRInfoMixin", "FSRMultiModalProcessorMixin"]

# Beside the pixels, an item carries how many tokens it keeps, how many positions it takes, and the hash of its visual
# inputs as two integers.
PLAN = "fsr_{modality}_plan"
_QUERY = ("query_input_ids", "query_attention_mask")
# More items than vLLM's cache of processed ones holds in its 4 GiB.
_NUM_REMEMBERED = 2**16


class FSRInfoMixin:
    """What vLLM asks about a model. Comes before the class of the stock model."""

    ctx: Any

    def get_hf_processor(self, **kwargs: object) -> Any:
        # AutoProcessor chooses: with a text encoder the processor is FSR's own, without one the stock one.
        return self.ctx.get_hf_processor(**without_settings(kwargs))

    def get_image_processor(self, **kwargs: object) -> Any:
        return self.get_hf_processor(**kwargs).image_processor


class FSRMultiModalProcessorMixin:
    """Comes before the multi-modal processor of the stock model."""

    info: Any

    @cached_property
    def inner(self) -> Any:
        """The inner model without weights, for what it knows from shapes alone."""
        with torch.device("meta"):
            return build_inner(self.info.get_hf_config())

    @cached_property
    def num_dropped(self) -> OrderedDict[str, int]:
        """Positions of dropped tokens of the last images and videos, by vLLM's hash."""
        return OrderedDict()

    # ------------------------------------------------------------------ what a family says

    def join_visual(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """What the inner model takes, out of what the processor returned."""
        return {name: data[name] for name in self.inner.visual_inputs if data.get(name) is not None}

    def take_items(self, numbers: dict[str, list[int]], **visual: Any) -> dict[str, Any]:
        """The visual inputs of some items alone."""
        return self.inner.take_items(numbers, **visual)

    def split_pixels(self, data: Any) -> None:
        """Change `data` so that what an item has in it does not depend on the other items."""

    # ------------------------------------------------------------------ hooks of vLLM

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        # By these vLLM sizes its caches: an item may be unpruned.
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, "fsr_enabled": False})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        # From here on, question and budget are arguments of the processor, as if every client had sent them, in one
        # order: vLLM hashes them together with the picture, so none of its caches mixes two questions or two budgets.
        given = inputs.hf_processor_mm_kwargs
        fsr = self.info.get_hf_config().fsr_config
        settings = budget_settings(fsr, given)
        if fsr.uses_relevance and "fsr_enabled" not in settings:  # what no question decides shares the caches
            query = given.get("query")
            settings["query"] = self._question(inputs.prompt) if query is None else query
        kwargs = {**without_settings(given), **settings}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]
        self._check_positions(result)
        return result

    def _question(self, prompt: list[int]) -> str:
        text = self.info.get_tokenizer().decode(prompt, skip_special_tokens=False)
        (query,) = self.info.get_hf_processor().queries_from_text([text])
        return query

    def _check_positions(self, result: Any) -> None:
        """The positions of the whole prompt must fit, though the language model gets the kept tokens alone."""
        config = self.info.get_hf_config()
        if config.fsr_config.positions != "original":
            return
        dropped = 0
        for modality, items in result["mm_kwargs"].items():
            for digest, item in zip(result["mm_hashes"][modality], items):
                if item is not None:  # vLLM hands over None for what it has sent before
                    self.num_dropped[digest] = int(item[PLAN.format(modality=modality)].data[2])
                dropped += self.num_dropped.get(digest, 0)
        while len(self.num_dropped) > _NUM_REMEMBERED:
            self.num_dropped.popitem(last=False)
        length, limit = len(result["prompt_token_ids"]) + dropped, config.get_text_config().max_position_embeddings
        # vLLM checks the length of prompts itself, so one that drops nothing needs no check here. The image of its
        # profile run drops nothing, and may be larger than any prompt.
        if dropped and length > limit:
            raise ValueError(
                f"The prompt takes {length} positions, {dropped} of them for visual tokens that are dropped, but the "
                f"language model has {limit}. Send fewer or smaller images, or serve with --hf-overrides "
                '\'{"fsr_config": {"positions": "compact"}}\' where the model allows it.'
            )

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        data = super()._apply_hf_processor_main(mm_items, without_settings(hf_kwargs))  # type: ignore[misc]
        if any(name in data for name in self.inner.pixel_inputs):
            self.split_pixels(data)
            self._add_plans(data, self.join_visual(data), hf_kwargs)
        return data

    def _add_plans(self, data: Any, visual: dict[str, Any], kwargs: Mapping[str, Any]) -> None:
        config = self.info.get_hf_config()
        fsr = config.fsr_config.for_call(kwargs)
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        plans: dict[str, list[list[int]]] = {}
        for item in self.inner.build_items(**visual):
            rows = plans.setdefault(item.modality, [])
            numbers: dict[str, list[int]] = {modality: [] for modality in self.inner.placeholder_ids}
            numbers[item.modality] = [len(rows)]
            own = self.take_items(numbers, **visual)
            num_kept = fsr.budget(item.num_candidates) if fsr.enabled else item.num_candidates
            if num_kept >= item.num_candidates:
                num_kept = item.length
            span = num_kept
            if fsr.positions == "original":
                _, span = item_positions(self.inner, item, own)
            tensors = {name: value for name, value in sorted(own.items()) if value is not None}
            digest = MultiModalHasher.hash_kwargs(algorithm, modality=item.modality, **tensors)
            key = torch.frombuffer(bytearray.fromhex(digest[:32]), dtype=torch.int64).tolist()
            rows.append([num_kept, span, max(0, span - num_kept), *key])
        for modality, rows in plans.items():
            data[PLAN.format(modality=modality)] = torch.tensor(rows)
            if "query" in kwargs:
                query = self.info.get_hf_processor().tokenize_queries([kwargs["query"]])
                for name in _QUERY:
                    data[name] = torch.tensor(query[name]).repeat(len(rows), 1)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, without_settings(hf_processor_mm_kwargs))  # type: ignore
        own = {
            PLAN.format(modality=modality): MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in self.inner.placeholder_ids
        }
        # A question comes with images: families of videos have none.
        return {**fields, **own, **{name: MultiModalFieldConfig.batched("image") for name in _QUERY}}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        def placeholders(item: int, modality: str, token: int) -> list[int]:
            plan = out_mm_kwargs[modality][item][PLAN.format(modality=modality)].data
            return [token] * int(plan[0])

        return [
            PromptReplacement(
                modality, target=[token], replacement=partial(placeholders, modality=modality, token=token)
            )
            for modality, token in self.inner.placeholder_ids.items()
        ]
