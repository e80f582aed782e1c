"""A plugin of vLLM: checkpoints that moacompress exported are served under their plans.

vLLM calls `register` in each of its processes, whatever model it serves. Only a checkpoint whose config.json names moacompress
as its quantization method comes to anything else here.
"""

from __future__ import annotations

VLLM_MINORS = ("0.32",)
"""Minor versions of vLLM whose inner interfaces the plugin was made for and is tested with."""


def register() -> None:
    """Makes vLLM know of checkpoints with plans; the entry point `vllm.general_plugins` names it."""
    from vllm.version import __version__ as version

    if ".".join(version.split(".")[:2]) not in VLLM_MINORS:
        from moacompress.serving.vllm.base_config import register_refusal

        register_refusal(version)
        return
    from moacompress.serving.vllm import config, scheduling, spec  # of inner names that other versions may lack

    spec.register()
    config.register()
    scheduling.register()
