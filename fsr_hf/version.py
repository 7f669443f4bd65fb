"""The version of the package. The build reads it here, and so do modules that `__init__` imports."""

__all__ = ["__version__"]

__version__ = "0.2.0"
