"""What a user types never becomes a control id, in text or chat, here or exported (promise 16)."""

from pathlib import Path

import pytest

from tests.chaos.tokenizer_promises import TOKENIZERS, try_control_tokens

pytest.importorskip("transformers", reason="what is exported is read back by transformers")
TRIES = 40


@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_control_tokens_typed_by_a_user_stay_text(kind: str, tmp_path: Path) -> None:
    if kind in ("unigram", "sentencepiece bpe"):
        pytest.importorskip("sentencepiece")
    figure = try_control_tokens(TOKENIZERS[kind], TRIES, 1, tmp_path)
    assert figure.num_tried >= 4 * TRIES and figure.failures == []
