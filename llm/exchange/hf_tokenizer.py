"""A tokenizer as transformers reads it: `tokenizer.json`, `tokenizer_config.json`, chat template.

transformers turns the name of a control token into its id wherever it stands in a text, also where
a user typed it: in `tokenizer(text)`, and in the messages of a chat, which its template renders
into one text with the control tokens. `split_special_tokens` would keep a user from it, and the
template too. So control tokens go out under names that nobody types: MARK before their own. MARK is
a noncharacter, which Unicode keeps for use inside a program; the template writes it, and takes it
out of the messages.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from llm.tokenizer.base import (
    CONTROL_TOKENS,
    MARK,
    NUM_BYTE_VALUES,
    TOKENIZER_CONFIG_JSON,
    TOKENIZER_JSON,
    Tokenizer,
)
from llm.tokenizer.bpe import byte_characters
from llm.tokenizer.characters import ByteTokenizer, CharacterTokenizer

REPLACEMENT = "\ufffd"


def hub_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, bytes]:
    """Return the files by which AutoTokenizer gives the ids that `tokenizer` gives."""
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
        "chat_template": chat_template(names),
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,  # the template needs them; MARK keeps users from them
    }
    return {
        TOKENIZER_JSON: _json(library),
        TOKENIZER_CONFIG_JSON: _json(config),
    }


def chat_template(name: Mapping[str, str]) -> str:
    """Return `llm.data.chat.render_chat` and `render_prompt` as a Jinja template."""
    roles = {role: name[f"<|{role}|>"] for role in ("system", "user", "assistant")}
    written = "".join(
        f"{{% {'elif' if index else 'if'} message['role'] == '{role}' %}}{token}"
        for index, (role, token) in enumerate(roles.items())
    )
    allowed = ", ".join(roles)
    return (
        f"{name['<|bos|>']}{{% for message in messages %}}{written}"
        f"{{% else %}}{{{{ raise_exception('a role other than {allowed}') }}}}{{% endif %}}"
        f"{{{{ message['content'] | replace('{MARK}', '{REPLACEMENT}') }}}}"
        f"{name['<|end|>']}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{name['<|assistant|>']}{{% endif %}}"
    )


def control_names(tokenizer: Tokenizer, library: Mapping[str, Any]) -> dict[str, str]:
    """Return the name that each of CONTROL_TOKENS has in `library`."""
    found = {token["id"]: token["content"] for token in library["added_tokens"]}
    return {
        token: found[index]
        for token, index in zip(CONTROL_TOKENS, tokenizer.control_ids, strict=True)
    }


def marked_library_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer in the format of `tokenizers`, the names of control tokens marked."""
    parts = library_json(tokenizer)
    vocabulary: dict[str, int] = parts["model"]["vocab"]
    for token in parts["added_tokens"]:
        if token["special"] and not token["content"].startswith(MARK):
            marked = MARK + token["content"]
            if token["content"] in vocabulary:
                vocabulary[marked] = vocabulary.pop(token["content"])
            token["content"] = marked
    return parts


def library_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer in the format of the library `tokenizers`."""
    parts = cast(dict[str, Any], json.loads(tokenizer.to_files()[TOKENIZER_JSON]))
    if isinstance(tokenizer, ByteTokenizer):
        made = _of_bytes(tokenizer)
    elif isinstance(tokenizer, CharacterTokenizer):
        made = _of_characters(tokenizer)
    else:  # the library runs it here too
        return cast(dict[str, Any], parts.get("library", parts))
    made.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    return cast(dict[str, Any], json.loads(made.to_str()))


def _of_bytes(tokenizer: ByteTokenizer) -> LibraryTokenizer:
    """Make a byte-level BPE that merges nothing."""
    vocabulary = _control_vocabulary()
    vocabulary |= {
        character: len(CONTROL_TOKENS) + byte for byte, character in enumerate(byte_characters())
    }
    made = LibraryTokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _of_characters(tokenizer: CharacterTokenizer) -> LibraryTokenizer:
    """Make a vocabulary of characters; an unknown one becomes its bytes, or is an error."""
    characters: str = json.loads(tokenizer.to_files()[TOKENIZER_JSON])["characters"]
    vocabulary = _control_vocabulary()
    vocabulary |= {
        character: index for index, character in enumerate(characters, start=len(vocabulary))
    }
    each = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    if len(vocabulary) == tokenizer.vocab_size:  # without the bytes
        made = LibraryTokenizer(models.WordLevel(vocabulary, unk_token=""))
        made.pre_tokenizer, made.decoder = each, decoders.Fuse()
        return made
    first = len(vocabulary)
    vocabulary |= {f"<0x{byte:02X}>": first + byte for byte in range(NUM_BYTE_VALUES)}
    made = LibraryTokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    made.pre_tokenizer = each
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def _control_vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate(CONTROL_TOKENS)}


def _json(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
