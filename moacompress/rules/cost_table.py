"""The cost table: what a decode step took on one machine, measured against what KV heads keep, for latency budgets.

It holds what was measured and nothing that is computed from it: of every length and number of rows the steps under some plans,
each with its median and with what its KV heads keep, by pair of formats. `step_time` fits those. Reading one never runs code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, TypeAdapter

from moacompress.core.errors import ArtefactError
from moacompress.core.files import fingerprint, read_json, write_json
from moacompress.rules.budget import format_length
from moacompress.rules.formats import FORMATS
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan import Plan
from moacompress.rules.plan_form import Length, ModelForm, Text
from moacompress.rules.untrusted import Form, Loc, checked, one_of
from moacompress.rules.windows import whole_blocks

FORMAT = "moacompress-cost-table"
VERSION = 1
MAX_CELLS, MAX_POINTS = 256, 1024
MAX_ROWS, MAX_MS = 1 << 20, 1e9
MAX_BYTES = 1 << 24
"""Largest file that is read."""
MOST_GROUPS = 2 * len(FORMATS) ** 2
"""Groups of a point: each pair of formats, with gates and without."""

Use = Literal["full_span", "fit", "check"]
"""What a point is for: the step at full span, which budgets are a share of; others that are fitted; or a plan that is not
fitted, by which the fit is judged."""
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Ms = Annotated[float, Field(gt=0, le=MAX_MS, allow_inf_nan=False)]


@dataclass(frozen=True)
class Machine:
    """What steps were timed on, or will be.

    Attributes:
        device: torch device without its number, such as "cpu".
        processor: its name.
        threads: of torch, which the kernels share their work out to.
        kernel: name of the backend.
        isa: its instruction set, empty where it has none.
    """

    device: str
    processor: str
    threads: int
    kernel: str
    isa: str


class HeadGroup(Form):
    """KV heads of one pair of formats in a plan, all layers together.

    Attributes:
        key_format: of their keys.
        value_format: of their values.
        gated: whether gates keep some of their tokens.
        heads: how many.
        slots: tokens of a row that the cache holds memory for, summed over them, selected ones included.
        selected: of these, what gates keep, in whole blocks.
    """

    key_format: Annotated[Text, one_of(FORMATS)]
    value_format: Annotated[Text, one_of(FORMATS)]
    gated: bool
    heads: Count
    slots: Count
    selected: Count


class Point(Form):
    """A plan whose steps were timed.

    Attributes:
        name: what it is.
        use: what it is for.
        ms: of a step, median of the turns.
        spread_ms: 10th and 90th percentile.
        groups: its KV heads.
    """

    name: Text
    use: Use
    ms: Ms
    spread_ms: Annotated[list[Ms], FailFast(), Field(min_length=2, max_length=2)]
    groups: Annotated[list[HeadGroup], FailFast(), Field(min_length=1, max_length=MOST_GROUPS)]


class TimedCell(Form):
    """What was timed at one length and number of rows.

    Attributes:
        length: tokens in the cache of every row.
        rows: rows of the batch.
        load_per_core: of the machine, over the minute before; None where the system does not say.
        points: what was timed, in turns.
    """

    length: Length
    rows: Annotated[int, Field(ge=1, le=MAX_ROWS)]
    load_per_core: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    points: Annotated[list[Point], FailFast(), Field(min_length=2, max_length=MAX_POINTS)]

    @property
    def full_span(self) -> Point:
        """The step at full span."""
        return next(point for point in self.points if point.use == "full_span")

    def __str__(self) -> str:
        return f"{format_length(self.length)}x{self.rows}"


class Configuration(Form):
    """What times depend on, beside length and rows.

    Attributes:
        device, processor, threads, kernel, isa: see `Machine`.
        model: the model's shape; its dtype is that of weights and cache.
        weights: kind of weights, as in a recipe.
        head_weights: of embedding and output layer, likewise.
        weight_bytes: of all weights in memory.
        lengths, rows: of the cells.
        tokens: steps that are timed as one.
        repeats: turns.
        seed: of what is in the caches, and of the plans that judge the fit.
        torch, moacompress: their versions.
    """

    device: Text
    processor: Text
    threads: Annotated[int, Field(ge=1, le=1 << 16)]
    kernel: Text
    isa: Text
    model: ModelForm
    weights: Text
    head_weights: Text | None
    weight_bytes: Count
    lengths: Annotated[list[Length], FailFast(), Field(min_length=1, max_length=MAX_CELLS)]
    rows: Annotated[
        list[Annotated[int, Field(ge=1, le=MAX_ROWS)]], FailFast(), Field(min_length=1, max_length=MAX_CELLS)
    ]
    tokens: Annotated[int, Field(ge=1, le=1 << 20)]
    repeats: Annotated[int, Field(ge=1, le=1 << 20)]
    seed: int
    torch: Text
    moacompress: Text


class CostTable(Form):
    """A cost table as its file has it; see the module.

    Attributes:
        format: `FORMAT`.
        version: of the form.
        measured: when it was finished, ISO 8601 in UTC.
        configuration: what its times depend on.
        cells: one for each length and number of rows.
    """

    format: Literal["moacompress-cost-table"]
    version: Annotated[int, Field(ge=1, le=VERSION)]
    measured: Text
    configuration: Configuration
    cells: Annotated[list[TimedCell], FailFast(), Field(min_length=1, max_length=MAX_CELLS)]

    @staticmethod
    def from_dict(data: Any) -> CostTable:
        """Reads the JSON form.

        Raises:
            ArtefactError: one message naming the first thing that is wrong.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtefactError(f'not a cost table: "format" is not {FORMAT!r}')
        version = data.get("version")
        if isinstance(version, int) and version > VERSION:
            raise ArtefactError(
                f"it has version {version}, this moacompress reads up to {VERSION}; upgrade moacompress"
            )
        table = checked(_TABLE, data, _name, ArtefactError)
        for number, cell in enumerate(table.cells):
            _check_cell(cell, table.configuration.model, f"cells[{number}]")
        if len({(cell.length, cell.rows) for cell in table.cells}) < len(table.cells):
            raise ArtefactError("two of its cells have the same length and rows")
        return table

    @staticmethod
    def load(path: str | Path) -> CostTable:
        """Reads a file.

        Raises:
            ArtefactError: missing, unreadable, too large or not a cost table; the message has the path.
        """
        path = Path(path)
        if not path.exists():
            raise ArtefactError(
                f"there is no cost table {path}; measure one on the machine that the plan is for: {command_for(path)}"
            )
        data = read_json(path, "cost table", MAX_BYTES)
        try:
            return CostTable.from_dict(data)
        except ArtefactError as error:
            raise ArtefactError(f"cost table {path}: {error}") from None

    def save(self, path: Path) -> None:
        """Writes the file, atomically."""
        write_json(path, self.model_dump(mode="json"))

    @property
    def key(self) -> str:
        """Fingerprint of all that it holds."""
        return fingerprint(self.model_dump(mode="json"))

    @property
    def cell_names(self) -> str:
        """The cells as budgets name them, such as `4k x 8`."""
        return ", ".join(str(cell) for cell in self.cells)

    def find_cell(self, length: int, rows: int) -> TimedCell | None:
        """Returns what was timed at a length and a number of rows, or None."""
        return next((cell for cell in self.cells if (cell.length, cell.rows) == (length, rows)), None)

    def differences(
        self, shape: ModelShape, machine: Machine | None = None, weights: tuple[str, str | None] | None = None
    ) -> list[str]:
        """Returns what of a model and a machine is not what the table was measured on, each in words; empty where all is.

        Args:
            shape: of the model.
            machine: None where it does not count.
            weights: kinds of weights and of head weights; None where they do not count.
        """
        ours = self.configuration
        pairs: list[tuple[str, Any, Any]] = [
            (name.replace("_", " "), getattr(ours.model, name), value)
            for name, value in shape.to_dict().items()
            if name != "weights_fingerprint"
        ]
        if machine is not None:
            pairs += [(name, getattr(ours, name), value) for name, value in machine.__dict__.items()]
        if weights is not None:
            pairs += [("weights", ours.weights, weights[0]), ("head weights", ours.head_weights, weights[1])]
        return [
            f"{name} {_said(theirs)} in the table, {_said(here)} here" for name, theirs, here in pairs if theirs != here
        ]

    def check(
        self, path: str | Path, shape: ModelShape, machine: Machine, weights: tuple[str, str | None] | None = None
    ) -> None:
        """Refuses another model or machine than the table was measured on.

        Args:
            path: of the table.
            shape: see `differences`.
            machine: likewise.
            weights: likewise.

        Raises:
            ArtefactError: says what differs.
        """
        different = self.differences(shape, machine, weights)
        if different:
            command = command_for(path, [(cell.length, cell.rows) for cell in self.cells])
            raise ArtefactError(
                f"the cost table {path} was measured elsewhere: {'; '.join(different[:3])}; measure one here, {command} "
                "--overwrite, or use it where it was measured"
            )


_TABLE = TypeAdapter(CostTable)


def command_for(path: str | Path, cells: Sequence[tuple[int, int]] = ()) -> str:
    """Returns the command that measures a table.

    Args:
        path: of the table.
        cells: lengths and rows that it has to have.
    """
    lengths = ",".join(format_length(n) for n in sorted({length for length, _ in cells}))
    rows = ",".join(str(count) for count in sorted({rows for _, rows in cells}))
    asked = f" --lengths {lengths} --batch {rows}" if cells else ""
    return f"moacompress bench MODEL --cost-table {path}{asked}"


def head_groups(plan: Plan, n: int) -> list[HeadGroup]:
    """Returns the KV heads of a plan at `n` tokens by pair of formats, those with gates apart.

    A KV head of a layer with a sliding window of its own keeps what the window holds.
    """
    found: dict[tuple[str, str, bool], list[int]] = {}
    for row, native in zip(plan.rules, plan.model.native_windows, strict=True):
        for rule in row:
            slots = int(rule.slots(n, plan.min_window, native))
            selected = slots - int(rule.without_choice().slots(n, plan.min_window, native))
            group = found.setdefault((rule.key_format, rule.value_format, rule.selects), [0, 0, 0])
            for index, count in enumerate((1, slots, selected)):
                group[index] += count
    return [
        HeadGroup(key_format=keys, value_format=values, gated=gated, heads=heads, slots=slots, selected=selected)
        for (keys, values, gated), (heads, slots, selected) in sorted(found.items())
    ]


def _check_cell(cell: TimedCell, model: ModelForm, where: str) -> None:
    """Refuses a cell that no model can have given.

    Raises:
        ArtefactError: names what is wrong.
    """
    heads, most = sum(model.kv_heads), whole_blocks(cell.length)
    for number, point in enumerate(cell.points):
        counted = sum(group.heads for group in point.groups)
        if counted != heads:
            raise ArtefactError(f"{where}.points[{number}] is of {counted} KV heads; the model has {heads}")
        for group in point.groups:
            if not group.selected <= group.slots <= group.heads * (most + whole_blocks(1)) or (
                group.selected and not group.gated
            ):
                raise ArtefactError(
                    f"{where}.points[{number}] keeps {group.slots:,} tokens, {group.selected:,} of them selected, in "
                    f"{group.heads} KV heads of {cell.length:,}"
                )
    full = [point for point in cell.points if point.use == "full_span"]
    fitted = [point.ms for point in cell.points if point.use == "fit"]
    if len(full) != 1 or not fitted:
        raise ArtefactError(
            f"{where} has {len(full)} steps at full span and {len(fitted)} to be fitted; it needs 1 and some"
        )
    if full[0].ms <= min(fitted):
        raise ArtefactError(
            f"{where}: a step at full span took {full[0].ms:.3g} ms and the shortest one {min(fitted):.3g}, so what heads keep "
            "makes no difference that can be measured there; measure longer --lengths, more rows in --batch, or more --repeats"
        )


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        values: Iterable[Any] = dict.fromkeys(value)
        return "/".join(str(item) for item in values)
    return "none" if value in (None, "") else str(value)


def _name(path: Loc) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "it"
