"""Perdure: the durable state plane of LLM services.

`perdure.open(url)` and `perdure.blocking(url)` open a store in your own program.
"""

from perdure.library import blocking, open

__version__ = "0.1.0"

__all__ = ["__version__", "blocking", "open"]
