"""Encode documents to tokens: texts, chats with their targets, and preference pairs.

Chats and pairs must fit a sequence. A longer chat is dropped or truncated, as `pack.long_chats`
says; a longer pair is dropped, because its two sides would no longer compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from llm.data.chat import RenderedChat, render_chats, render_pairs, truncate_left
from llm.data.content import Content
from llm.data.documents import Document
from llm.data.packed_writer import EncodedDocument
from llm.tokenizer.base import Tokenizer

LongChats = Literal["drop", "truncate_left", "truncate_right"]


@dataclass(kw_only=True, slots=True)
class Losses:
    """Ids of documents that are not packed, or not whole. One that is read again counts once."""

    documents_with_unknown_characters: set[bytes] = field(default_factory=set[bytes])
    """Left out: with characters outside the vocabulary, and no byte fallback."""
    dropped_chats: set[bytes] = field(default_factory=set[bytes])
    """Longer than a sequence, and dropped by choice or because truncation leaves no targets."""
    truncated_chats: set[bytes] = field(default_factory=set[bytes])
    dropped_pairs: set[bytes] = field(default_factory=set[bytes])
    """Preference pairs longer than a sequence."""

    def counts(self) -> dict[str, int]:
        """Return the number of documents of each loss that occurred."""
        counts = {name: len(getattr(self, name)) for name in self.__slots__}
        return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentEncoder:
    """Encodes documents of one content for sequences of one length."""

    tokenizer: Tokenizer
    content: Content
    max_tokens: int
    """Of a chat or a pair: T + 1, those of a sequence."""
    long_chats: LongChats
    losses: Losses = field(default_factory=Losses)
    """Filled while encoding."""

    def encode(self, documents: Sequence[Document]) -> list[tuple[Document, EncodedDocument]]:
        """Return the documents that can be packed with their tokens."""
        known: list[Document] = []
        for document in documents:
            if all(map(self.tokenizer.can_encode, document.texts)):
                known.append(document)
            else:
                self.losses.documents_with_unknown_characters.add(document.id)
        if self.content == "text":
            return self._encode_texts(known)
        chats = self._render_pairs(known) if self.content == "preferences" else self._render(known)
        return [
            (
                document,
                EncodedDocument(
                    id=document.id,
                    tokens=np.array(chat.ids, dtype=np.uint32),
                    mask=np.array(chat.mask, dtype=np.bool_),
                    kind=document.kind,
                ),
            )
            for document, chat in zip(known, chats, strict=True)
            if chat is not None
        ]

    def _encode_texts(
        self, documents: Sequence[Document]
    ) -> list[tuple[Document, EncodedDocument]]:
        encoded = self.tokenizer.encode_arrays([document.text for document in documents])
        bos = np.array([self.tokenizer.bos_id], dtype=np.uint32)
        return [
            (document, EncodedDocument(id=document.id, tokens=np.concatenate([bos, ids])))
            for document, ids in zip(documents, encoded, strict=True)
        ]

    def _render(self, documents: Sequence[Document]) -> list[RenderedChat | None]:
        rendered = render_chats([document.messages for document in documents], self.tokenizer)
        return [self._fit(*pair) for pair in zip(documents, rendered, strict=True)]

    def _fit(self, document: Document, chat: RenderedChat) -> RenderedChat | None:
        """Truncate a chat that is too long; None drops it."""
        if len(chat.ids) <= self.max_tokens:
            return chat
        if self.long_chats == "truncate_left":
            chat = truncate_left(document.messages, chat, self.max_tokens, self.tokenizer)
        else:
            chat = RenderedChat(chat.ids[: self.max_tokens], chat.mask[: self.max_tokens])
        is_dropped = self.long_chats == "drop" or not any(chat.mask)
        losses = self.losses.dropped_chats if is_dropped else self.losses.truncated_chats
        losses.add(document.id)
        return None if is_dropped else chat

    def _render_pairs(self, documents: Sequence[Document]) -> list[RenderedChat | None]:
        pairs = [(one.messages, one.chosen, one.rejected) for one in documents]
        fitting: list[RenderedChat | None] = []
        for document, pair in zip(documents, render_pairs(pairs, self.tokenizer), strict=True):
            is_dropped = len(pair.ids) > self.max_tokens
            if is_dropped:
                self.losses.dropped_pairs.add(document.id)
            fitting.append(None if is_dropped else pair)
        return fitting
