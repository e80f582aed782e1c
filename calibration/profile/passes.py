"""Forward and backward passes of one sample through a real model whose attention feeds collectors.

A `Tape` reads a sample once; any number of backward passes start from it. Only the rows that predict targets pass the
output layer, a chunk of them at a time, so that no tensor of size N x vocabulary exists. Long samples keep each decoder
layer's input alone and run the layer again on the way back; so do all samples where weights are offloaded, which would
otherwise stay in memory until then.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from moacompress.calibration.data.samples import Sample
from moacompress.calibration.profile.choices import choosing
from moacompress.calibration.profile.influence import ProfiledAttention
from moacompress.calibration.profile.sharing import Attended
from moacompress.calibration.profile.tiles import AttentionSpec, Collector, GradientCollector
from moacompress.core.errors import ModelError
from moacompress.kernels.arguments import Choices
from moacompress.models.modules import decoder_layers
from moacompress.models.placement import input_device, is_offloaded
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.key_centres import Centres, centre_numbers
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable

if TYPE_CHECKING:
    from moacompress.calibration.profile.centres import KeyMeans

ATTENTION = "moacompress_profile"
"""Name of the profiling attention among transformers' attention functions."""
CHUNK_LOGITS = 1 << 24
"""Numbers in the logits that are worked on at a time."""
KEEP_TOKENS = 1536
"""Longest sample whose layers keep all that their backward pass needs; longer ones run each layer twice."""

Cotangent = Callable[[Tensor, slice], Tensor]
"""From logits `[rows, vocabulary]` of a chunk, and which rows they are, to a cotangent of the same shape."""


@dataclass(frozen=True)
class Recording:
    """What the attention layers of one forward pass need.

    Attributes:
        table: the rules.
        native_windows: the model's own window of every layer.
        collectors: of every layer; each backward pass may put others into these very lists.
        attended: what every layer attended with, kept until the tape ends; None to keep nothing.
        values: whether that has the values too.
        gates: of the layers, where rules select.
        choices: what rules choose in every layer, kept until the tape ends.
        centres: what keys of every layer lie less, float32 `[kv_heads, head_dim]`, or None.
        means: takes in the keys, or None.
    """

    table: RuleTable
    native_windows: tuple[int | None, ...]
    collectors: tuple[list[Collector | GradientCollector], ...]
    attended: dict[int, Attended] | None = None
    values: bool = False
    gates: GateWeights | None = None
    choices: dict[int, Choices | None] = field(default_factory=dict)
    centres: tuple[Tensor | None, ...] = ()
    means: KeyMeans | None = None

    @staticmethod
    def of(
        shape: ModelShape,
        table: RuleTable,
        keep: bool = False,
        values: bool = False,
        gates: GateWeights | None = None,
        heads: range | None = None,
        centres: Centres = (),
        means: KeyMeans | None = None,
    ) -> Recording:
        """Returns a recording without collectors; with `keep` it keeps queries and keys, with `values` the values too.

        It is of the KV heads `heads` where a rank has no others; gates and centres are of all.
        """
        own = slice(None) if heads is None else slice(heads.start, heads.stop)
        rows = [centre_numbers(row[own], shape.head_dim) for row in centres]
        if heads is not None and gates is not None and len(heads) < shape.kv_heads:
            gates = gates.of_heads(heads)
        collectors: tuple[list[Collector | GradientCollector], ...] = tuple([] for _ in range(shape.layers))
        return Recording(
            table,
            shape.native_windows,
            collectors,
            {} if keep or values else None,
            values,
            gates,
            centres=tuple(None if row is None else torch.from_numpy(row) for row in rows),
            means=means,
        )


_recording: ContextVar[Recording] = ContextVar("moacompress_recording")


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in each layer."""
    if attention_mask is not None or kwargs.get("position_bias") is not None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} attends with a mask or bias of its own; only causal attention can be profiled"
        )
    recording, layer = _recording.get(), int(module.layer_idx)  # type: ignore[arg-type]
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        native_window=recording.native_windows[layer],
        softcap=softcap,
    )
    if recording.means is not None and not softcap:  # bounds on scores are of what they are in absolute terms
        recording.means.add(layer, key)
    centre = recording.centres[layer] if recording.centres else None
    centre = None if centre is None else centre.to(key.device)
    if recording.attended is not None:
        kept = value.detach() if recording.values else None
        recording.attended[layer] = Attended(query.detach(), key.detach(), s_aux, spec, kept)
    out: Tensor = ProfiledAttention.apply(  # type: ignore[no-untyped-call]
        query,
        key,
        value,
        s_aux,
        spec,
        recording.table,
        recording.collectors[layer],
        recording.choices.get(layer),
        centre,
    )
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function beside `_attention`, which needs none: a sample is one row without padding."""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


@contextmanager
def attending_as(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Lets the dense model attend by a registered attention function of transformers, and puts everything back."""
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = name
        yield
    finally:
        for config, own in before:
            config._attn_implementation = own


@contextmanager
def recorded(model: PreTrainedModel, recording: Recording) -> Iterator[None]:
    """Lets the model attend as `recording` says, and puts everything back."""
    token = _recording.set(recording)
    try:
        tables, windows = recording.table.in_layer, recording.native_windows
        with (
            attending_as(model, ATTENTION),
            choosing(model, recording.gates, lambda layer: tables(windows[layer]), recording.choices),
        ):
            yield
    finally:
        _recording.reset(token)


@contextmanager
def replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Gives one module another `forward` for the block's length."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Lets no weight ask for a gradient: a backward pass then keeps what the way to the inputs needs, and no more."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Lets every decoder layer keep its input alone; a backward pass runs it again.

    Where weights are offloaded it runs it to the end, or the last ones would not be put back.
    """

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            context = contextvars.copy_context()  # the backward pass may run in a thread of its own
            return checkpoint(
                lambda *inputs: context.run(forward, *inputs, **kwargs),
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
            )

        return run

    with ExitStack() as stack:
        stack.enter_context(set_checkpoint_early_stop(not is_offloaded(model)))
        for layer in decoder_layers(model):
            stack.enter_context(replaced(layer, twice(layer.forward)))
        yield


def hidden_states(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """Returns what the output layer would get, `[1, N, hidden]`, from embeddings `[1, N, hidden]`."""
    states: Tensor = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return states.to(embeddings.device)  # of a model on several devices the last layer has another


def target_states(model: PreTrainedModel, ids: Tensor, rows: Tensor) -> Tensor:
    """Returns what the output layer gets at some positions, `[rows, hidden]`, without a way back.

    `ids` and `rows` are int64, `[N]` and positions among them.
    """
    return read_through(model, ids)[0, rows]


def read_through(model: PreTrainedModel, ids: Tensor | npt.NDArray[np.int64]) -> Tensor:
    """Returns what the output layer gets of one row of tokens, `[1, N, hidden]`, without a way back.

    `ids` are int64 `[N]`, on any device.
    """
    with torch.no_grad():
        tokens = torch.as_tensor(ids, dtype=torch.int64, device=input_device(model))
        return hidden_states(model, model.get_input_embeddings()(tokens[None]))


def all_attended(model: PreTrainedModel, shape: ModelShape, ids: Tensor | npt.NDArray[np.int64]) -> dict[int, Attended]:
    """Returns what every layer of a dense model attends with on one row of tokens, values too.

    `ids` are int64 `[N]`, on any device.
    """
    recording = Recording.of(shape, RuleTable.of([Rule.FULL], 1), values=True)
    with recorded(model, recording):
        read_through(model, ids)
    assert recording.attended is not None
    return recording.attended


def output_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Returns the logits of hidden states `[rows, hidden]`, as the model's own forward makes them: `[rows, vocabulary]`."""

    def given(*args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=hidden[None])

    with replaced(model.base_model, given):
        logits: Tensor = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
    return logits


def tokens_and_rows(model: PreTrainedModel, sample: Sample) -> tuple[Tensor, Tensor]:
    """Returns a sample's tokens and its target rows, int64 `[N]` and `[targets]`, where the model begins."""
    device = input_device(model)
    return torch.from_numpy(sample.input_ids).to(device), torch.from_numpy(sample.target_rows).to(device)


def answer_logits(model: Any, sample: Sample) -> torch.Tensor:
    """Returns the logits that predict the answer tokens, float32 [answer tokens, vocabulary].

    Only those rows go through the language-model head.
    """
    ids, rows = tokens_and_rows(model, sample)
    with torch.inference_mode():
        return output_logits(model, target_states(model, ids, rows)).float()


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Returns the slices of rows whose logits are worked on at a time."""
    size = max(1, CHUNK_LOGITS // vocabulary)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class Tape:
    """A sample's forward pass, from which backward passes start. A context manager: the model is as before afterwards.

    The model is any causal LM that dispatches its attention; its weights are frozen meanwhile. `ids` are int64 `[N]`, and
    `rows`, int64 `[targets]`, the positions whose logits predict a target.

    Attributes:
        hidden: what the output layer gets at `rows`, `[targets, hidden]`, detached.
    """

    def __init__(self, model: PreTrainedModel, recording: Recording, ids: Tensor, rows: Tensor) -> None:
        self._model, self._recording = model, recording
        self._ids, self._rows = ids, rows
        self._vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self._stack = ExitStack()

    def __enter__(self) -> Tape:
        with self._stack:
            self._stack.enter_context(torch.enable_grad())
            self._stack.enter_context(frozen(self._model))
            self._stack.enter_context(recorded(self._model, self._recording))
            if self._recording.attended is not None:
                self._stack.callback(self._recording.attended.clear)
            self._stack.callback(self._recording.choices.clear)
            if len(self._ids) > KEEP_TOKENS or is_offloaded(self._model):
                self._stack.enter_context(checkpointed(self._model))
            self._embeddings = self._model.get_input_embeddings()(self._ids[None]).detach().requires_grad_()
            self._states = hidden_states(self._model, self._embeddings)[0, self._rows]
            self.hidden = self._states.detach()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        del self._states, self._embeddings
        self._stack.close()

    def backward(
        self, cotangent: Cotangent, collectors: Sequence[Sequence[Collector | GradientCollector]], last: bool
    ) -> None:
        """Runs one backward pass from the logits down to the embeddings.

        The cotangent is called for every chunk of rows, in order; `collectors` are those of every layer. With `last` no other
        pass follows, so that memory is freed on the way.
        """
        for held, wanted in zip(self._recording.collectors, collectors, strict=True):
            held[:] = wanted
        pulled = torch.zeros_like(self.hidden)
        for part in chunks(len(self.hidden), self._vocabulary):
            hidden = self.hidden[part].clone().requires_grad_()
            logits = output_logits(self._model, hidden)
            (pulled[part],) = torch.autograd.grad(logits, hidden, cotangent(logits.detach(), part))
        torch.autograd.grad(self._states, self._embeddings, pulled, retain_graph=not last)
