"""Shapes-VQA: questions about drawn scenes, and the small LLaVA that is trained on them."""
