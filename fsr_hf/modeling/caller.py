"""The caller's side of `generate()`: callbacks see the whole prompt while the model runs on the compressed one."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer

from .guards import VERSION


__all__ = ["FullPromptView"]

# Same result on the compressed prompt, which has the same ids, each at least once, and the same end; so not wrapped.
# Wrapping would also hide the class by which `generate` finds its default.
_SAME_ON_BOTH = (EosTokenCriteria, MaxTimeCriteria, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor)


@dataclass
class FullPromptView:
    """The caller's prompt in place of the compressed one, for everything that looks at ids."""

    input_ids: torch.Tensor  # [batch, length]: the caller's prompt
    compressed_length: int  # how many leading ids it stands for

    def restore(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(batch * n, compressed_length + new)` to `(batch * n, length + new)`: n beams or sequences a row."""
        prompt = self.input_ids.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.input_ids), dim=0)
        return torch.cat([prompt, input_ids[:, self.compressed_length :]], dim=1)

    def wrap(self, arguments: dict[str, Any], options: GenerationConfig) -> dict[str, Any]:
        """The caller's callbacks, each behind this view."""
        arguments = dict(arguments)
        if arguments.get("logits_processor") is not None:
            processors = [self._wrap_processor(processor) for processor in arguments["logits_processor"]]
            arguments["logits_processor"] = LogitsProcessorList(processors)
        if arguments.get("stopping_criteria") is not None:
            criteria = [self._wrap_criterion(criterion) for criterion in arguments["stopping_criteria"]]
            arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
        if (allowed_tokens := arguments.get("prefix_allowed_tokens_fn")) is not None:
            # Beams of a row share its number; other returned sequences do so from 5.24 on.
            is_numbered_apart = VERSION < (5, 24) and options.num_beams in (None, 1)
            copies = (options.num_return_sequences if is_numbered_apart else None) or 1

            def allowed(row, ids):
                prompt = self.input_ids[row // copies].to(ids.device)
                return allowed_tokens(row, torch.cat([prompt, ids[self.compressed_length :]]))

            arguments["prefix_allowed_tokens_fn"] = allowed
        if arguments.get("streamer") is not None:
            arguments["streamer"] = _CallerStreamer(self, arguments["streamer"])
        return arguments

    def _wrap_processor(self, processor: LogitsProcessor) -> LogitsProcessor:
        if type(processor) in _SAME_ON_BOTH and not getattr(processor, "prompt_ignore_length", None):
            return processor
        return _CallerLogitsProcessor(self, processor)

    def _wrap_criterion(self, criterion: StoppingCriteria) -> StoppingCriteria:
        if type(criterion) in _SAME_ON_BOTH:
            return criterion
        if type(criterion) is MaxLengthCriteria:  # `generate` looks for this class, too
            removed = self.input_ids.shape[1] - self.compressed_length
            return MaxLengthCriteria(criterion.max_length - removed, criterion.max_position_embeddings)
        return _CallerStoppingCriteria(self, criterion)


@dataclass
class _CallerLogitsProcessor(LogitsProcessor):
    view: FullPromptView
    processor: LogitsProcessor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.processor(self.view.restore(input_ids), scores)


class _CallerStoppingCriteria(StoppingCriteria):
    def __init__(self, view: FullPromptView, criterion: StoppingCriteria):
        self.view = view
        self.criterion = criterion
        if hasattr(criterion, "eos_token_id"):  # `generate` pads finished rows if a criterion has it
            self.eos_token_id = criterion.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.criterion(self.view.restore(input_ids), scores, **kwargs)


@dataclass
class _CallerStreamer(BaseStreamer):
    view: FullPromptView
    streamer: BaseStreamer
    is_prompt: bool = True

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(self.view.restore(value) if self.is_prompt else value)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()
