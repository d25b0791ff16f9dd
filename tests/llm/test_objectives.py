"""Batches and targets of the objectives of language modeling."""

from pathlib import Path

import numpy as np
import torch

from llm.data.packed import PackedSequences
from llm.model.loss import IGNORED
from llm.tokenizer.bpe import ByteLevelBPE
from llm.training.objectives import Batch, NextToken
from tests.llm.training_setup import (
    write_chat_sequences,
    write_text_sequences,
)


def test_a_slice_of_a_batch_slices_every_tensor() -> None:
    tensor = torch.arange(12).view(4, 3)
    batch = Batch(
        inputs=tensor, targets=tensor + 1, document_ids=tensor + 2, extras={"rewards": tensor[:, 0]}
    )
    part = batch.sequences(1, 2)
    assert [t.tolist() for t in part.tensors()] == [t[1:3].tolist() for t in batch.tensors()]
    assert len(part.tensors()) == 4


def test_a_target_is_the_next_token_and_padding_is_none(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    sequences = PackedSequences(write_chat_sequences(tmp_path, tokenizer, 60), "train")
    arrays = sequences.read([0, 1])
    batch = NextToken(document_mask=False).make_batch(arrays, np.arange(2))
    mask = arrays.mask[:, 1:]
    assert np.array_equal(
        batch.inputs.numpy()[:, 1:][mask[:, :-1]], arrays.tokens[:, 1:-1][mask[:, :-1]]
    )
    assert np.array_equal(batch.targets.numpy()[mask], arrays.tokens[:, 1:][mask])
    assert (batch.targets.numpy()[~mask] == -100).all()
    assert (batch.targets != -100).sum() == mask.sum() > 0


def test_loss_on_all_learns_every_token_of_chats_but_the_first_and_no_other_of_text(
    tmp_path: Path, tokenizer: ByteLevelBPE, corpus: list[str]
) -> None:
    chats = PackedSequences(write_chat_sequences(tmp_path / "chats", tokenizer, 60), "train")
    text = PackedSequences(write_text_sequences(tmp_path / "text", tokenizer, corpus[:40]), "train")
    some = np.arange(8)
    objectives = [
        NextToken(document_mask=False, has_all_targets=has_all) for has_all in (False, True)
    ]
    answers, all_tokens = (each.make_batch(chats.read(some), some) for each in objectives)
    next_tokens = chats.read(some).tokens[:, 1:]
    is_learned = next_tokens != tokenizer.pad_id  # each sequence holds one chat
    assert all_tokens.targets.tolist() == np.where(is_learned, next_tokens, IGNORED).tolist()
    assert (answers.targets != IGNORED).sum() < is_learned.sum()
    of_text = [each.make_batch(text.read(some), some).targets.tolist() for each in objectives]
    assert of_text[0] == of_text[1]
