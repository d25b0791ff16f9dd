"""Export a tokenizer to transformers: `tokenizer.json`, `tokenizer_config.json`, chat template.

transformers turns the name of a control token into its id wherever a text contains it, even typed
by a user: in `tokenizer(text)`, and in the messages of a chat, which its template joins with the
control tokens to one text. `split_special_tokens` would prevent that, but would break the template
too. So exported control tokens have names that nobody can type: MARK, a noncharacter that Unicode
reserves for use inside a program, and their own. The template replaces MARK in messages.
"""

from collections.abc import Mapping
from typing import Any

from llm.data.chat import CHAT_FORMATS, chat_format_of
from llm.errors import ArtifactError
from llm.tokenizer.base import (
    CONTROL_TOKENS,
    DEFAULT_CHAT_FORMAT,
    MARK,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    Tokenizer,
    json_bytes,
)

MESSAGE_CONTENT = f"message['content'] | replace('{MARK}', '\ufffd')"


def exported_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, bytes]:
    """Return the files from which AutoTokenizer makes a tokenizer with the same ids."""
    library = marked_library_json(tokenizer)
    names = control_names(tokenizer, library)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["<|bos|>"],
        "eos_token": names["<|end|>"],
        "pad_token": names["<|pad|>"],
        "mask_token": names["<|mask|>"],
        "additional_special_tokens": [
            names[token] for token in ("<|user|>", "<|assistant|>", "<|system|>")
        ],
        "chat_template": chat_template(tokenizer, names),
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,  # the template needs them; users cannot type MARK
    }
    return {
        TOKENIZER_JSON: json_bytes(library),
        TOKENIZER_CONFIG_JSON: json_bytes(config),
    }


def chat_template(tokenizer: Tokenizer, names: Mapping[str, str]) -> str:
    """Return the tokenizer's chat format in Jinja, with these names of control tokens."""
    return chat_format_of(tokenizer).jinja(names, MESSAGE_CONTENT)


def find_chat_format(tokenizer: Tokenizer, template: object) -> str:
    """Return the chat format that an export wrote as `template`.

    A template that others wrote is not used: chats are written in the default format.

    Raises:
        ArtifactError: it was exported from here and then changed.
    """
    names = control_names(tokenizer, marked_library_json(tokenizer))
    for name, chat_format in CHAT_FORMATS.items():
        if chat_format.jinja(names, MESSAGE_CONTENT) == template:
            return name
    if isinstance(template, str) and MARK in template:
        raise ArtifactError(
            f"{TOKENIZER_CONFIG_JSON}: chat_template: exported from here, and then changed, so that"
            " text of users might become control tokens; expected the template of one of"
            f" {', '.join(CHAT_FORMATS)}. Export the model again"
        )
    return DEFAULT_CHAT_FORMAT


def control_names(tokenizer: Tokenizer, library: Mapping[str, Any]) -> dict[str, str]:
    """Return the name that each of CONTROL_TOKENS has in `library`."""
    found = {token["id"]: token["content"] for token in library["added_tokens"]}
    return {
        token: found[index]
        for token, index in zip(CONTROL_TOKENS, tokenizer.control_ids, strict=True)
    }


def marked_library_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer in the format of `tokenizers`, MARK before control tokens' names."""
    parts = tokenizer.library_json()
    vocabulary: dict[str, int] = parts["model"]["vocab"]
    for token in parts["added_tokens"]:
        if token["special"] and not token["content"].startswith(MARK):
            marked = MARK + token["content"]
            if token["content"] in vocabulary:
                vocabulary[marked] = vocabulary.pop(token["content"])
            token["content"] = marked
    return parts
