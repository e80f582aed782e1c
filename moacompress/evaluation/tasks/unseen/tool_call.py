"""A call of a tool, as JSON, with a number that one of the customers wrote somewhere in a long exchange.

The tools are described in the system's turn, and one call was made before. The answer begins with the call up to the number; it
is right if the whole parses, and is the call that was asked for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import draw_names, pick

MESSAGE_TOKENS = 6
"""A message surely has more tokens: how many are drawn at most."""
CUSTOMERS = 8
"""Customers who write."""
TICKETS = (10_000, 100_000)
"""Numbers of tickets are integers from the first up, below the second."""
SYSTEM = (
    "You answer with one call of a tool, as JSON. The tools are:\ncall_customer(customer): Calls a customer.\n{tools}"
)
ASKED = "These messages came in.\n\n{messages}\n\n{request}"
NUMBER = "{name}: {name}'s ticket number is {number}."
_WHAT = """
The parcel came without a lid. The invoice was sent twice. Can it be delivered later? I would like another colour.
The handle is loose again. We have moved to another town. Somebody promised me a discount. The courier never called.
There is no manual in the box. I paid in cash. I ordered two of them by mistake. Nobody can read the label.
Is anybody there? Thank you, that would be kind. It worked until last week. My neighbour has the same.
"""
WHAT = tuple(re.findall(r"\S[^.?]+[.?]", _WHAT))


@dataclass(frozen=True)
class Tool:
    """A tool: its name, what it does, and how a call of it is asked for."""

    name: str
    does: str
    request: str

    def text(self) -> str:
        """Returns its description."""
        return f"{self.name}(ticket_number): {self.does}"


TOOLS = (
    Tool("close_ticket", "Closes a ticket.", "Close the ticket of {name}."),
    Tool("escalate_ticket", "Hands a ticket to a manager.", "Escalate the ticket of {name}."),
    Tool("refund_ticket", "Pays the money of a ticket back.", "Refund the ticket of {name}."),
)
SENTENCES = (SYSTEM, ASKED, NUMBER, WHAT, TOOLS)
"""All that prompts say but for what is drawn."""


def make_tool_call(request: PromptRequest) -> PromptDraft:
    """Returns an exchange of messages, a call that was made, and one to be made for the customer who gave a number.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    name, *others = draw_names(rng, CUSTOMERS)
    number, limit = int(rng.integers(*TICKETS)), request.length // MESSAGE_TOKENS
    said = [f"{pick(rng, (name, *others))}: {pick(rng, WHAT)}" for _ in range(limit)]
    depth, tool, caller = float(rng.random()), pick(rng, TOOLS), others[0]
    system = SYSTEM.format(tools="\n".join(each.text() for each in TOOLS))
    called = json.dumps({"name": "call_customer", "arguments": {"customer": caller}})
    call = json.dumps({"name": tool.name, "arguments": {"ticket_number": str(number)}})
    opening, value, closing = call.rpartition(str(number))  # digits follow a quotation mark

    def write(count: int) -> PromptDraft:
        before = round(depth * count)
        messages = [*said[:before], NUMBER.format(name=name, number=number), *said[before:count]]
        asked = ASKED.format(messages="\n".join(messages), request=f"Call {caller}.")
        turns = (asked, called, tool.request.format(name=name))
        return PromptDraft(turns, opening, Answer.of(value, before="", after=closing), (call,), system=system)

    return request.fit(write, limit)
