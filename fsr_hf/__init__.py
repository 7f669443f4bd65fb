"""Focus-Scan-Refine visual-token pruning for vision-language models of transformers."""

__version__ = "0.1.0"
