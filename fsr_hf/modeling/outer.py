"""The outer model: the stock class on an inner model that prunes, and the labels of a compressed prompt."""

from typing import Any, ClassVar

import torch
from torch import nn

from .compression import check_prompt
from .relevance import TextEncoderMixin
from .signatures import FSR_ARGUMENTS, adopt_signature


__all__ = ["OuterModelMixin"]


class OuterModelMixin(TextEncoderMixin):
    """A stock `...ForConditionalGeneration` class on an inner model that prunes."""

    # The inner model of the family.
    inner_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.forward is OuterModelMixin.forward:
            intro = (
                "As the stock method, on an inner model that compresses prompts with pixels: labels on placeholders "
                "never count; `logits` and `logits_to_keep` mean the caller's positions, and a dropped one has the "
                "logits of the last kept position before it; `hidden_states`, `attentions` and the cache have the "
                "compressed length. `position_ids`, packed sequences, `shift_labels` and `inputs_embeds` cannot stand "
                "beside pixels."
            )
            inner_class = getattr(cls, "inner_class", None)
            names = dict.fromkeys(getattr(inner_class, "visual_inputs", ()), "Any")
            adopt_signature(cls, "forward", intro, FSR_ARGUMENTS | names)

    def __init__(self, config):
        # The class before the stock one, whose own `__init__` would build the stock inner model first.
        stock = next(c for c in type(self).__mro__ if c.__module__.startswith("transformers.models."))
        super(stock, self).__init__(config)  # type: ignore[arg-type]
        self.model = self.inner_class(config)
        text_config = config.get_text_config()
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.post_init()

    @property
    def selector(self):
        """What chooses among the tokens of a pool, [`select_visual_tokens`] or another of its form."""
        return self.model.selector

    @selector.setter
    def selector(self, selector) -> None:
        self.model.selector = selector

    def forward(self, input_ids=None, labels=None, **kwargs):
        if labels is not None and self.model.will_prune(kwargs):
            check_prompt(input_ids, kwargs.get("attention_mask"), kwargs, labels)
            labels = self._mask_labels(input_ids, labels, kwargs)
        return super().forward(input_ids=input_ids, labels=labels, **kwargs)

    def _mask_labels(self, input_ids, labels, kwargs: dict[str, Any]) -> torch.Tensor:
        """
        The labels less those of placeholders, and of a row's first token: what would predict it is padding.
        `num_items_in_batch` is corrected by what that takes away.
        """
        masked = labels
        for placeholder in self.model.placeholder_ids.values():
            masked = masked.masked_fill(input_ids == placeholder, -100)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            follows_padding = nn.functional.pad(mask[:, :-1] == 0, (1, 0), value=True)
            masked = masked.masked_fill(follows_padding.to(masked.device), -100)
        if kwargs.get("num_items_in_batch") is not None:
            # Trainer counted the labels of placeholders, too. With several micro-batches to a step only this one's
            # share of them is known here, and stands for the others'.
            counted, counts = (tensor[:, 1:].ne(-100).sum() for tensor in (labels, masked))
            kwargs["num_items_in_batch"] = kwargs["num_items_in_batch"] * counts / counted.clamp(min=1)
        return masked
