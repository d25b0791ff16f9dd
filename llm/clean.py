"""Turn raw files into documents with ids, each once, split into train and validation.

A record of text holds it under `text_key`. A chat holds `messages`, each with `role` (system, user,
assistant) and `content`, or else `instruction`, `input` and `output`; `kind` may name what it is.

The steps, in this order, each off unless a setting turns it on or nothing is said of it here:
decode; normalize (off); mask personal data (off); the rules of C4 and Gopher (off); length; exact
duplicates; near duplicates (off); decontamination (off); split. Up to the exact duplicates one pass
over the raw files is all; near duplicates and decontamination need two looks, so documents wait on
disk between.

A document's id is the hash of its content, and the hash alone decides its side of the split: adding
data never moves a document from one side to the other. Chats with the same `group` (questions on
the same function, say) stay together: for them the hash of the group decides. Of documents nearly
the same the one of the lowest hash is kept, which is in validation if any of them is. Nothing is
dropped without being counted.
"""

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from llm.artifact import ArtifactWriter, Json
from llm.config import CleanConfig, read_section
from llm.data.decontaminate import Decontamination
from llm.data.documents import Document, read_documents
from llm.data.filters import apply_c4, gopher_reason
from llm.data.formats import Content
from llm.data.near_paragraphs import NearDuplicateSearch
from llm.data.normalize import normalize
from llm.data.personal_data import Masked, mask
from llm.data.records import EXCERPT_CHARACTERS, Skip
from llm.data.staging import StagedDocument, Staging
from llm.data.tally import Tally
from llm.errors import DataError
from llm.job import Job, run_job

ID_BYTES = 16
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
SEEN_CACHE_KIBIBYTES = 64 * 1024
