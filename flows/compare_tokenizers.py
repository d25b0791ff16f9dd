"""Compare tokenizers on one text: counts, speed, and a plot of the documents' lengths."""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llm.artifact import read_manifest
from llm.config import TrainTokenizerConfig, read_section
from llm.data.documents import DocumentReader
from llm.errors import ArtifactError, ConfigError
from llm.tokenizer.kinds import TOKENIZER_KINDS
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.report import TokenizerReport, TokenizerSpeed, measure_tokenizer
from tasks.store import ArtifactStore
from tasks.tracking.tokenizer_plot import draw_lengths

MAX_TEXT_BYTES = 10_000_000
PART_CHARACTERS = 4000
REPORT, PLOT = "tokenizers.json", "lengths.png"
DERIVED = ("tokens_per_word", "bytes_per_token", "tokens_per_character", "single_byte_share")


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredTokenizer:
    """The displayed name of a tokenizer, and its measurements."""

    name: str
    report: TokenizerReport
    speed: TokenizerSpeed


def find_tokenizers(store: ArtifactStore) -> list[Path]:
    """Return the folders of all trained tokenizers, newest first.

    Raises:
        ArtifactError: there are none.
    """
    found = [store.folder("train_tokenizer", r.digest) for r in store.records("train_tokenizer")]
    folders = [folder for folder in dict.fromkeys(found) if folder.is_dir()]
    if not folders:
        raise ArtifactError(
            f"{store.root}: no tokenizers; train one with `fromscratch run RECIPE --only"
            " train_tokenizer`, or name folders"
        )
    return folders


def find_text(store: ArtifactStore) -> Path:
    """Return the folder of the newest cleaned corpus.

    Raises:
        ArtifactError: there is none.
    """
    for record in store.records("clean"):
        folder = store.folder("clean", record.digest)
        if record.parts.role == "corpus" and folder.is_dir():
            return folder
    raise ArtifactError(f"{store.root}: no cleaned corpus; name a text with `--text`")


def read_texts(path: Path) -> list[str]:
    """Return up to MAX_TEXT_BYTES of a folder's validation documents, or of a file, in parts.

    Raises:
        ArtifactError: the folder is not an artifact of `clean`.
        ConfigError: the file is missing or not UTF-8.
    """
    if path.is_dir():
        documents = DocumentReader(path, "validation")
        ordinals = range(len(documents))
        return list(_beginning("\n".join(found.texts) for found in documents.read(ordinals)))
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES)
        text = decoder.decode(data, final=len(data) < MAX_TEXT_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}; expected UTF-8 text") from error
    starts = range(0, len(text), PART_CHARACTERS)
    return [text[start : start + PART_CHARACTERS] for start in starts]


def measure_tokenizers(
    folders: Mapping[str, Path], texts: Sequence[str]
) -> list[MeasuredTokenizer]:
    """Measure each tokenizer on the texts, freshly loaded."""
    measured: list[MeasuredTokenizer] = []
    for name, folder in folders.items():
        report, speed = measure_tokenizer(load_tokenizer(folder), texts)
        measured.append(MeasuredTokenizer(name=name, report=report, speed=speed))
    return measured


def name_tokenizers(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by kind and digest; folders that no stage made by their path."""
    return {_name(folder): folder for folder in folders}


def write_report(measured: Sequence[MeasuredTokenizer], folder: Path) -> None:
    """Write the measurements as JSON, and the documents' lengths as a plot."""
    folder.mkdir(parents=True, exist_ok=True)
    measurements: dict[str, dict[str, float]] = {}
    lengths: dict[str, list[list[int]]] = {}
    for tokenizer in measured:
        counts = asdict(tokenizer.report)
        lengths[tokenizer.name] = counts.pop("lengths")
        derived = {name: getattr(tokenizer.report, name) for name in DERIVED}
        measurements[tokenizer.name] = counts | derived | asdict(tokenizer.speed)
    (folder / REPORT).write_text(json.dumps(measurements, indent=2) + "\n", encoding="utf-8")
    draw_lengths(lengths).savefig(folder / PLOT)


def _name(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
    except ArtifactError:
        return str(folder)
    if manifest.stage != "train_tokenizer":
        return str(folder)
    config = read_section(TrainTokenizerConfig, manifest.settings)
    variant = TOKENIZER_KINDS[config.kind].variant
    words = [config.kind, getattr(config, variant) if variant else "", manifest.digest[:6]]
    return " ".join(filter(None, words))


def _beginning(texts: Iterable[str]) -> Iterable[str]:
    left_bytes = MAX_TEXT_BYTES
    for text in texts:
        left_bytes -= len(text.encode())
        if left_bytes < 0:
            return
        yield text
