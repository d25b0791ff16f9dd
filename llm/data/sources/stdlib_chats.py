"""Chats and preference pairs about the standard library's functions.

Most chats are answerable from the question alone, so exact match on held-out functions measures a
skill that a small model can learn: to read a signature. The other kinds need knowledge of the
library. The pairs are the answerable questions, with an answer that misreads the signature: another
parameter, the parameters in another order or one missing, another default. Chats and pairs of one
signature are in one group, so a held-out function is held out of both.
"""

import ast
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llm.artifact import Json
from llm.data.sources.stdlib import definitions, read_modules, signature

MAX_SIGNATURE_CHARACTERS = 160
MAX_ANSWER_CHARACTERS = 120
"""About 40 tokens."""
ANSWERABLE_SHARE = 0.7
NO_PARAMETERS = "none"
FROM_MEMORY = ("summary", "signature")
DEFAULTS = ("None", "True", "False", "0", "1", "''", "()")
"""Wrong defaults of functions with one default."""
PHRASINGS = {
    "parameters": (
        "What are the parameters of `{signature}`?",
        "List the parameters of `{signature}`.",
        "Which parameters does `{signature}` take?",
        "Name the parameters of `{signature}`.",
    ),
    "first_parameter": (
        "What is the first parameter of `{signature}`?",
        "Which parameter comes first in `{signature}`?",
        "Name the first parameter of `{signature}`.",
    ),
    "last_parameter": (
        "What is the last parameter of `{signature}`?",
        "Which parameter comes last in `{signature}`?",
        "Name the last parameter of `{signature}`.",
    ),
    "default": (
        "What is the default value of `{name}` in `{signature}`?",
        "Which default does `{name}` have in `{signature}`?",
        "What is `{name}` when it is not given to `{signature}`?",
    ),
    "name": (
        "What is the name of the function `{signature}`?",
        "Which function is called by `{signature}`?",
        "Name the function in `{signature}`.",
    ),
    "summary": (
        "What does `{name}` do?",
        "What is `{name}` for?",
        "Describe `{name}` in one sentence.",
    ),
    "signature": (
        "What is the signature of `{name}`?",
        "Show the signature of `{name}`.",
        "How is `{name}` defined?",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A question and its answer; `group`, a signature, decides the side of the split."""

    kind: str
    group: str
    question: str
    answer: str
    wrong_answers: tuple[str, ...] = ()
    """Plausible ones; none for the kinds from memory."""

    @property
    def record(self) -> dict[str, Json]:
        """The chat as a record with `messages`."""
        return {
            "messages": [
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ],
            "kind": self.kind,
            "group": self.group,
        }

    @property
    def pair(self) -> dict[str, Json]:
        """The preference pair of the answer and a wrong one."""
        choice = _pick(f"wrong {self.question}", len(self.wrong_answers))
        return {
            "prompt": self.question,
            "chosen": self.answer,
            "rejected": self.wrong_answers[choice],
            "kind": self.kind,
            "group": self.group,
        }


def chat_records() -> Iterator[dict[str, Json]]:
    """Yield distinct chats of all functions of the library, with kinds in balance."""
    chats = list(dict.fromkeys(_chats()))
    from_memory = [chat for chat in chats if chat.kind in FROM_MEMORY]
    num_wanted = round((len(chats) - len(from_memory)) * (1 / ANSWERABLE_SHARE - 1))
    left_out = set(sorted(from_memory, key=_hash)[num_wanted:])
    yield from (chat.record for chat in chats if chat not in left_out)


def preference_records() -> Iterator[dict[str, Json]]:
    """Yield a preference pair for each distinct chat that has a plausible wrong answer."""
    yield from (chat.pair for chat in dict.fromkeys(_chats()) if chat.wrong_answers)


def _chats() -> Iterator[Chat]:
    for module in read_modules():
        seen: set[str] = set()  # a name defined twice, say under `if` and `else`, is ambiguous
        for name, node in _functions(module.tree.body, module.name):
            # without `def `, so that the name has no space before it, as in the answer
            text = signature(node).removeprefix("async ").removeprefix("def ")
            if name in seen or len(text) > MAX_SIGNATURE_CHARACTERS:
                continue
            seen.add(name)
            answers = {**_answers(node), **_answers_from_memory(name, node, text)}
            names, defaults = _parameter_names(node), _defaults(node)
            for (kind, about), answer in answers.items():
                if answer and len(answer) <= MAX_ANSWER_CHARACTERS:
                    key = f"{kind} {about} {text}"
                    phrasing = PHRASINGS[kind][_pick(key, len(PHRASINGS[kind]))]
                    question = phrasing.format(signature=text, name=about)
                    wrong = [
                        other
                        for other in _wrong_answers(kind, names, list(defaults.values()))
                        if other != answer and len(other) <= MAX_ANSWER_CHARACTERS
                    ]
                    yield Chat(kind=kind, group=text, question=question, answer=answer,
                               wrong_answers=tuple(dict.fromkeys(wrong)))  # fmt: skip


def _functions(
    body: list[ast.stmt], prefix: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield the public functions and methods below a public name, with their dotted names."""
    for node in definitions(body):
        name = f"{prefix}.{node.name}"
        if node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from _functions(node.body, name)
        else:
            yield name, node


def _answers(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[tuple[str, str], str]:
    """Return the answers contained in the signature, by (kind, name asked about)."""
    names = _parameter_names(node)
    answers = {("name", ""): node.name, ("parameters", ""): ", ".join(names) or NO_PARAMETERS}
    if len(names) > 1:
        answers["last_parameter", ""] = names[-1]
    if len(names) > 1 and names[0] not in ("self", "cls"):  # else most answers would be the same
        answers["first_parameter", ""] = names[0]
    defaults = {("default", name): value for name, value in _defaults(node).items()}
    informative = {key: value for key, value in defaults.items() if value != "None"}
    return answers | (informative or defaults)  # else half of all answers would be None


def _wrong_answers(kind: str, names: Sequence[str], defaults: Sequence[str]) -> list[str]:
    """Return answers to a question of `kind` that misread the signature; some may be right."""
    if kind in ("first_parameter", "last_parameter"):
        return list(names)
    if kind == "default":
        return list(defaults) if len(set(defaults)) > 1 else list(DEFAULTS)
    if kind == "name":
        return [name.lstrip("*") for name in names]
    if kind != "parameters":
        return []
    orders = [[*names[:i], names[i + 1], names[i], *names[i + 2 :]] for i in range(len(names) - 1)]
    missing = [[*names[:i], *names[i + 1 :]] for i in range(len(names))]
    return [", ".join(wrong) or NO_PARAMETERS for wrong in orders + missing] or ["self"]


def _parameter_names(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of the parameters in their order, starred as in the signature."""
    arguments = node.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def _defaults(node: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str]:
    """Return the default values by parameter."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    values = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    return {
        argument.arg: ast.unparse(value)
        for argument, value in zip(
            [*positional, *arguments.kwonlyargs], [*values, *arguments.kw_defaults], strict=True
        )
        if value is not None
    }


def _answers_from_memory(
    name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, text: str
) -> dict[tuple[str, str], str]:
    """Return the answers that need knowledge of the library, by (kind, dotted name)."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[a-z)\"'`]\.)\s", paragraph, maxsplit=1)[0]
    is_sentence = sentence.endswith(".") and " " in sentence
    return {("summary", name): sentence if is_sentence else "", ("signature", name): text}


def _hash(chat: Chat) -> bytes:
    return hashlib.sha256(chat.question.encode()).digest()


def _pick(key: str, num_choices: int) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % num_choices
