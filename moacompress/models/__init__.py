"""Source models: loading MODEL, its shape and fingerprint, its weight files, and whether it can be compressed.

Nothing here knows of plans that run, of recipes or of calibration.
"""

from moacompress.models.source import SourceModel, load_source, model_shape

__all__ = ["SourceModel", "load_source", "model_shape"]
