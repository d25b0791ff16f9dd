"""Exported chat templates: `apply_chat_template` of transformers gives our ids in every format."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llm.data.chat import CHAT_FORMATS, render_chat, render_prompt
from llm.data.content import ROLES, Message
from llm.errors import ArtifactError, DataError
from llm.exchange.hf_tokenizer import exported_files
from llm.exchange.import_tokenizer import import_tokenizer
from llm.tokenizer.base import CONTROL_TOKENS, TOKENIZER_CONFIG_JSON, Tokenizer
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.characters import ByteTokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

FORMATS = pytest.mark.parametrize("chat_format", CHAT_FORMATS)
FRAGMENTS = [
    *CONTROL_TOKENS, "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "### Response:", "### Instruction:\n", "assistant\n",
    "<|im_start|>assistant\n", "{{ messages }}", "{% endfor %}", "{{", "\\n", '"', "'", "\n",
    "\n\n", "\r\n", " ", "  ", "\t", "the parser", "return self", "4", "é", "漢字", "\U0001f600",
    "\0", "\ufffd",
]  # fmt: skip
LAST_OF_UNICODE = 0x10FFFF
SURROGATES, MARK = range(0xD800, 0xE000), 0xFDD0  # the template replaces MARK


def random_text(generator: random.Random) -> str:
    """Join a few fragments, and characters from all of Unicode."""
    pieces: list[str] = []
    for _ in range(generator.choice([0, 1, 2, 4, 8])):
        code_point = generator.randint(0, LAST_OF_UNICODE)
        is_usable = code_point not in SURROGATES and code_point != MARK
        is_fragment = generator.random() < 0.8 or not is_usable
        pieces.append(generator.choice(FRAGMENTS) if is_fragment else chr(code_point))
    return "".join(pieces)


def random_chat(generator: random.Random) -> list[Message]:
    """Draw a chat; most have alternating turns, with or without a system message."""
    count = generator.randint(1, 6)
    roles = [("user", "assistant")[index % 2] for index in range(count)]
    if generator.random() < 0.3:
        roles = generator.choices(ROLES, k=count)
    if generator.random() < 0.4:
        roles.insert(0, "system")
    return [Message(role=role, content=random_text(generator)) for role in roles]


@pytest.fixture(scope="module")
def makers(corpus: list[str]) -> Mapping[str, Callable[[], Tokenizer]]:
    return {
        "bpe code": lambda: ByteLevelBPE.train(corpus, 600),
        "bpe gpt2": lambda: ByteLevelBPE.train(corpus, 600, "gpt2", 0),
        "bytes": ByteTokenizer,
        "unigram": lambda: SentencePieceTokenizer.train(corpus, 600, "unigram"),
    }


def export(tokenizer: Tokenizer, chat_format: str, folder: Path) -> Any:
    """Load the exported tokenizer with transformers."""
    tokenizer.chat_format = chat_format
    for name, data in exported_files(tokenizer, 64).items():
        (folder / name).write_bytes(data)
    return transformers.AutoTokenizer.from_pretrained(folder)


@FORMATS
@pytest.mark.parametrize(
    ("kind", "num_chats"), [("bpe code", 1000), ("bpe gpt2", 100), ("bytes", 100), ("unigram", 100)]
)
def test_transformers_gives_our_ids_of_random_chats(
    kind: str,
    num_chats: int,
    chat_format: str,
    makers: Mapping[str, Callable[[], Tokenizer]],
    tmp_path: Path,
) -> None:
    if kind == "unigram":
        pytest.importorskip("sentencepiece", reason="it learns this kind")
    ours = makers[kind]()
    template = export(ours, chat_format, tmp_path).apply_chat_template
    generator = random.Random(chat_format)
    for _ in range(num_chats):
        chat = random_chat(generator)
        ids, mask = render_chat(chat, ours)
        theirs = template(chat, tokenize=True, return_dict=False)
        assert theirs == ids, chat
        prompt = template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
        assert prompt == render_prompt(chat, ours), chat
        empty = [Message(role=message["role"], content="") for message in chat]
        controls = [index for index in ids if index in ours.control_ids]
        assert controls == [
            index for index in render_chat(empty, ours).ids if index in ours.control_ids
        ], "what a user types gives no control token"
        assert sum(mask) >= sum(message["role"] == "assistant" for message in chat)


@FORMATS
def test_the_exported_names_of_control_tokens_give_none_when_a_user_types_them(
    chat_format: str, tokenizer: ByteLevelBPE, tmp_path: Path
) -> None:
    ours = ByteLevelBPE.from_json(tokenizer.library_json())
    theirs = export(ours, chat_format, tmp_path)
    names = "".join(sorted(theirs.get_added_vocab()))
    assert names.count(chr(MARK)) == len(CONTROL_TOKENS)
    found = [
        [index for index in ids if index in ours.control_ids]
        for text in ("", names)
        for chat in [[Message(role=role, content=text) for role in ROLES]]
        for ids in (
            theirs.apply_chat_template(chat, return_dict=False),
            render_chat(chat, ours).ids,
        )
    ]
    assert found[1:] == found[:1] * 3


@FORMATS
def test_an_unknown_role_is_refused_there_as_here(
    chat_format: str, tokenizer: ByteLevelBPE, tmp_path: Path
) -> None:
    ours = ByteLevelBPE.from_json(tokenizer.library_json())
    theirs = export(ours, chat_format, tmp_path)
    for position in (0, 1):
        chat = [Message(role="user", content="hello")] * 2
        chat[position] = Message(role="tool", content="x")
        with pytest.raises(DataError, match="the role 'tool' in a chat"):
            render_chat(chat, ours)
        with pytest.raises(Exception, match="a role other than system, user, assistant"):
            theirs.apply_chat_template(chat)
    with pytest.raises(DataError, match="without messages"):
        render_chat([], ours)
    with pytest.raises(Exception, match=r"empty|index"):
        theirs.apply_chat_template([])


@FORMATS
def test_an_exported_tokenizer_comes_back_with_its_chat_format(
    chat_format: str, tokenizer: ByteLevelBPE, tmp_path: Path
) -> None:
    export(ByteLevelBPE.from_json(tokenizer.library_json()), chat_format, tmp_path)
    assert import_tokenizer(tmp_path).chat_format == chat_format


def test_an_exported_template_that_was_changed_is_refused(
    tokenizer: ByteLevelBPE, tmp_path: Path
) -> None:
    export(ByteLevelBPE.from_json(tokenizer.library_json()), "chatml", tmp_path)
    path = tmp_path / TOKENIZER_CONFIG_JSON
    text = path.read_text(encoding="utf-8")
    changed = text.replace(" | replace('\\ufdd0', '\\ufffd')", "")
    assert changed != text, "without the filter a user could type control tokens"
    path.write_text(changed, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"chat_template: .* text of users"):
        import_tokenizer(tmp_path)
