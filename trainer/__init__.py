"""The trainer: a folder of pictures becomes a model package."""

__version__ = "0.2.0"
