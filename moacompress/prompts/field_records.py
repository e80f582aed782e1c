"""Records of fields, as configuration files, logs and notes have them; one field of one record is asked for.

The layouts are JSON lines, sections of `name = value`, and bullets. Every record has fields of its own choice. The names of
fields are split as the keys are, and evaluation asks in words of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moacompress.prompts.pools import SPLITS, Split

RecordLayout = Literal["json-lines", "assignments", "bullets"]
LAYOUTS: tuple[RecordLayout, ...] = get_args(RecordLayout)

_FIELDS = """
address backup_id balance bucket_id cache_key checksum client cluster_id counter cursor deadline digest duration expires
frame handle index_id job_id latency ledger lease limit_id mount node_id offset origin_id owner_id payload pin port priority
process quota revision sector seed_id serial session shard_id slot socket stamp ticket_id timeout token_id trace upload
user_id worker zone_id
"""
FIELDS: dict[Split, tuple[str, ...]] = {
    split: tuple(_FIELDS.split()[index :: len(SPLITS)]) for index, split in enumerate(SPLITS)
}
RECORD_FIELDS = 2
"""Fields of a record."""
TEMPLATE = 'Memorize the records below.\n{context}\nWhat is "{field}" in the record "{key}"?'
EVALUATION_TEMPLATE = 'Entries of a registry:\n{context}\nFind the entry "{key}" and give its {field}.'
_OPENINGS: dict[RecordLayout, str] = {
    "json-lines": '{{"record": "{key}", "{field}":',
    "assignments": "[{key}]\n{field} =",
    "bullets": "{key}\n* {field}:",
}


@dataclass(frozen=True)
class FieldRecord:
    """A record: its key, and the names and values of its fields in order."""

    key: str
    fields: tuple[tuple[str, str], ...]

    def text(self, layout: RecordLayout) -> str:
        """Returns the record as it is written in a layout, on one line or several."""
        if layout == "json-lines":
            fields = ", ".join(f'"{name}": {value}' for name, value in self.fields)
            return f'{{"record": "{self.key}", {fields}}}'
        if layout == "assignments":
            return "\n".join([f"[{self.key}]", *(f"{name} = {value}" for name, value in self.fields)])
        return "\n".join([self.key, *(f"* {name}: {value}" for name, value in self.fields)])


def record_value(value: str, layout: RecordLayout) -> str:
    """Returns a value as a layout writes it: JSON has all but numbers in quotes."""
    return f'"{value}"' if layout == "json-lines" and not value.isdecimal() else value


def record_opening(layout: RecordLayout, key: str, field: str) -> str:
    """Returns how an answer begins: the record in its layout, up to the value that is asked for."""
    return _OPENINGS[layout].format(key=key, field=field)
