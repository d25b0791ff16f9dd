"""Decontamination: a shared n-gram is found wherever it stands; common phrases are no sign."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from llm.config import DecontaminationConfig
from llm.data.decontaminate import Decontamination
from llm.data.records import Place
from llm.data.staging import StagedDocument


def staged(text: str, *, is_validation: bool = False) -> StagedDocument:
    place = Place(file="a", line=1, offset_bytes=0)
    return StagedDocument(id=bytes(16), line=b"", text=text, size_bytes=len(text), place=place,
                          is_validation=is_validation)  # fmt: skip


def judge(
    folder: Path, config: DecontaminationConfig, protected: Sequence[str], texts: Sequence[str]
) -> list[bool]:
    contamination = Decontamination(folder / "ngrams.bin", config)
    for text in protected:
        contamination.protect(text)
    contamination.finish()
    if contamination.is_counting:
        for text in texts:
            contamination.count(staged(text))
    return [contamination.is_contaminated(staged(text)) for text in texts]


def ngrams(text: str, num_words: int) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + num_words]) for i in range(len(words) - num_words + 1)}


SENTENCES = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


@given(st.lists(SENTENCES, max_size=5), st.lists(SENTENCES, max_size=8), st.integers(1, 4),
       st.integers(0, 3))  # fmt: skip
@settings(deadline=None)
def test_the_judgement_is_that_of_brute_force(
    protected: list[str], texts: list[str], num_words: int, max_documents: int
) -> None:
    known = {ngram for text in protected for ngram in ngrams(text, num_words)}
    expected: list[bool] = []
    for text in texts:
        shared = ngrams(text, num_words) & known
        counts = [sum(ngram in ngrams(other, num_words) for other in texts) for ngram in shared]
        expected.append(any(not max_documents or count <= max_documents for count in counts))
    config = DecontaminationConfig(
        action="drop", ngram_words=num_words, max_documents=max_documents
    )
    with TemporaryDirectory() as folder:
        assert judge(Path(folder), config, protected, texts) == expected


def test_case_and_punctuation_hide_nothing(tmp_path: Path) -> None:
    config = DecontaminationConfig(action="drop")
    question = "What is the name of the function that returns the first of two given values?"
    answer = "So: 'what IS the name of the function -- that returns the first of two', he said."
    shorter = "What is the name of the function that returns the first of"
    assert judge(tmp_path, config, [question], [answer, shorter]) == [True, False]


def test_documents_of_validation_are_never_contaminated(tmp_path: Path) -> None:
    text = "one two three " * 9
    contamination = Decontamination(tmp_path / "n", DecontaminationConfig(action="drop"))
    contamination.protect(text)
    contamination.finish()
    contamination.count(staged(text, is_validation=True))
    assert not contamination.is_contaminated(staged(text, is_validation=True))
    assert contamination.is_contaminated(staged(text))
