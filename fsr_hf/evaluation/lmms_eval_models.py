"""
Models of lmms-eval: its own wrappers of the stock classes, on the classes of this package.

    lmms-eval --model fsr_llava --model_args pretrained=./llava-1.5-7b-fsr,num_visual_tokens=64 --tasks gqa

All other `model_args` are those of the wrapper (`llava_hf`, `qwen2_5_vl`, `qwen3_vl`).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

from accelerate import PartialState
from lmms_eval.models.chat.llava_hf import LlavaHf
from lmms_eval.models.chat.qwen2_5_vl import Qwen2_5_VL
from lmms_eval.models.chat.qwen3_vl import Qwen3_VL
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.simple import llava_hf, qwen2_5_vl, qwen3_vl
from loguru import logger
from transformers import AutoConfig, PreTrainedModel

from ..modeling.modeling_fsr_llava import FSRLlavaForConditionalGeneration
from ..modeling.modeling_fsr_llava_next import FSRLlavaNextForConditionalGeneration
from ..modeling.modeling_fsr_llava_video import FSRLlavaVideoForConditionalGeneration
from ..modeling.modeling_fsr_qwen2_5_vl import FSRQwen2_5_VLForConditionalGeneration
from ..modeling.modeling_fsr_qwen3_vl import FSRQwen3VLForConditionalGeneration


__all__ = ["FSRLlava", "FSRLlavaNext", "FSRLlavaVideo", "FSRQwen2_5_VL", "FSRQwen3VL"]


class _GenerationError(BaseException):
    """No `Exception`: wrappers log those of `generate()` and score an empty answer."""


class _FSRMixin:
    """
    Comes before a wrapper of lmms-eval.

    Args:
        pretrained (`str`):
            A folder or Hub repository with FSR, made by `fsr-hf export`: its weights and settings, on the code of
            this package.
        num_visual_tokens (`int`, *optional*):
            Budget of each image or video, in place of the config's.
        retention_ratio (`float`, *optional*):
            The same as a share of its tokens. Not both.
        fsr_enabled (`bool`, *optional*):
            `False` evaluates the stock model.
        kwargs:
            The other arguments of the wrapper.

    Raises:
        `ValueError`: before the weights are loaded, if `pretrained` is of another family or has no FSR, or a budget is
            not allowed.
    """

    fsr_class: ClassVar[type[PreTrainedModel]]
    # Of the wrapper.
    model: Any
    rank: int

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | None = None,
        retention_ratio: float | None = None,
        fsr_enabled: bool | None = None,
        **kwargs: Any,
    ):
        revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
        config = AutoConfig.from_pretrained(pretrained, **revision)
        model_type = self.fsr_class.config_class.model_type
        if config.model_type != model_type:
            advice = (
                f"use --model {config.model_type}" if hasattr(config, "fsr_config") else "`fsr-hf export` makes them"
            )
            raise ValueError(
                f"`pretrained={pretrained}` is a checkpoint of the type {config.model_type}, and --model {model_type} "
                f"takes those of the type {model_type}: {advice}."
            )
        fsr_config = config.fsr_config.override(num_visual_tokens, retention_ratio, fsr_enabled)
        with self.in_place_of_stock():
            super().__init__(pretrained=pretrained, **kwargs)  # type: ignore[call-arg]
        self.model.config.fsr_config = fsr_config

    def in_place_of_stock(self) -> AbstractContextManager:
        """The wrapper loads `fsr_class`."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any]) -> list[Any]:
        """As the wrapper, but an error ends the run, and `throughput` of the results has the length of the prompts."""
        with self._counted() as lengths:
            try:
                results = super().generate_until(requests)  # type: ignore[misc]
            except _GenerationError as error:
                raise RuntimeError(f"The model failed: {error.__cause__}") from error.__cause__
        if not lengths:
            return results
        rows, prompts, read = (sum(column) for column in zip(*lengths))
        log_metrics(0.0, 0, 0.0, {"prompt_tokens": prompts / rows, "prompt_tokens_read": read / rows})
        if self.model.config.fsr_config.enabled and read >= prompts:
            logger.warning(
                "FSR pruned nothing: no image or video of these questions has more tokens than the budget "
                f"({_budget(self.model.config.fsr_config)})."
            )
        return results

    @contextmanager
    def _counted(self) -> Iterator[list[tuple[int, int, int]]]:
        """Of each call: rows, and tokens, with padding, of the caller's prompts and of what is read of them."""
        lengths: list[tuple[int, int, int]] = []
        read: list[int] = []
        model = self.model
        generate = model.generate

        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if not read:
                read.append(kwargs["inputs_embeds"].shape[1])

        def counted_generate(**inputs: Any) -> Any:
            read.clear()
            try:
                output = generate(**inputs)
            except Exception as error:
                raise _GenerationError from error
            rows, length = inputs["input_ids"].shape
            lengths.append((rows, rows * length, rows * read[0]))
            return output

        handle = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        model.generate = counted_generate
        try:
            yield lengths
        finally:
            handle.remove()
            del model.generate


def _budget(fsr_config: Any) -> str:
    names = ("num_visual_tokens", "retention_ratio")
    return ", ".join(f"{name}={value}" for name in names if (value := getattr(fsr_config, name)) is not None)


class _FSRLlavaHf(_FSRMixin, LlavaHf):
    def __init__(self, pretrained: str, device: str = "cuda", device_map: str = "", **kwargs: Any):
        # The wrapper's default, "", is refused by transformers 5. Several processes need it: each gets its own device.
        if device_map == "" and PartialState().num_processes == 1:
            device_map = device
        super().__init__(pretrained, device=device, device_map=device_map, **kwargs)

    def in_place_of_stock(self) -> AbstractContextManager:
        return patch.dict(llava_hf.model_map, {self.fsr_class.config_class.model_type: self.fsr_class})


class FSRLlava(_FSRLlavaHf):
    """`llava_hf` with LLaVA-1.5."""

    fsr_class = FSRLlavaForConditionalGeneration


class FSRLlavaNext(_FSRLlavaHf):
    """`llava_hf` with LLaVA-NeXT."""

    fsr_class = FSRLlavaNextForConditionalGeneration


class FSRLlavaVideo(_FSRLlavaHf):
    """`llava_hf` with LLaVA-Video, whose processor reads videos: `max_frames_num` frames of each, evenly spread."""

    fsr_class = FSRLlavaVideoForConditionalGeneration

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._image_processor.video_processor.num_frames = self.max_frames_num


class FSRQwen2_5_VL(_FSRMixin, Qwen2_5_VL):
    """`qwen2_5_vl`."""

    fsr_class = FSRQwen2_5_VLForConditionalGeneration

    def in_place_of_stock(self) -> AbstractContextManager:
        return patch.object(qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration", self.fsr_class)


class FSRQwen3VL(_FSRMixin, Qwen3_VL):
    """`qwen3_vl`."""

    fsr_class = FSRQwen3VLForConditionalGeneration

    def in_place_of_stock(self) -> AbstractContextManager:
        return patch.object(qwen3_vl, "_resolve_model_class", lambda *args: (self.fsr_class, "dtype"))
