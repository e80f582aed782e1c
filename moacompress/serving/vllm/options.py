"""What users may set of the plugin: `--additional-config '{"moacompress": {"classes": 12}}'`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moacompress.core.errors import UsageError
from moacompress.serving.vllm.classes import MOST_CLASSES


class Options(BaseModel):
    """The plugin's options.

    Attributes:
        classes: classes of KV heads at most. More hold less memory, and take more time in every step.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    classes: int = Field(default=MOST_CLASSES, ge=1)


def options_of(vllm_config: Any) -> Options:
    """Returns the options in vLLM's.

    Raises:
        UsageError: one that there is not, or a value that it cannot have.
    """
    given = vllm_config.additional_config
    try:
        return Options.model_validate(given.get("moacompress", {}) if isinstance(given, dict) else {})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "moacompress"
        raise UsageError(
            f"--additional-config: {name} of moacompress: {first['msg']}; there is `classes`, at least 1"
        ) from error
