"""Processors: what turns a conversation and its images into the inputs of a model."""

from .processing_fsr_llava import FSRLlavaProcessor
from .processing_fsr_llava_next import FSRLlavaNextProcessor
from .processing_fsr_llava_video import FSRLlavaVideoProcessor


__all__ = ["FSRLlavaNextProcessor", "FSRLlavaProcessor", "FSRLlavaVideoProcessor"]
