"""Processors: what turns a conversation and its images into the inputs of a model."""

from .processing_fsr_llava import FSRLlavaProcessor


__all__ = ["FSRLlavaProcessor"]
