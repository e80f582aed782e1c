"""The plan: which keys every KV head keeps and in which formats, for which model, and what was measured.

Reading a plan never runs code from it, never unpickles and never fetches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moacompress.core.arrays import Floats32
from moacompress.core.artefact_names import gates_file, shingles_file
from moacompress.core.errors import ArtefactError, PlanError
from moacompress.core.files import MAX_JSON_BYTES, fingerprint, finite_json, read_json, remove, write_json
from moacompress.core.shingles import Shingles
from moacompress.core.shown import Shown
from moacompress.rules.formats import NATIVE
from moacompress.rules.gate_weights import GateWeights
from moacompress.rules.key_centres import Centre, Centres, centre_numbers, check_centres, to_text, to_texts
from moacompress.rules.kv_bytes import head_kv_bytes, kv_bytes
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan_form import FORMAT, RULE_FIELDS, SELECT_FIELDS, VERSION, check_rules, plan_fields
from moacompress.rules.rule import Rule
from moacompress.rules.share import LayerShares, Share, check_shares
from moacompress.rules.untrusted import short

_SAID = {
    "model_type": "the model type {}",
    "layers": "{} layers",
    "heads": "{} query heads a layer",
    "kv_heads": "{} KV heads a layer",
    "head_dim": "heads of {} numbers",
    "native_windows": "the sliding windows {}",
}
"""What makes two models of one shape, and how a difference is said."""


@dataclass(frozen=True)
class Plan(Shown):
    """One rule for every KV head of every layer, with where it came from and what it was measured to do.

    Attributes:
        model: the model it is for.
        min_window: smallest window of any KV head, tokens.
        rules: `rules[layer][kv_head]`.
        budget: `{"asked": [...], "bytes": {"1024": {"plan": int, "dense": int}}}`, empty for a hand-made plan.
        quality: predicted and measured KL, of the plan and of the baselines.
        provenance: calibration fingerprint, lengths, seeds, versions and the resolved recipe.
        shares: what each layer takes from an earlier one, or None; empty where no layer shares attention.
        centres: what is subtracted from each KV head's keys that are in codes, `centres[layer][kv_head]`; empty for nothing.
        gates: fingerprint of the gates that choose tokens; empty where no rule selects.
        gate_weights: these gates, where they are at hand: a plan's file has them beside it.
        seen: shingles of the text and prompts that it was calibrated on, which a plan's file has beside it too; None where
            that is not known.
    """

    model: ModelShape
    min_window: int
    rules: tuple[tuple[Rule, ...], ...]
    budget: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    shares: LayerShares = ()
    centres: Centres = field(default=(), repr=False)
    gates: str = ""
    gate_weights: GateWeights | None = field(default=None, compare=False, repr=False)
    seen: Shingles | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not any(self.shares):
            object.__setattr__(self, "shares", ())
        if not self.selects:
            object.__setattr__(self, "gates", "")
            object.__setattr__(self, "gate_weights", None)
        if self.centres:
            check_centres(self.centres, self.model.layers, self.model.kv_heads, self.model.head_dim)
        check_rules(self.model, self.min_window, self.rules)
        for layer, (row, native) in enumerate(zip(self.rules, self.model.native_windows, strict=True)):
            for head, rule in enumerate(row):
                if rule.selects and native is not None:
                    raise PlanError(
                        f"layer {layer} KV head {head} keeps tokens by their score in a layer with a sliding window of its own "
                        f"({native} tokens), which would hide them"
                    )
        if self.selects and self.shares:
            raise PlanError(
                "the plan has layers that share attention and KV heads that keep tokens by their score; one of the two"
            )
        check_shares(self.model, self.rules, self.shares)

    def __str__(self) -> str:
        """Returns the plan in a line: the model, and the share of the bytes at the longest length that it states."""
        shape, n = self.model, self.stated_lengths[-1]
        heads = f"{shape.model_type}, {shape.layers} layers x {shape.kv_heads} KV heads"
        return f"plan for {heads}: {self.kv_share(n):.1%} of the KV bytes at {n:,} tokens"

    @staticmethod
    def uniform(model: ModelShape, rule: Rule, min_window: int = 32) -> Plan:
        """Returns the plan that gives every KV head the same rule."""
        return Plan(model, min_window, ((rule,) * model.kv_heads,) * model.layers)

    @staticmethod
    def full(model: ModelShape) -> Plan:
        """Returns the plan that keeps everything."""
        return Plan.uniform(model, Rule.FULL)

    @property
    def stated_lengths(self) -> list[int]:
        """Lengths in tokens that its bytes are stated for, ascending; 1k and 4k where it does not say."""
        return sorted(map(int, self.budget.get("bytes", ()))) or [1024, 4096]

    @property
    def profiled_lengths(self) -> list[int]:
        """Lengths in tokens that it was searched at; the stated ones where its notes do not say."""
        return list(self.provenance.get("lengths", ())) or self.stated_lengths

    @property
    def selects(self) -> bool:
        """Whether some KV head keeps tokens that a gate chooses."""
        return any(rule.selects for row in self.rules for rule in row)

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats of its keys and values, each once."""
        rules = {rule for row in self.rules for rule in row}
        return tuple(sorted({name for rule in rules for name in (rule.key_format, rule.value_format)}))

    def kept(self, n: int) -> int:
        """Returns the keys visible to query `n - 1`, summed over layers and KV heads."""
        return sum(rule.kept(n, self.min_window, native) for rule, native in self._heads())

    def kv_bytes(self, n: int, batch: int = 1) -> int:
        """Returns the bytes of the cache at `n` tokens."""
        return batch * int(kv_bytes(self.model, self.rules, self.min_window, n, self.shares))

    def head_bytes(self, n: int) -> list[list[int]]:
        """Returns the bytes of the cache at `n` tokens of every KV head, `[layer][kv_head]`.

        A reuse layer takes what its values take.
        """
        found = []
        for layer, (row, native) in enumerate(zip(self.rules, self.model.native_windows, strict=True)):
            reuses = self.share(layer) is not None
            sizes = [head_kv_bytes(self.model, rule, self.min_window, native, n, reuses=reuses) for rule in row]
            found.append(list(map(int, sizes)))
        return found

    def kv_bytes_by_length(self, lengths: Iterable[int]) -> dict[str, dict[str, int]]:
        """Returns the bytes of the cache and of the dense model's at each length, as notes and `--json` have them."""
        return {str(n): {"dense": self.model.dense_kv_bytes(n), "plan": self.kv_bytes(n)} for n in lengths}

    @property
    def used_centres(self) -> Centres:
        """The centres of KV heads whose own keys are in codes; empty where no KV head has one."""
        used = tuple(map(self._used_centres, range(len(self.centres))))
        return used if any(map(any, used)) else ()

    def _used_centres(self, layer: int) -> tuple[Centre, ...]:
        if not self.centres or self.share(layer) is not None:
            return (b"",) * self.model.kv_heads
        pairs = zip(self.rules[layer], self.centres[layer], strict=True)
        return tuple(centre if rule.key_format != NATIVE else b"" for rule, centre in pairs)

    def key_centre(self, layer: int) -> Floats32 | None:
        """Returns what is subtracted from a layer's keys, float32 `[kv_heads, head_dim]`; None for nothing."""
        return centre_numbers(self._used_centres(layer), self.model.head_dim)

    def share(self, layer: int) -> Share | None:
        """Returns what a layer takes from an earlier one, or None."""
        return self.shares[layer] if self.shares else None

    def in_dtype(self, dtype: str) -> Plan:
        """Returns the same rules for the same model in another dtype, for what its cache takes, stated bytes included.

        The worst share is known of its own dtype alone.
        """
        same = dtype == self.model.dtype
        known = {name: note for name, note in self.budget.items() if same or name != "worst_share"}
        other = replace(self, model=replace(self.model, dtype=dtype), budget=known)
        stated = other.kv_bytes_by_length(map(int, self.budget.get("bytes", ())))
        return other.with_notes(budget={**known, "bytes": stated}) if stated else other

    def kv_share(self, n: int) -> float:
        """Returns the cache's bytes at `n` tokens as a share of the dense model's."""
        return self.kv_bytes(n) / self.model.dense_kv_bytes(n)

    def density(self, n: int) -> float:
        """Returns kept / dense kept at `n` tokens, averaged over KV heads: a diagnostic, never the budget."""
        shares = [
            rule.kept(n, self.min_window, native) / Rule.FULL.kept(n, self.min_window, native)
            for rule, native in self._heads()
        ]
        return float(sum(shares) / len(shares))

    @property
    def changed_weights(self) -> str | None:
        """What has changed a checkpoint's weights from the dense model's, "healed" or "repaired"; None where nothing has.

        Gates are no weights of the dense model.
        """
        repaired, healed = self.provenance.get("repair"), self.provenance.get("heal")
        if isinstance(healed, dict) and healed.get("changed_weights", healed.get("improved")):
            return "healed"
        return "repaired" if isinstance(repaired, dict) and repaired.get("penalty") is not None else None

    def key(self) -> str:
        """Returns a hash of what the plan does (rules, min_window, shape), not of its numbers or history."""
        shape = {**self.model.__dict__, "native_windows": list(self.model.native_windows)}
        del shape["weights_fingerprint"]
        does: list[Any] = [shape, self.min_window, [[rule.to_list() for rule in row] for row in self.rules]]
        if self.shares:
            does.append([share and share.to_dict() for share in self.shares])
        if used := self.used_centres:
            does.append(to_texts(used))
        if self.gates:
            does.append(self.gates)
        return fingerprint(does)

    def with_notes(self, **notes: dict[str, Any]) -> Plan:
        """Returns the same rules with other `budget`, `quality` or `provenance`."""
        return replace(self, **notes)  # type: ignore[arg-type]

    def of_heads(self, heads: range) -> Plan:
        """Returns the plan of some neighbouring KV heads of every layer, as a rank has them; its gates are not at hand.

        Raises:
            PlanError: layers share attention, of heads that may be on other ranks.
        """
        for layer, share in enumerate(self.shares):
            if share is not None:
                raise PlanError(
                    f"layer {layer} shares the attention of layer {share.anchor}, and ranks of tensor parallelism have parts "
                    "of both; load the model without tp_plan, or use a plan without shared attention"
                )
        group = self.model.heads // self.model.kv_heads
        shape = replace(self.model, kv_heads=len(heads), heads=group * len(heads))
        own = slice(heads.start, heads.stop)
        rules, centres = tuple(row[own] for row in self.rules), tuple(row[own] for row in self.centres)
        return Plan(shape, self.min_window, rules, centres=centres, gates=self.gates)

    def with_gates(self, gates: GateWeights) -> Plan:
        """Returns the same rules with other gates to choose by."""
        return replace(self, gates=gates.fingerprint, gate_weights=gates)

    def check_model(self, model: ModelShape, *, weights: bool) -> None:
        """Refuses a model that the plan was not made for.

        `weights` says whether its weights count too: search and export compare them, loading does not. A plan made of a config
        alone has no fingerprint, and takes any weights of its shape.

        Raises:
            PlanError: naming the first difference.
        """
        for name in _SAID:
            ours, theirs = getattr(self.model, name), getattr(model, name)
            if ours != theirs:
                raise PlanError(
                    f"the plan is for another model: it is for {_SAID[name].format(short(ours))}, and this model has "
                    f"{_SAID[name].format(short(theirs))}; make a plan for this model with `moacompress search`"
                )
        if weights and self.model.weights_fingerprint not in ("", model.weights_fingerprint):
            raise PlanError(
                f"the plan is for other weights: fingerprint {self.model.weights_fingerprint}, the model has "
                f"{model.weights_fingerprint}; profile and search this model from scratch"
            )

    def diff(self, other: Plan) -> list[str]:
        """Returns one line for each difference in what the two plans do; empty when they do the same."""
        lines = []
        for name in (*_SAID, "weights_fingerprint"):
            ours, theirs = getattr(self.model, name), getattr(other.model, name)
            if ours != theirs:
                lines.append(f"model.{name}: {short(ours)} -> {short(theirs)}")
        if self.min_window != other.min_window:
            lines.append(f"min_window: {self.min_window} -> {other.min_window}")
        for layer, (row, other_row) in enumerate(zip(self.rules, other.rules, strict=False)):
            for head, (rule, other_rule) in enumerate(zip(row, other_row, strict=False)):
                if rule != other_rule and not (rule.is_full and other_rule.is_full):
                    lines.append(f"layer {layer} KV head {head}: {rule} -> {other_rule}")
            shares = self.share(layer), other.share(layer) if layer < other.model.layers else None
            if shares[0] != shares[1]:
                lines.append(f"layer {layer}: {' -> '.join(str(share or 'own attention') for share in shares)}")
        if self.used_centres != other.used_centres:
            lines.append(f"centres of keys: {_centres_said(self)} -> {_centres_said(other)}")
        if self.gates != other.gates:
            lines.append(f"gates: {self.gates or 'none'} -> {other.gates or 'none'}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form; see `plan_form`."""

        def layer(index: int, row: tuple[Rule, ...]) -> dict[str, Any]:
            names = RULE_FIELDS + (SELECT_FIELDS if any(rule.selects for rule in row) else ())
            share, centres = self.share(index), self.centres[index] if self.centres else ()
            return {
                "layer": index,
                **{name: [getattr(rule, name) for rule in row] for name in names},
                **({"key_centre": [to_text(centre) for centre in centres]} if any(centres) else {}),
                "share": share and share.to_dict(),
            }

        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model.to_dict(),
            "min_window": self.min_window,
            "layers": [layer(index, row) for index, row in enumerate(self.rules)],
            **({"gates": self.gates} if self.gates else {}),
            "budget": finite_json(self.budget),
            "quality": finite_json(self.quality),
            "provenance": finite_json(self.provenance),
        }

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Reads the JSON form.

        Raises:
            PlanError: one message naming the first thing that is wrong, with layer and head.
        """
        try:
            plan = Plan(**plan_fields(data))
        except RecursionError as error:
            raise PlanError("the plan is nested too deep") from error
        if plan.selects and not plan.gates:
            raise PlanError("KV heads of the plan keep tokens by their score, and it does not say by which gates")
        return plan

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON, atomically, and beside it its gates and the shingles of its calibration.

        Gates that were read off a model's weights, where they are rounded, are not those that the plan names, and stay there.
        """
        if self.gate_weights is not None and self.gate_weights.fingerprint == self.gates:
            self.gate_weights.save(gates_file(Path(path)))
        if self.seen is None:
            remove([shingles_file(Path(path))])  # of the plan that was here before
        else:
            self.seen.save(shingles_file(Path(path)))
        write_json(Path(path), self.to_dict())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan file, and its gates and the shingles of its calibration where they lie beside it.

        Raises:
            PlanError: unreadable, too large, or not a valid plan, or other gates or shingles beside it; the message starts
                with the path.
        """
        try:
            plan = Plan.from_dict(read_json(Path(path), "plan", MAX_JSON_BYTES))
            beside, shingles = gates_file(Path(path)), shingles_file(Path(path))
            if shingles.is_file():
                plan = replace(plan, seen=Shingles.load(shingles))
            if not plan.gates or not beside.is_file():
                return plan
            heads = plan.model.layers, plan.model.kv_heads
            return replace(plan, gate_weights=GateWeights.load(beside, heads, plan.gates))
        except (ArtefactError, PlanError) as error:
            message = str(error)
            raise PlanError(message if str(path) in message else f"plan {path}: {message}") from error

    def _heads(self) -> Iterable[tuple[Rule, int | None]]:
        for row, native in zip(self.rules, self.model.native_windows, strict=True):
            for rule in row:
                yield rule, native


def _centres_said(plan: Plan) -> str:
    return f"of {sum(map(bool, sum(plan.used_centres, ())))} KV heads" if plan.used_centres else "none"
