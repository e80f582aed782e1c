"""A reference code that is stated once in a long agreement in legal prose, asked for at the end."""

from __future__ import annotations

import numpy as np

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import draw_names, pick

CLAUSE_TOKENS = 12
"""A clause surely has more tokens: how many are drawn at most."""
ARTICLE = 6
"""Clauses of an article."""
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
TEMPLATE = (
    "Read the agreement below and answer the question after it.\n\n{context}\n\n"
    "What is the {noun} of the {document} between {first} and {second}?"
)
PREFIX = "The {noun} of the {document} between {first} and {second} is"
NOUNS = ("docket reference", "contract number", "file reference", "registry code", "deed number")
DOCUMENTS = (
    "lease",
    "licence",
    "charter party",
    "guarantee",
    "escrow deed",
    "supply contract",
    "mortgage",
    "indemnity",
)
FIRMS = ("Holdings", "Limited", "Partners", "Trustees", "Estates", "Shipping", "Brothers", "Assurance")
STATED = (
    "The {document} between {first} and {second} is recorded under {noun} {code}.",
    "For the purposes of this Agreement the {document} between {first} and {second} bears the {noun} {code}.",
    "The parties acknowledge that the {document} between {first} and {second} was filed with the {noun} {code}.",
)
_CLAUSES = (
    "{party} shall {duty} {when}, {proviso}.",
    "{when_first}, {party} shall {duty}, {proviso}.",
    "{proviso_first}, {party} shall not be obliged to {duty} {when}.",
    "If {party} fails to {duty} {when}, {other} may {remedy}, {proviso}.",
    "{other} hereby agrees with {party} to {duty} {when} and, failing that, to {remedy}.",
    "The obligation of {party} to {duty} survives termination, {proviso}.",
    "Time is of the essence where {party} is to {duty} {when}.",
    "Nothing in this Clause obliges {party} to {duty} or entitles {other} to {remedy}.",
)
_PARTIES = (
    *("the Lessor", "the Lessee", "the Guarantor", "the Assignee", "the Trustee", "the Licensor", "the Licensee"),
    *("the Contractor", "the Beneficiary", "the Escrow Agent", "the Indemnifying Party", "the Mortgagee"),
)
_DUTIES = (
    "deliver an executed counterpart of this Agreement",
    "maintain in force all insurance required by applicable law",
    "indemnify and hold harmless the other parties from any claim arising hereunder",
    "keep the premises in good and tenantable repair",
    "furnish audited statements of account",
    "obtain every consent, licence and permit that the works require",
    "pay all rates, taxes and assessments levied on the property",
    "give written particulars of any encumbrance",
    "procure the release of the security created by the debenture",
    "remit the unpaid balance together with accrued interest",
    "preserve the confidentiality of all disclosures made under this clause",
    "refrain from assigning or subletting any part of the demised premises",
    "submit the dispute to arbitration before a sole arbitrator",
    "register the transfer with the competent authority",
    "permit inspection of its books during ordinary business hours",
    "reinstate the land to its former condition",
    "cure any defect in title of which it has actual knowledge",
    "appoint an agent for the service of process",
)
_WHEN = (
    "within {days} days of the Effective Date",
    "no later than the last Business Day of each calendar quarter",
    "upon written demand",
    "at its sole cost and expense",
    "prior to the expiry of the term",
    "on {days} days' prior notice in writing",
    "for so long as any sum remains outstanding under Clause {days}",
)
_PROVISOS = (
    "provided that no Event of Default has occurred and is continuing",
    "notwithstanding any provision of this Agreement to the contrary",
    "except as expressly set out in Schedule {days}",
    "save where such failure results from an act of the other party",
    "without prejudice to any right or remedy accrued before termination",
    "to the fullest extent permitted by the governing law",
    "subject always to the limitation of liability in Clause {days}",
)
_REMEDIES = (
    "terminate this Agreement forthwith by notice",
    "enforce the security without further notice",
    "recover its reasonable costs as a debt",
    "withhold any further performance",
    "appoint a receiver over the charged assets",
)

SENTENCES = (
    *(TEMPLATE, PREFIX, NOUNS, DOCUMENTS, FIRMS, STATED),
    *(_CLAUSES, _PARTIES, _DUTIES, _WHEN, _PROVISOS, _REMEDIES),
)
"""All that prompts say but for what is drawn."""


def make_legal_codes(request: PromptRequest) -> PromptDraft:
    """Returns an agreement of numbered clauses, one of which states the code.

    Raises:
        DataError: the length is too short.
    """
    rng = request.rng
    first, second = (f"{name} {pick(rng, FIRMS)}" for name in draw_names(rng, 2))
    filed = {"noun": pick(rng, NOUNS), "document": pick(rng, DOCUMENTS), "first": first, "second": second}
    filed["code"] = _code(rng)
    stated, depth = pick(rng, STATED).format(**filed), float(rng.random())
    limit = request.length // CLAUSE_TOKENS
    clauses = [_clause(rng) for _ in range(limit)]

    def write(count: int) -> PromptDraft:
        before = round(depth * count)
        texts = [*clauses[:before], stated, *clauses[before:count]]
        numbered = [f"{index // ARTICLE + 1}.{index % ARTICLE + 1} {clause}" for index, clause in enumerate(texts)]
        articles = [" ".join(numbered[at : at + ARTICLE]) for at in range(0, len(numbered), ARTICLE)]
        user = TEMPLATE.format(context="\n\n".join(articles), **filed)
        return PromptDraft((user,), f"\n{PREFIX.format(**filed)}", Answer.of(filed["code"]), (filed["code"],))

    return request.fit(write, limit)


def _code(rng: np.random.Generator) -> str:
    """Returns a code such as `KR-4827`."""
    letters = "".join(pick(rng, LETTERS) for _ in range(2))
    return f"{letters}-{rng.integers(1000, 10000)}"


def _clause(rng: np.random.Generator) -> str:
    when, proviso = pick(rng, _WHEN), pick(rng, _PROVISOS)
    party, other = (_PARTIES[index] for index in rng.permutation(len(_PARTIES))[:2])
    days = int(rng.integers(2, 91))
    text = pick(rng, _CLAUSES).format(
        party=party,
        other=other,
        duty=pick(rng, _DUTIES),
        remedy=pick(rng, _REMEDIES),
        when=when,
        when_first=when,
        proviso=proviso,
        proviso_first=proviso,
    )
    text = text.format(days=days)
    return text[0].upper() + text[1:]
