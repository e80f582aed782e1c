"""What is settled when vLLM reads its options: what is refused, and how much of a prompt a step computes.

Freed memory only serves others if prompts do not fill it: vLLM gives a chunk of a prompt all its blocks before anything of it
is freed. Where the user set no `--long-prefill-token-threshold` it is set here, so that a prompt beside other sequences comes
in short chunks; vLLM lets a lone one fill the whole step, so its time to the first token stays.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

from moacompress.core.errors import UnsupportedError, UsageError
from moacompress.rules.windows import BLOCK
from moacompress.serving.vllm.classes import MOST_CLASSES
from moacompress.serving.vllm.served_plan import ServedPlan

logger = init_logger("vllm.moacompress")

CHUNK = 256
"""Tokens of a prompt that a step computes at most, beside other sequences."""


class Options(BaseModel):
    """What users may set of the plugin: `--additional-config '{"moacompress": {"classes": 12}}'`.

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


def refuse(vllm_config: VllmConfig) -> None:
    """Refuses options under which a plan cannot be served, in one sentence.

    Raises:
        UnsupportedError: which, and what to do.
        UsageError: the plugin's own options are wrong.
    """
    from vllm.platforms import current_platform

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    asked = (
        (not current_platform.is_cpu(), "on anything but CPUs", "serve it on a CPU, or with `transformers serve`"),
        (
            parallel.world_size > 1,
            "by tensor or pipeline parallel workers",
            "leave out --tensor-parallel-size and the like",
        ),
        (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"with a quantized KV cache beside ({cache.cache_dtype})",
            "leave out --kv-cache-dtype: a plan has formats of its own",
        ),
        (
            cache.user_specified_block_size and cache.block_size != BLOCK,
            f"with cache blocks of {cache.block_size} tokens",
            f"leave out --block-size: a plan's blocks have {BLOCK}",
        ),
        (model.use_mla, "with latent attention (MLA)", "export a model that caches keys and values"),
        (
            vllm_config.speculative_config is not None and vllm_config.speculative_config.method != "ngram",
            "with drafts of another model",
            "draft by n-grams, or leave out --speculative-config",
        ),
        (
            vllm_config.speculative_config is not None and _selects(model),
            "with drafts where its gates choose tokens",
            "leave out --speculative-config: what a rejected draft has replaced is gone",
        ),
        (
            vllm_config.kv_transfer_config is not None or cache.kv_offloading_size is not None,
            "with a KV connector",
            "leave out --kv-transfer-config and --kv-offloading-size",
        ),
        (
            model.using_transformers_backend(),
            "where vLLM runs a model by transformers' code (`--model-impl transformers`, or a family that it has no code of)",
            "serve it with `transformers serve`",
        ),
        (
            vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True,
            "without the hybrid KV cache manager",
            "leave out --disable-hybrid-kv-cache-manager",
        ),
    )
    for is_asked, how, instead in asked:
        if is_asked:
            raise UnsupportedError(f"a checkpoint with a plan is not served {how}; {instead}")
    options_of(vllm_config)


def _selects(model_config: Any) -> bool:
    """Whether gates choose tokens under a checkpoint's plan.

    Raises:
        PlanError, UnsupportedError: as `ServedPlan.read`, which vLLM asks only later.
    """
    return ServedPlan.read(getattr(model_config.hf_config, "quantization_config", {})).plan.selects


def leave_out_prefixes(vllm_config: VllmConfig) -> None:
    """Switches the prefix cache off where gates choose tokens, and says so: vLLM does not tell a default from a wish."""
    cache = vllm_config.cache_config
    if cache.enable_prefix_caching and _selects(vllm_config.model_config):
        cache.enable_prefix_caching = False
        logger.warning(
            "the prefix cache is off: gates choose tokens under this plan, and what they chose of a prefix is not kept "
            "(--no-enable-prefix-caching leaves this line out)"
        )


def limit_chunks(vllm_config: VllmConfig) -> None:
    """Sets how much of a prompt a step computes beside other sequences, where nobody else did."""
    scheduler = vllm_config.scheduler_config
    if scheduler.long_prefill_token_threshold == 0 and scheduler.enable_chunked_prefill:
        scheduler.long_prefill_token_threshold = min(CHUNK, vllm_config.model_config.max_model_len)
        logger.info(
            "prompts are computed by %d tokens a step beside other requests, so that what a plan frees serves them "
            "(--long-prefill-token-threshold sets another number)",
            scheduler.long_prefill_token_threshold,
        )


def check_weights(vllm_config: VllmConfig) -> None:
    """Has vLLM read safetensors alone, and refuse a checkpoint that lacks weights, which by itself it does of dense ones."""
    load = vllm_config.load_config
    if load.load_format in ("auto", "hf"):
        load.load_format = "safetensors"  # a pickle can run code when it is opened
    extra = load.model_loader_extra_config
    if load.load_format == "safetensors" and isinstance(extra, dict):
        load.model_loader_extra_config = {"enable_weights_track": True, **extra}


def in_flight(vllm_config: VllmConfig) -> int:
    """Returns how many tokens of a sequence are computed at most, beside other sequences, before what they free is freed."""
    scheduler = vllm_config.scheduler_config
    chunk = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
    if scheduler.long_prefill_token_threshold_adaptive:  # an even share, of two sequences or more
        chunk = max(chunk, scheduler.max_num_batched_tokens // 2)
    return int(min(chunk * vllm_config.max_concurrent_batches, vllm_config.max_in_flight_tokens))


def register() -> None:
    """Has vLLM ask here too when it reads its options for a model; a model without a plan is left as it is."""
    for architecture in ModelRegistry.get_supported_archs():
        before = MODELS_CONFIG_MAP.get(architecture, VerifyAndUpdateConfig)
        if not issubclass(before, _Asked):
            MODELS_CONFIG_MAP[architecture] = type(before.__name__, (_Asked, before), {})


class _Asked(VerifyAndUpdateConfig):
    """Goes on to what vLLM has for the architecture itself."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        if vllm_config.model_config.quantization == "moacompress":
            refuse(vllm_config)
            leave_out_prefixes(vllm_config)
            limit_chunks(vllm_config)
            check_weights(vllm_config)
        super().verify_and_update_config(vllm_config)
