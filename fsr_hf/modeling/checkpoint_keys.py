"""Old names of weights: transformers knows them for stock classes alone, so each FSR class takes over its base's."""

from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


__all__ = ["register_stock_keys"]


def register_stock_keys(cls: type, stock: str, more: tuple = ()) -> None:
    """
    Let `cls` load checkpoints in the layouts of `stock`, a `model_type` or the name of a class, and by the conversions
    `more`. Without this an old checkpoint leaves weights random, with no more than a warning.
    """
    conversions = [*more, *(get_checkpoint_conversion_mapping(stock) or ())]
    register_checkpoint_conversion_mapping(cls.__name__, conversions, overwrite=True)
