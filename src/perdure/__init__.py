"""Perdure: the durable state plane of LLM services."""

__version__ = "0.1.0"
