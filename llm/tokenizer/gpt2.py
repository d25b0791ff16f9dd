"""GPT-2's published vocabulary with its exact ids, from the two files that OpenAI released.

`<|endoftext|>`, 50256, begins every document, as in GPT-2's training; the other control tokens
follow from 50257 on. So a model with GPT-2's 50,257 ids can read and write text, and only chats and
masks need the 6 extra ids.
"""

import hashlib
import json
from pathlib import Path

from tokenizers import AddedToken, models

from llm.errors import DataError
from llm.tokenizer.bpe import GPT2_CONTROL_TOKENS, ByteLevelBPE, make_library_tokenizer

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""The sha256 of each file. No other bytes are accepted, so that their path does not matter."""


def load_gpt2(folder: Path) -> ByteLevelBPE:
    """Make the tokenizer from `encoder.json` and `vocab.bpe` in `folder`.

    Raises:
        DataError: one of them is missing or is not the published file.
    """
    data: dict[str, bytes] = {}
    problems: list[str] = []
    for name, sha256 in GPT2_FILES.items():
        path = folder / name
        data[name] = path.read_bytes() if path.is_file() else b""
        found = hashlib.sha256(data[name]).hexdigest() if data[name] else "no file"
        if found != sha256:
            problems.append(f"  {path}: {found}, expected the published one, sha256 {sha256}")
    if problems:
        raise DataError(
            "train_tokenizer.path: not the files of GPT-2\n"
            + "\n".join(problems)
            + "\nleave train_tokenizer.path empty to fetch them"
        )
    vocabulary: dict[str, int] = json.loads(data["encoder.json"])
    lines = data["vocab.bpe"].decode().splitlines()[1:]  # the first line is the version
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    del vocabulary[GPT2_CONTROL_TOKENS[0]]  # 50256, the last; added again as a control token
    tokenizer = make_library_tokenizer(models.BPE(vocabulary, merges), "gpt2", max_digits=0)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in GPT2_CONTROL_TOKENS])
    return ByteLevelBPE.from_json(json.loads(tokenizer.to_str()))
