"""What a benchmark is asked to measure, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moacompress.core.errors import DataError, MoaCompressError, UsageError, did_you_mean
from moacompress.core.files import fingerprint, read_json
from moacompress.core.tables import readable_bytes
from moacompress.models.weight_bytes import loaded_weight_bytes
from moacompress.rules.formats import DTYPE_BYTES, dtype_name
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan

SIDES = ("plan", "full_span", "dense", "dense_best")
DTYPES = ("float32", "bfloat16", "float16")
MOST_STEPS = 4096
"""Most decode steps of one turn: the cache's length is to stay about the same."""
SPARE_TOKENS = 2
"""Tokens beyond the measured steps that caches have room for: each turn begins with a step that is not timed."""
LIBRARY_BYTES = 600 * 2**20
"""What Python and the libraries take in a process, about."""


@dataclass(frozen=True)
class Cell:
    """One place of the table."""

    dtype: str
    length: int
    batch: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length:,} tokens, {self.dtype}"


@dataclass(frozen=True)
class BenchRequest:
    """What is measured, and how often.

    Attributes:
        lengths: tokens in the cache of every row.
        batches: rows.
        dtypes: of weights and cache; "auto" is the checkpoint's.
        sides: some of `SIDES`.
        tokens: decode steps that are timed as one.
        repeats: turns of decoding, each side once in every turn.
        prefill_repeats: turns of prefilling; 0 for none.
        compile: also compile the decode step of `plan` and `full_span`.
        peak: measure peak memory, each side in a process of its own.
        trace: trace the decode steps of `plan`, in turns of their own.
        seed: of prompts and of what is in the caches.
        device: torch device.
    """

    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    dtypes: tuple[str, ...]
    sides: tuple[str, ...] = SIDES
    tokens: int = 16
    repeats: int = 20
    prefill_repeats: int = 3
    compile: bool = False
    peak: bool = True
    trace: bool = False
    seed: int = 0
    device: str = "cpu"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtypes", tuple(map(dtype_name, self.dtypes)))
        check_choices("side", self.sides, SIDES)
        check_choices("dtype", self.dtypes, ("auto", *DTYPES))
        if self.trace and ("plan" not in self.sides or self.compile):
            raise UsageError(
                "--trace is of steps under the plan: it goes with plan among --sides, and without --compile"
            )
        check_numbers("length", self.lengths, 1)
        check_numbers("batch", self.batches, 1)
        check_numbers("tokens", (self.tokens,), 1, MOST_STEPS)
        check_numbers("repeats", (self.repeats,), 1)
        check_numbers("prefill-repeats", (self.prefill_repeats,), 0)

    def cells(self) -> Iterator[Cell]:
        """Yields all places of the table, those of one dtype together."""
        for dtype in self.dtypes:
            for length in self.lengths:
                for batch in self.batches:
                    yield Cell(dtype, length, batch)

    def resolved(self, shape: ModelShape) -> BenchRequest:
        """Returns the request with the checkpoint's dtype in place of "auto"."""
        dtypes = (shape.dtype if dtype == "auto" else dtype for dtype in self.dtypes)
        return replace(self, dtypes=tuple(dict.fromkeys(dtypes)))

    def configuration(self, plan: Plan, folder: Path) -> dict[str, Any]:
        """Returns all that the measurements depend on but the machine, as JSON values."""
        config = read_json(folder / "config.json", "config")
        names = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "architectures")
        sizes = {name: config.get(name) for name in names}
        asked = {name: value for name, value in asdict(self).items() if name != "trust_remote_code"}
        return {"plan": plan.key(), "model": fingerprint(sizes), **asked}


def text_config(folder: Path) -> dict[str, Any]:
    """Returns the part of a checkpoint's config that describes its language model."""
    config = read_json(folder / "config.json", "config")
    return dict(config.get("text_config", config)) if isinstance(config, dict) else {}


def context_below(folder: Path, longest: int) -> int | None:
    """Returns the tokens that a model was made for, where those are fewer than `longest`; otherwise None."""
    context = text_config(folder).get("max_position_embeddings")
    return context if isinstance(context, int) and 0 < context < longest else None


def check_fits(request: BenchRequest, plan: Plan, folder: Path, available: int) -> None:
    """Refuses lengths that the model was not made for, and what `available` bytes of memory would not hold.

    Raises:
        DataError: a length beyond the model's context.
        MoaCompressError: too little memory; says how much it would take.
    """
    longest = max(request.lengths)
    context = context_below(folder, longest)
    if context is not None:
        raise DataError(f"a length of {longest:,} tokens was asked for; the model was made for at most {context:,}")
    needed, cell = largest_cell(request, plan, folder)
    if needed > available:
        raise MoaCompressError(
            f"{cell} would take about {readable_bytes(needed)} of memory (weights, and a cache for each side), and "
            f"{readable_bytes(available)} is available; choose shorter --lengths, smaller --batch, or fewer --sides"
        )


def largest_cell(request: BenchRequest, plan: Plan, folder: Path) -> tuple[int, Cell]:
    """Returns about how many bytes of memory it takes to measure the cell that needs most, and that cell."""
    config = text_config(folder)
    wide = max(int(config.get(name) or 0) for name in ("hidden_size", "intermediate_size"))
    weights = {dtype: loaded_weight_bytes(folder, dtype) for dtype in {cell.dtype for cell in request.cells()}}

    def needed(cell: Cell) -> int:
        own, room = plan.in_dtype(cell.dtype), cell.length + request.tokens + SPARE_TOKENS
        dense, ours = own.model.dense_kv_bytes(room, cell.batch), own.kv_bytes(room, cell.batch)
        # the dense cache is built again by every step, beside the one that each turn begins with
        held = {"plan": ours, "full_span": dense, "dense": 2 * dense, "dense_best": dense}
        decode = sum(held[side] for side in {*request.sides, *(("dense",) if "dense_best" in request.sides else ())})
        states = 6 * cell.batch * cell.length * wide * DTYPE_BYTES[cell.dtype]
        prefill = dense + states if request.prefill_repeats or request.peak else 0
        alone = weights[cell.dtype] + LIBRARY_BYTES if request.peak else 0
        return LIBRARY_BYTES + weights[cell.dtype] + max(decode, prefill + alone)

    largest = max(request.cells(), key=needed)
    return needed(largest), largest


def check_choices(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuses names that are not known, and none at all.

    Raises:
        UsageError: says which there are.
    """
    if not given:
        raise UsageError(f"no {what} given; choose from {', '.join(known)}")
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known, f"it is one of {', '.join(known)}")
            raise UsageError(f"unknown {what} {name!r}; {hint}")


def check_numbers(what: str, given: Sequence[int], least: int, most: int | None = None) -> None:
    """Refuses numbers out of bounds, and none at all.

    Raises:
        UsageError: names the number and its bounds.
    """
    if not given:
        raise UsageError(f"no {what} given")
    for number in given:
        if number < least or (most is not None and number > most):
            bound = f"at least {least}" if most is None else f"{least} to {most:,}"
            raise UsageError(f"{what} is {number}; it must be {bound}")
