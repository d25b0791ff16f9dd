"""Reading raw files: every format gives the same records; damage and bombs raise errors."""

import bz2
import csv
import gzip
import importlib
import io
import json
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config import ReadingConfig
from llm.data.raw.formats import Format, format_of, is_readable
from llm.data.raw.reading import read_records
from llm.data.raw.records import ReadOptions, Record, Skip
from llm.errors import DataError

ROWS = [{"text": f'Row {n}, "quoted"\nand é.', "other": str(n)} for n in range(300)]


def compress(name: str, data: bytes) -> bytes:
    if name.endswith(".zst"):
        return pytest.importorskip("backports.zstd").compress(data)
    if name.endswith(".gz"):
        return gzip.compress(data, mtime=0)
    if name.endswith(".bz2"):
        return bz2.compress(data)
    return lzma.compress(data) if name.endswith(".xz") else data


def jsonl(rows: object = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)  # type: ignore[attr-defined]


def table_csv() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["text", "other"])
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


def table_parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    out = io.BytesIO()
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=100)
    return out.getvalue()


DATA: dict[str, Callable[[], bytes]] = {
    ".jsonl": jsonl,
    ".json": lambda: json.dumps(ROWS).encode(),
    ".csv": table_csv,
    ".parquet": table_parquet,
}


def read(
    folder: Path, name: str, data: bytes, policy: str = "replace", **limits: float
) -> list[Record | Skip]:
    path = folder / "file"
    path.write_bytes(data)
    found = list(
        read_records(
            path,
            name,
            ReadOptions(
                decode_errors=policy,  # type: ignore[arg-type]
                text_document_bytes=1000,
                limits=ReadingConfig(**limits),  # type: ignore[arg-type]
                scratch=folder,
            ),
        )
    )
    assert [child.name for child in folder.iterdir()] == ["file"], "nothing else is left"
    return found


def texts(found: list[Record | Skip]) -> list[object]:
    return [
        record.value["text"] if isinstance(record.value, dict) else record.value
        for record in found
        if isinstance(record, Record)
    ]


def skips(found: list[Record | Skip]) -> list[tuple[str, int, str]]:
    return [(s.location.file, s.location.line, s.reason) for s in found if isinstance(s, Skip)]


def tar_of(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


@pytest.mark.parametrize("outer", ["", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", list(DATA))
def test_every_format_however_packed_gives_the_same_records(
    tmp_path: Path, suffix: str, compression: str, outer: str
) -> None:
    name = f"a/b{suffix}{compression}"
    data = compress(name, DATA[suffix]())
    if outer == ".zip":
        data, name = zip_of({name: data, "a/README": b"x"}), "all.zip"
    elif outer:
        long = outer.replace(".tgz", ".tar.gz")
        data, name = compress(long, tar_of({name: data, "a/README": b"x"})), f"all{outer}"
    found = read(tmp_path, name, data)
    assert texts(found) == [row["text"] for row in ROWS]
    refused = [(f"all{outer}/a/README", 1, "archive: unknown format")] if outer else []
    assert skips(found) == refused
    size_bytes = (tmp_path / "file").stat().st_size
    told = [record.location.read_bytes for record in found]
    assert told == sorted(told) and told[-1] <= size_bytes


def test_text_is_the_same_compressed_or_not(tmp_path: Path) -> None:
    data = b"Some words.\n\n" * 1000
    plain = read(tmp_path, "a.txt", data)
    assert "".join(map(str, texts(plain))).encode() == data
    for compression in (".gz", ".bz2", ".xz"):
        packed = read(tmp_path, f"a.txt{compression}", compress(compression, data))
        assert texts(packed) == texts(plain)
        assert [r.location.offset_bytes for r in packed] == [r.location.offset_bytes for r in plain]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("A.JSONL.GZ", Format(suffix=".jsonl", compression=".gz")),
        ("a.tar.zst", Format(suffix=".tar", compression=".zst")),
        ("a.txz", Format(suffix=".tar", compression=".xz")),
        ("a.zip", Format(suffix=".zip")),
        ("a.zip.gz", None),
        ("a.jsonl.gz.gz", None),
        ("a.gz", None),
        ("jsonl", None),
    ],
)
def test_a_name_says_how_to_read_a_file_or_says_nothing(name: str, expected: Format) -> None:
    assert format_of(name) == expected
    assert is_readable(name, "corpus") == (expected is not None)


def test_chats_are_read_from_records_only() -> None:
    assert is_readable("a.csv.gz", "chats") and is_readable("a.zip", "chats")
    assert not is_readable("a.txt", "chats") and not is_readable("a.md.gz", "chats")


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_several_streams_are_one_and_one_cut_off_is_an_error(
    tmp_path: Path, compression: str
) -> None:
    half = jsonl(ROWS[:150]), jsonl(ROWS[150:])
    parts = [compress(compression, part) for part in half]
    name = f"a.jsonl{compression}"
    assert texts(read(tmp_path, name, b"".join(parts))) == [row["text"] for row in ROWS]
    whole = b"".join(parts)
    for cut in (len(parts[0]) + 3, len(whole) // 3, len(whole) - 1, 5):
        with pytest.raises(DataError, match=r"damaged or truncated.*download it again"):
            read(tmp_path, name, whole[:cut])
    with pytest.raises(DataError, match="damaged"):
        read(tmp_path, name, parts[0] + b"what follows is no stream")


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_never_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, compression: str, place: float, bit: int
) -> None:
    damaged = bytearray(compress(compression, jsonl()))
    damaged[int(place * len(damaged))] ^= 1 << bit
    try:
        read(tmp_path_factory.mktemp("f"), f"a.jsonl{compression}", bytes(damaged))
    except DataError as error:
        assert "a.jsonl" in str(error)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_bomb_ends_at_the_limit(
    tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm.data.raw.compression.FREE_BYTES", 1 << 20)
    bomb = compress(compression, bytes(2 << 20))
    with pytest.raises(DataError, match=r"decompress to more than 1,048,576; .*max_ratio"):
        read(tmp_path, f"a.txt{compression}", bomb, max_ratio=2)
    with pytest.raises(DataError, match=r"decompress to more than 1,000"):
        read(tmp_path, f"a.txt{compression}", bomb, max_unpacked_bytes=1000)
    with pytest.raises(DataError, match=r"decompress to more than 1,048,576"):
        read(tmp_path, "a.zip", zip_of({"b.txt": bytes(2 << 20)}), max_ratio=2)
    with pytest.raises(DataError, match=r"decompress to more than 1,048,576"):
        read(tmp_path, "a.zip", zip_of({f"b.txt{compression}": bomb}), max_ratio=2)


@pytest.mark.parametrize(
    ("module", "name"), [("backports", "a.jsonl.zst"), ("pyarrow", "a.parquet")]
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"a\.\S+: to read .* needed; pip install {module}"):
        read(tmp_path, name, b"x")


@pytest.mark.parametrize(
    ("data", "reasons", "kept"),
    [
        (b"text\n1,2\n3\n", [(2, "wrong number of columns")], ["3"]),
        (b"text\n\n3", [(2, "empty")], ["3"]),
        (b'text\n"a"b\n3\n', [(2, "malformed CSV")], ["3"]),
        (b'text\n"never closed\n3\n', [(2, "malformed CSV")], []),
        (b'text\r\n"a\r\nb"\r\n"c""d"\r\n', [], ["a\r\nb", 'c"d']),
        (b'text\n5" pipe\n3\n', [], ['5" pipe', "3"]),
        (b"text\na\x00b\n", [], ["a\x00b"]),
        (b"\xef\xbb\xbftext\na\n", [], ["a"]),
        (b"text\n\xff\n", [], ["\ufffd"]),
    ],
)
def test_csv_is_read_as_it_is_or_skipped_with_its_line(
    tmp_path: Path, data: bytes, reasons: list[tuple[int, str]], kept: list[str]
) -> None:
    found = read(tmp_path, "a.csv", data)
    assert texts(found) == kept
    assert [(line, reason) for _, line, reason in skips(found)] == reasons


@pytest.mark.parametrize("data", [b"", b"\n", b"text,text\n1,2\n", b'"a'])
def test_a_csv_without_good_names_is_an_error_or_empty(tmp_path: Path, data: bytes) -> None:
    if not data:
        assert read(tmp_path, "a.csv", data) == []
    else:
        with pytest.raises(DataError, match="the first line must name each column once"):
            read(tmp_path, "a.csv", data)


FIELDS = st.text(st.sampled_from('a,"\n\ré'), max_size=6)


@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=8))
def test_csv_is_split_as_the_standard_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]]
) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([("text", "b"), *rows])
    found = read(tmp_path_factory.mktemp("f"), "a.csv", text.getvalue().encode())
    assert [tuple(r.value.values()) for r in found if isinstance(r, Record)] == rows  # type: ignore[union-attr]
    assert len(found) == len(rows)


def test_parquet_of_wrong_types_and_invalid_text_is_reported(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    broken = pyarrow.array([b"good", b"b\xffd", None]).cast(pyarrow.binary())
    column = pyarrow.StringArray.from_buffers(3, *broken.buffers()[1:], broken.buffers()[0])
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    (tmp_path / "t").unlink()
    assert texts(read(tmp_path, "a.parquet", data)) == ["good", "b\ufffdd", None]
    assert skips(read(tmp_path, "a.parquet", data, "skip")) == [("a.parquet", 2, "invalid UTF-8")]
    with pytest.raises(DataError, match=r"a\.parquet: byte 1 \(line 2\) is not UTF-8"):
        read(tmp_path, "a.parquet", data, "strict")
    for cut in (len(data) - 1, len(data) // 2, 3):
        with pytest.raises(DataError, match="Parquet file is damaged"):
            read(tmp_path, "a.parquet", data[:cut])


def test_a_parquet_bomb_ends_at_the_limit(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    out = io.BytesIO()
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 200, pyarrow.int32()), pyarrow.array(["x" * (1 << 20)])
    )
    parquet.write_table(pyarrow.table({"text": column}), out, compression="snappy")
    assert len(out.getvalue()) < 1 << 20
    with pytest.raises(DataError, match="decompress to more than 67,108,864"):
        read(tmp_path, "a.parquet", out.getvalue(), max_ratio=2)
