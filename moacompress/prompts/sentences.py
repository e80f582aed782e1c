"""What prompts say: the sentences of tasks as templates, this project's own, and a digest of them.

Calibration and validation share their sentences and their noise; evaluation has others, the same in kind, so that a plan is
never measured on sentences that it was made on.

The digest tells prompts of one wording from those of another: a profile and an evaluation carry it. Another project's
sentences can take the place of ours (`evaluation.ruler`), as a task takes its sentences as an argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass

from moacompress.core.files import fingerprint
from moacompress.prompts.pools import Split

NOISE = (
    "The bus stops at the corner.",
    "A dog barks next door.",
    "Someone turns a page.",
    "The coffee smells good.",
    "After that nothing happens for a while.",
)
"""One line of the repeated haystack, by sentence."""
EVALUATION_NOISE = (
    "Rain runs down the window.",
    "Two boys kick a ball.",
    "The clock in the hall ticks.",
    "Soup is on the stove.",
    "Then the house is quiet again until evening.",
)


@dataclass(frozen=True)
class QuestionSentences:
    """What is said around a context.

    Attributes:
        before: introduces the context.
        after: asks.
        answer: how the answer begins.
    """

    before: str
    after: str
    answer: str


@dataclass(frozen=True)
class NeedleSentences:
    """The sentences of needles in a haystack, with `{kind}`, `{kinds}` (the plural), `{key}` and `{value}`.

    Attributes:
        needle: hides a value.
        one: asks for one value.
        several: asks for several values.
        noise: one line of the repeated haystack, by sentence.
    """

    needle: str
    one: QuestionSentences
    several: QuestionSentences
    noise: tuple[str, ...]

    def hide(self, kind: str, key: str, value: str) -> str:
        """Returns the sentence that hides a value of a kind, such as `number`, which is found by its key."""
        return self.needle.format(kind=kind, kinds=f"{kind}s", key=key, value=value)

    def ask(self, kind: str, keys: Sequence[str], values: int) -> QuestionSentences:
        """Returns what asks for so many values of a kind, found by their keys; one value in the singular."""
        key = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
        asked = self.one if values == 1 else self.several
        return QuestionSentences(
            *(text.format(kind=kind, kinds=f"{kind}s", key=key) for text in (asked.before, asked.after, asked.answer))
        )


@dataclass(frozen=True)
class DocumentSentences:
    """The sentences of a question about documents.

    Attributes:
        prompt: what the user says, with `{context}` and `{question}`.
        document: a document, with `{number}` and `{document}`.
        answer: how the answer begins.
    """

    prompt: str
    document: str
    answer: str

    def render(self, documents: Sequence[str], question: str) -> str:
        """Returns what the user says."""
        shown = (self.document.format(number=number, document=text) for number, text in enumerate(documents, 1))
        return self.prompt.format(context="\n\n".join(shown), question=question)

    def asks(self, question: str) -> str:
        """Returns how what the user says ends, behind the documents."""
        return self.prompt.partition("{context}")[2].format(question=question).lstrip()


_STATED = "Here and there the text below says which {kind} a name has. Keep that in mind: a question about it follows the text."
NEEDLES = NeedleSentences(
    needle="Remember that the {kind} of {key} is {value}.",
    one=QuestionSentences(_STATED, "What is the {kind} of {key}?", "The {kind} of {key} is"),
    several=QuestionSentences(_STATED, "What are the {kinds} of {key}?", "The {kinds} of {key} are"),
    noise=NOISE,
)
DOCUMENTS = DocumentSentences(
    prompt=(
        "Several texts follow, and after them a question that one of the texts answers.\n\n{context}\n\n"
        "Question: {question}\nReply with the answer alone, as short as it can be."
    ),
    document="[Text {number}]\n{document}",
    answer=" Answer:",
)
_GIVEN = "In the following lines some names are each given a {kind}. Read them to the end, where one is asked for."
EVALUATION_NEEDLES = NeedleSentences(
    needle="Note that {key} was given the {kind} {value}.",
    one=QuestionSentences(_GIVEN, "Which {kind} was {key} given?", "{key} was given the {kind}"),
    several=QuestionSentences(_GIVEN, "Which {kinds} were given to {key}?", "The {kinds} given to {key}:"),
    noise=EVALUATION_NOISE,
)
EVALUATION_DOCUMENTS = DocumentSentences(
    prompt=(
        "Read these passages; what is asked below them is said in one of them.\n\n{context}\n\n"
        "{question}\nGive only the words that answer it, and no sentence around them."
    ),
    document="Passage {number}:\n{document}",
    answer=" Answer:",
)


def needles_of(split: Split) -> NeedleSentences:
    """Returns the sentences of needles that a split's prompts have."""
    return EVALUATION_NEEDLES if split == "evaluation" else NEEDLES


def wording_of(*sentences: object) -> str:
    """Returns a digest of sentences, 16 hex digits: text, or sequences and dataclasses of it."""
    return fingerprint([_plain(each) for each in sentences])


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
