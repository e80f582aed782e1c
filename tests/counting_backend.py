"""A backend that is none of the product's: the reference, counting what it is asked for.

The test matrix runs it beside the product's own, so that a new backend needs nothing but to be registered. With
`MOACOMPRESS_TEST_BACKEND=counting` all tests run on it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from moacompress.kernels.reference.reference_backend import ReferenceBackend


class CountingBackend(ReferenceBackend):
    """The reference under another name.

    Attributes:
        calls: how often each call was made.
    """

    name = "counting"

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def decode(self, *arguments: Any, **rest: Any) -> Any:
        self.calls["decode"] += 1
        return super().decode(*arguments, **rest)

    def prefill(self, *arguments: Any, **rest: Any) -> Any:
        self.calls["prefill"] += 1
        return super().prefill(*arguments, **rest)
