"""Times and memory of the parts that profiling is made of, from short passes of the real model and a tile of attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from moacompress.calibration.gates.training import LAG, fitted_together
from moacompress.calibration.profile.choices import choices_of
from moacompress.calibration.profile.collectors import BaselineSums, InfluenceSums, TokenSums
from moacompress.calibration.profile.head_statistics import HeadSums
from moacompress.calibration.profile.influence import TILE, attend, attend_backward
from moacompress.calibration.profile.passes import Cotangent, Recording, Tape, checkpointed, chunks, output_logits
from moacompress.calibration.profile.profiler import rules_on_offer
from moacompress.calibration.profile.sample_statistics import fisher_cotangent
from moacompress.calibration.profile.sharing import Attended, CopySums, copyable
from moacompress.calibration.profile.tiles import Collector
from moacompress.estimate.live_bytes import Line, LiveBytes
from moacompress.estimate.rates import REPEATS, Rates
from moacompress.kernels.arguments import Choices
from moacompress.models.placement import input_device
from moacompress.models.source import SourceModel
from moacompress.models.weight_bytes import resident_bytes
from moacompress.recipe import Recipe
from moacompress.recipe_sections import ProfileRecipe
from moacompress.rules.plan import Plan
from moacompress.rules.rule import Rule
from moacompress.rules.rule_table import RuleTable
from moacompress.runtime.compat.alternates import cache_argument

T = TypeVar("T")

SHORT = (128, 192)
"""Tokens of the short passes."""
PRIME = (73, 157)
"""As `SHORT`, but primes, each before twice a prime: a tensor's size tells whether it is one of pairs of tokens."""
ATTEND_TOKENS = 2048
"""Longest sequence whose whole forward attention is timed."""


class Gathered(NamedTuple):
    """What a backward pass gathers beside the influence; or `tokens`, the influence of single tokens, instead of all that."""

    baselines: bool = False
    copies: bool = False
    heads: bool = False
    tokens: bool = False

    @staticmethod
    def of(chosen: ProfileRecipe, around: bool) -> Counter[Gathered]:
        """Returns how many passes of each kind a sample takes."""
        copies = chosen.anchors > 0
        found = Counter({Gathered(copies=copies, heads=chosen.heads): 1})
        found[Gathered(copies=copies)] += chosen.draws - 1
        found[Gathered(baselines=True)] += int(chosen.baselines)
        found[Gathered()] += int(around)
        return +found


class _LayerKind(NamedTuple):
    """What decides how long a layer's attention takes: its window, whether it has a plan, the anchors it is tried with."""

    window: int | None
    planned: bool
    anchors: int


class AttentionSeconds(NamedTuple):
    """Seconds of one layer's attention in the passes of a sample, its forward pass left out.

    Attributes:
        choosing: of finding out what rules that select choose, once a sample.
        idle: of a backward pass without any tile.
        tiles: of a mean tile of every kind of pass.
    """

    choosing: float
    idle: float
    tiles: dict[Gathered, float]


class Probe(Rates):
    """Times and counts what the estimate of a profile is made of, from short passes and from attention at full length.

    Args:
        source: the model.
        recipe: the run.
        around: the plan to profile around, or None.

    Attributes:
        around: as given.
        passes: how many backward passes of each kind a sample takes.
        of_gates: how many a sample that gates are trained on takes; none where none are trained.
        weight_bytes: of the weights, packed forms included.
    """

    def __init__(self, source: SourceModel, recipe: Recipe, around: Plan | None) -> None:
        device = input_device(source.model)
        super().__init__(device)
        self._model, self._shape, self.around = source.model, source.shape, around
        chosen = recipe.profile
        self.weight_bytes = resident_bytes(source.model)
        self._table, self._device = RuleTable.of(rules_on_offer(recipe, around), chosen.min_window), device
        self._plans = Recording.of(source.shape, self._table, around).plans
        self._allowed = copyable(source.shape.native_windows, chosen.anchors).tolist()
        self._kinds = [
            _LayerKind(window, plan is not None, sum(may))
            for window, plan, may in zip(source.shape.native_windows, self._plans, self._allowed, strict=True)
        ]
        self._attention: dict[int, list[AttentionSeconds]] = {}
        self.passes = Gathered.of(chosen, around is not None)
        trained = chosen.draws if chosen.gates and around is None else 0
        self.of_gates = +Counter({Gathered(tokens=True): trained})
        vocabulary = int(source.model.config.get_text_config(decoder=True).vocab_size)
        self._chunk: int = chunks(vocabulary, vocabulary)[0].stop
        generator = torch.Generator().manual_seed(recipe.seed)
        self._ids = torch.randint(vocabulary, (SHORT[-1],), generator=generator).to(device)
        kept = Recording.of(source.shape, self._table, keep=True)
        with self._tape(kept, SHORT[-1]) as tape:
            self._hidden, self._attended = tape.hidden, dict(kept.attended or {})

    def _forward(self, tokens: int) -> float:
        return self.beside[0] * tokens + sum(self._of_layers(self._forward_attention, tokens))

    @torch.no_grad()
    def _step(self, tokens: int) -> float:
        cache = DynamicCache(config=self._model.config)
        for layer, attended in sorted(self._attended.items()):
            key = _stretched(attended, tokens).key
            cache.update(key, key, layer)
        token: dict[str, Any] = {"input_ids": self._ids[None, :1], "use_cache": True, **cache_argument(cache)}
        return self._timed(lambda: self._model(**token))

    @cached_property
    def beside(self) -> tuple[float, float]:
        """Seconds a token of everything but attention and the output layer, forward and backward."""
        n = SHORT[-1]
        forward, backward = zip(*(self._short_pass(n) for _ in range(REPEATS)), strict=True)
        windows = self._shape.native_windows
        long = {window: _stretched(self._attended[layer], n) for layer, window in enumerate(windows)}
        ahead = {window: self._timed(partial(_forward, one)) for window, one in long.items()}
        back = {window: self._timed(partial(_backward, one, n, self._table, [])) for window, one in long.items()}
        attended = sum(ahead[window] for window in windows), sum(back[window] for window in windows[:-1])
        found = min(forward) - attended[0], min(backward) - attended[1] - self.output_seconds(1)
        return max(0.0, found[0]) / n, max(0.0, found[1]) / n

    def _short_pass(self, n: int) -> tuple[float, float]:
        """Returns the seconds of `n` tokens forward, and of their backward pass with nothing gathered."""
        with ExitStack() as stack:
            opened = self._tape(Recording.of(self._shape, self._table), n)
            forward, tape = self.watch.once(lambda: stack.enter_context(opened))
            nothing: list[list[Collector]] = [[]] * self._shape.layers
            backward, _ = self.watch.once(lambda: tape.backward(self._cotangent(1), nothing, last=True))
        return forward, backward

    @cached_property
    def gate_groups(self) -> int:
        """In how many goes over their samples gates are fitted."""
        return len(fitted_together(self._model))

    def choice_bytes(self, length: int) -> int:
        """Returns the bytes of what rules choose in all layers of a sample, which are kept until its passes end."""
        ways = {(rule.sink, rule.select_alpha, rule.select_beta_q) for rule in self._table.rules if rule.selects}
        own = int(self.around is not None and self.around.selects)
        layers = self._shape.native_windows.count(None)
        return 4 * layers * self._shape.kv_heads * (len(ways) + own) * length

    def attention(self, length: int) -> list[AttentionSeconds]:
        """Returns the seconds of every layer's attention in the passes of a sample; a length is timed once."""
        if length not in self._attention:
            self._attention[length] = self._of_layers(self._sample_attention, length)
        return self._attention[length]

    def _of_layers(self, timed: Callable[[int, int], T], length: int) -> list[T]:
        """Returns what is timed of every layer; layers of one kind are timed once."""
        first = {kind: layer for layer, kind in reversed(list(enumerate(self._kinds)))}
        found = {kind: timed(layer, length) for kind, layer in first.items()}
        return [found[kind] for kind in self._kinds]

    def _forward_attention(self, layer: int, length: int) -> float:
        window, whole = self._kinds[layer].window, min(length, ATTEND_TOKENS)
        attended = replace(self._attended[layer], plan=self._plans[layer])
        chosen = self._choices(window, attended.plan, whole)
        work = partial(_forward, _stretched(attended, whole), None if chosen is None else chosen.own)
        return self._timed(work) * _pairs(length, window) / _pairs(whole, window)

    def _sample_attention(self, layer: int, length: int) -> AttentionSeconds:
        window, anchors = self._kinds[layer].window, self._kinds[layer].anchors
        whole = min(length, ATTEND_TOKENS)
        attended = replace(self._attended[layer], plan=self._plans[layer])
        keys = min(length, round(_pairs(length, window) / length) + TILE // 2)
        mean, choose = _stretched(attended, keys), partial(self._choices, window, attended.plan)
        chosen = choose(keys)
        idle = self._timed(partial(_backward, mean, 0, self._table, []))
        choosing = 0.0 if chosen is None else self._timed(partial(choose, whole)) * length / whole
        tiles = {}
        for wanted in (*self.passes, *self.of_gates):
            collectors = self._collectors(wanted, dict.fromkeys(range(anchors + 1), mean), anchors, [True] * anchors)
            table, choices = (_FULL, None) if wanted.tokens else (self._table, chosen)
            busy = self._timed(partial(_backward, mean, TILE, table, collectors, choices))
            tiles[wanted] = max(0.0, busy - idle)
        return AttentionSeconds(choosing, idle * length / keys, tiles)

    def _choices(self, window: int | None, plan: RuleTable | None, n: int) -> Choices | None:
        """Returns what rules choose by random scores of `n` tokens; budgets are exact, so that any scores take as long."""
        scores = torch.randint(-999, 999, (self._shape.kv_heads, n), generator=torch.Generator().manual_seed(0))
        return choices_of(self._table.in_layer(window), scores.to(torch.int16), plan)

    def _collectors(
        self, wanted: Gathered, attended: Mapping[int, Attended], layer: int, allowed: Sequence[bool]
    ) -> list[Collector]:
        size = self._shape.kv_heads, len(self._table), self._device
        if wanted.tokens:
            return [TokenSums(size[0], attended[layer].key.shape[2], LAG, size[2])]
        found: list[Collector] = [InfluenceSums(*size)]
        if wanted.baselines:
            found.append(BaselineSums(*size))
        if wanted.copies:
            found.append(CopySums(attended, layer, allowed, size[0], size[2]))
        if wanted.heads:
            found.append(HeadSums(size[0], size[2]))
        return found

    def output_seconds(self, targets: int) -> float:
        """Returns the seconds that the output layer takes to start a backward pass from so many targets."""
        rows = min(targets, self._chunk)
        return self._timed(partial(self._output, rows)) * targets / rows

    def _output(self, rows: int) -> None:
        with torch.enable_grad():
            hidden = self._hidden.expand(rows, -1).clone().requires_grad_()
            logits = output_logits(self._model, hidden)
            torch.autograd.grad(logits, hidden, self._cotangent(rows)(logits.detach(), slice(0, rows)))

    def sample_lines(self, twice: bool) -> tuple[Line, Line]:
        """Returns the bytes that the forward pass keeps, and the most that are alive in the backward pass.

        Args:
            twice: whether every layer keeps its input alone and runs twice.
        """
        wanted = Gathered(*(any(one) for one in zip(*self.passes, strict=True)))
        kept, busy = [], []
        for n in SHORT:
            recording = Recording.of(self._shape, self._table, self.around, keep=wanted.copies)
            attended = {} if recording.attended is None else recording.attended
            collectors = [self._collectors(wanted, attended, *layer) for layer in enumerate(self._allowed)]
            layers = checkpointed(self._model) if twice else nullcontext()
            with LiveBytes() as live, layers, self._tape(recording, n) as tape:
                kept.append(live.now)
                tape.backward(self._cotangent(1), collectors, last=self.passes.total() == 1)
                busy.append(live.peak)
        return Line.through(SHORT, kept), Line.through(SHORT, busy)

    def answer_bytes(self, length: int, batch: int) -> int:
        """Returns the most bytes that are alive while so many prompts of a length are read, their cache included."""
        line, pairs = self._answer_bytes
        return batch * (line.at(length) + round(pairs * length**2))

    @cached_property
    def _answer_bytes(self) -> tuple[Line, float]:
        """Bytes of reading one prompt by tokens, and by pairs of tokens where the model attends without tiles."""
        other, square = [], []
        for n in PRIME:
            single, pair = partial(_of_pairs, n, False), partial(_of_pairs, n, True)
            with torch.no_grad(), LiveBytes(single) as singles, LiveBytes(pair) as pairs:
                self._model.base_model(input_ids=self._ids[None, :n], use_cache=True)
            other.append(singles.peak)
            square.append(pairs.peak)
        return Line.through(PRIME, other), square[-1] / PRIME[-1] ** 2

    def output_bytes(self, targets: int) -> int:
        """Returns the bytes that the output layer takes to start a backward pass from so many targets."""
        with LiveBytes() as live:
            self._output(min(targets, self._chunk))
        peak: int = live.peak
        return peak

    def _tape(self, recording: Recording, n: int) -> Tape:
        """Returns the tape of `n` tokens whose last alone predicts a target."""
        return Tape(self._model, recording, self._ids[:n], torch.tensor([n - 1], device=self._ids.device))

    def _cotangent(self, rows: int) -> Cotangent:
        return fisher_cotangent(rows, torch.Generator().manual_seed(0))

    def _timed(self, work: Callable[[], object]) -> float:
        """Returns the seconds that `work` takes alone: see `Stopwatch.least`."""
        return self.watch.best_of(work, REPEATS)


def _of_pairs(n: int, wanted: bool, size: int) -> bool:
    """Returns whether a tensor of `size` bytes has numbers for `n * n` pairs (or one more a row, a learned sink), or not."""
    return size > 0 and (0 in (size % n**2, size % (n * (n + 1)))) == wanted


def _pairs(n: int, window: int | None) -> int:
    """Returns how many pairs of a row and a key that it sees there are among `n` tokens."""
    band = n if window is None else min(n, window)
    return band * (band + 1) // 2 + (n - band) * band


def _stretched(attended: Attended, n: int) -> Attended:
    """Returns a layer's queries and keys for `n` tokens, repeated as often as it takes."""

    def stretch(tensor: Tensor) -> Tensor:
        return tensor.repeat(1, 1, -(-n // tensor.shape[2]), 1)[:, :, :n].contiguous()

    return replace(attended, query=stretch(attended.query), key=stretch(attended.key))


@torch.no_grad()
def _forward(attended: Attended, own: Tensor | None = None) -> None:
    attend(attended.query, attended.key, attended.key, attended.spec, attended.sink_logit, attended.plan, own)


_FULL = RuleTable.of([Rule.FULL], 1)


@torch.no_grad()
def _backward(
    attended: Attended,
    rows: int,
    table: RuleTable,
    collectors: Sequence[Collector],
    choices: Choices | None = None,
) -> None:
    """Runs the backward pass of attention in which only the last `rows` rows have a cotangent."""
    grad = torch.zeros_like(attended.query)
    grad[:, :, grad.shape[2] - rows :] = attended.query[:, :, grad.shape[2] - rows :]
    attend_backward(
        attended.query,
        attended.key,
        attended.key,
        grad,
        attended.spec,
        attended.sink_logit,
        table,
        collectors,
        attended.plan,
        choices=choices,
    )
