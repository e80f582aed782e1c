"""A backend of another package: here the reference under another name."""

from __future__ import annotations

from moacompress.kernels.reference.reference_backend import ReferenceBackend


class CountedBackend(ReferenceBackend):
    """The reference, as kernels of another package would stand before ours."""

    name = "counted"
