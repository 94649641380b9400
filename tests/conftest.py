"""What every test runs under: property tests that repeat exactly, and no clock that fails them."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("repeat", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2_000)
settings.load_profile(os.environ.get("PERDURE_HYPOTHESIS", "repeat"))
