"""Export and import of model folders for transformers: weights, tokenizer, chat template.

A folder appears under its name complete, or not at all.
"""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from llm.artifact import ArtifactWriter, fsync_folder
from llm.errors import ArtifactError, ConfigError
from llm.exchange.hf_tokenizer import exported_files
from llm.exchange.huggingface import CONFIG, read_json_object, read_model, write_model
from llm.exchange.import_tokenizer import import_tokenizer
from llm.exchange.layouts import expressible
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.tokenizer.base import Tokenizer
from llm.tokenizer.imported import ImportedTokenizer
from llm.tokenizer.load import load_tokenizer

GENERATION, CARD = "generation_config.json", "README.md"


def export_model(source: Path, target: Path, *, dtype: str = "float32") -> None:
    """Write the model in `source` as a folder that AutoModelForCausalLM and AutoTokenizer load.

    Raises:
        ArtifactError: `source` has no complete model.
        ConfigError: no layout can express it, or `target` exists.
    """
    _refuse_existing(target)
    model, tokenizer = load_both(source)
    model = expressible(model)
    with new_folder(target) as writer:
        ids = {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }
        layout = write_model(writer, model, dtype, ids)
        for name, data in exported_files(tokenizer, model.seq_len).items():
            writer.write_bytes(name, data)
        stops = [tokenizer.end_id, tokenizer.bos_id]  # as in `fromscratch chat`
        writer.write_json(GENERATION, ids | {"eos_token_id": stops, "do_sample": False})
        writer.write_bytes(CARD, _card(model, layout.architecture, dtype).encode())


def import_model(source: Path, target: Path) -> None:
    """Write a model that transformers saved in `source` as a model folder of this project.

    Its logits stay the same. Missing control tokens are added at the end of its vocabulary; their
    vectors are learned in fine-tuning.

    Raises:
        ArtifactError: the model or its tokenizer cannot be expressed here, or a file is damaged.
        ConfigError: `target` exists.
    """
    _refuse_existing(target)
    tokenizer = import_tokenizer(source)
    model = read_model(source, min_vocab_size=tokenizer.vocab_size)
    if isinstance(tokenizer, ImportedTokenizer):
        tokenizer = tokenizer.padded(model.vocab_size)
    num_stored = cast(int, read_json_object(source / CONFIG)["vocab_size"])
    is_known = set(range(num_stored)).union(tokenizer.control_ids)
    if unknown := sorted(set(range(tokenizer.vocab_size)) - is_known):
        raise ArtifactError(
            f"{source}: the tokenizer's ids {unknown[0]} to {unknown[-1]} have no vector, expected"
            f" at most {num_stored} tokens, vocab_size in {CONFIG}"
        )
    _refuse_other_vocabulary(model, tokenizer, source)
    with new_folder(target) as writer:
        save_model(writer, model, tokenizer.to_files())


def load_both(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Load the model in `folder` and its tokenizer.

    Raises:
        ArtifactError: a file is missing or damaged, or their vocabularies differ.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    _refuse_other_vocabulary(model, tokenizer, folder)
    return model, tokenizer


@contextmanager
def new_folder(target: Path) -> Generator[ArtifactWriter]:
    """Write a folder that appears as `target` if the block succeeds, and is deleted if it fails.

    Raises:
        ConfigError: `target` exists.
        ArtifactError: `target` cannot be written.
    """
    _refuse_existing(target)
    staging = target.absolute().with_name(f".{target.name}.{os.getpid()}.staging")
    try:
        writer = ArtifactWriter(staging)
        yield writer
        fsync_folder(staging)
        staging.rename(target)
        fsync_folder(target.absolute().parent)
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_other_vocabulary(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    if model.vocab_size != tokenizer.vocab_size:
        raise ArtifactError(
            f"{folder}: found a tokenizer of {tokenizer.vocab_size} tokens, expected the model's"
            f" {model.vocab_size}; give it the tokenizer it was trained with"
        )


def _refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: exists; name a new folder")


def _card(model: Transformer, architecture: str, dtype: str) -> str:
    """Return the model card: shape, usage, and the names of control tokens."""
    return f"""\
# A language model made with fromscratch

`{architecture}`, {model.num_parameters():,} parameters as {dtype}, {model.vocab_size:,} tokens, a
context of {model.seq_len:,}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
chat = [{{"role": "user", "content": "Hello"}}]
prompt = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**prompt, max_new_tokens=100)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

Every text begins with `tokenizer.bos_token`: the chat template writes it, `tokenizer(text)` does
not.

## Control tokens

transformers turns the name of a control token into its id wherever a text contains it, even typed
by a user. So here every name begins with the noncharacter U+FDD0, which nobody types: `<|end|>` in
a question or a text is seven ordinary characters, as in training. The chat template replaces U+FDD0
in messages by U+FFFD. For texts that may contain it and do not pass through the template, call
`tokenizer(text, split_special_tokens=True)`: then no text gives a control id. Do not set that for
the whole tokenizer: the template would lose its control tokens too.
"""
