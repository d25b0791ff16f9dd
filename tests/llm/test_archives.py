"""Archives: no member leaves the folder, is opened against the rules, or is silently lost."""

import io
import os
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm.config import ReadingConfig
from llm.data.raw.archives import members
from llm.data.raw.compression import Budget
from llm.errors import DataError
from tests.llm.hostile_archives import BAD_NAMES, NO_FILES, entry, tar, zipped


def read(data: bytes, suffix: str, **limits: int) -> list[tuple[str, str, bytes]]:
    chosen = ReadingConfig(**limits)
    budget = Budget("a", len(data), chosen)
    return [
        (member.name, member.refusal, member.file.read() if member.file else b"")
        for member in members(io.BytesIO(data), suffix, "a", budget, chosen)
    ]


@pytest.mark.parametrize("name", list(BAD_NAMES))
@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_a_bad_name_is_refused_and_the_rest_is_read(suffix: str, name: str) -> None:
    if suffix == ".tar":
        data = tar(entry(name), entry("b.txt", b"good"))
    else:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        data = zipped((info, b"x"), ("b.txt", b"good"))
    (_, refusal, nothing), (shown, reason, good) = read(data, suffix)
    expected = BAD_NAMES[name] if suffix == ".tar" or os.sep == "/" else ""
    assert (refusal, nothing) == (expected, b"")
    assert (shown, reason, good) == ("a/b.txt", "", b"good")


@pytest.mark.parametrize("kind", list(NO_FILES.values()), ids=list(NO_FILES))
def test_tar_members_that_are_not_regular_files_are_refused(kind: bytes) -> None:
    data = tar(entry("a.txt", b"", kind), entry("b.txt", b"good"))
    assert read(data, ".tar") == [("a/a.txt", "no plain file", b""), ("a/b.txt", "", b"good")]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO])
def test_zip_members_that_are_not_regular_files_are_refused(kind: int) -> None:
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = (kind | 0o644) << 16
    data = zipped((info, b"/etc/passwd"), ("b.txt", b"good"))
    assert read(data, ".zip") == [("a/a.txt", "no plain file", b""), ("a/b.txt", "", b"good")]


def test_encrypted_and_oddly_compressed_members_are_refused() -> None:
    data = bytearray(zipped(("a.txt", b"x")))
    place = data.rindex(b"PK\x01\x02")
    data[place + 8] |= 1
    assert read(bytes(data), ".zip") == [("a/a.txt", "encrypted", b"")]
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 99):
        data = bytearray(zipped(("a.txt", b"x")))
        struct.pack_into("<H", data, data.rindex(b"PK\x01\x02") + 10, method)
        assert read(bytes(data), ".zip") == [("a/a.txt", "unknown compression", b"")]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_folders_are_no_members(suffix: str) -> None:
    folder, file = entry("d", b"", tarfile.DIRTYPE), entry("d/b.txt", b"good")
    data = tar(folder, file) if suffix == ".tar" else zipped(("d/", b""), ("d/b.txt", b"good"))
    assert read(data, suffix) == [("a/d/b.txt", "", b"good")]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_more_members_than_allowed_are_an_error(suffix: str) -> None:
    names = [f"{number}.txt" for number in range(4)]
    data = tar(*map(entry, names)) if suffix == ".tar" else zipped(*((n, b"x") for n in names))
    assert len(read(data, suffix, max_members=4)) == 4
    with pytest.raises(DataError, match=r"a: more than 3 members; .*clean\.reading\.max_members"):
        read(data, suffix, max_members=3)


def test_a_zip_that_lies_about_its_number_of_members_is_refused_before_they_are_listed() -> None:
    data = bytearray(zipped(*((f"{number}.txt", b"x") for number in range(50))))
    struct.pack_into("<HH", data, data.rindex(b"PK\x05\x06") + 8, 1, 1)
    with pytest.raises(DataError, match="more than 49 members"):
        read(bytes(data), ".zip", max_members=49)


def test_members_that_share_their_bytes_are_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm.data.raw.compression.FREE_BYTES", 1 << 20)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = compressor.compress(bytes(1 << 19)) + compressor.flush()
    crc, size = zlib.crc32(bytes(1 << 19)), 1 << 19
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(body), size, 5, 0)
    listed = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(body), size,
                         5, 0, 0, 0, 0, 0, 0) + b"a.txt"  # fmt: skip
    start = len(local) + 5 + len(body)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, 9 * len(listed), start, 0)
    with pytest.raises(
        DataError, match=r"decompress to more than|damaged"
    ):  # newer Pythons detect it
        read(local + b"a.txt" + body + 9 * listed + end, ".zip")


def test_a_header_too_long_for_memory_is_an_error() -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 8 << 30
        with pytest.raises(DataError, match=r"damaged \(a header of 8,589,934,592 bytes\)"):
            read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), ".tar")


@pytest.mark.parametrize("size", ["-1", "x", "99999999999999999999"])
def test_a_member_that_lies_about_its_size_is_an_error(size: str) -> None:
    with pytest.raises(DataError, match=r"damaged|truncated"):
        read(tar(entry("a.txt", b"x", size=size)), ".tar")


def test_a_sparse_file_in_attributes_is_refused() -> None:
    data = tar(entry("a.txt", b"1\n0\n9\n", **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}))
    assert read(data, ".tar") == [("a/a.txt", "no plain file", b"")]


def test_long_names_of_every_kind_are_known_and_shown_short() -> None:
    name = "x" * 300 + "/é.txt"
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        ((shown, refusal, data),) = read(tar(entry(name), format=format), ".tar")
        assert (refusal, data) == ("", b"x") and shown.startswith("a/xxx") and len(shown) < 210


def test_control_characters_of_names_are_not_shown() -> None:
    ((shown, _, _),) = read(tar(entry("\x1b[2J\na\u202eb.txt")), ".tar")
    assert shown == "a/?[2J?a?b.txt"


NAMES = st.text("abé/ ", min_size=1, max_size=120).map(lambda name: f"m/{name.strip('/')}.txt")


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_tar_is_read_as_tarfile_reads_it(files: list[tuple[str, bytes]], format: int) -> None:
    try:
        data = tar(*(entry(name, body) for name, body in files), format=format)
    except ValueError:
        return  # a name too long for ustar
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        expected = [archive.extractfile(info).read() for info in archive]  # type: ignore[union-attr]
    found = [(refusal, body) for _, refusal, body in read(data, ".tar")]
    is_hidden = [name.rpartition("/")[2].startswith(".") for name, _ in files]
    both = zip(is_hidden, expected, strict=True)
    assert found == [("hidden", b"") if hidden else ("", body) for hidden, body in both]


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), is_cut=st.booleans())
def test_a_damaged_archive_is_an_error_or_read_and_never_a_traceback(
    suffix: str, place: float, value: int, is_cut: bool
) -> None:
    names = ["a.txt", "b/c.txt"]
    whole = tar(*map(entry, names)) if suffix == ".tar" else zipped(*((n, b"x") for n in names))
    data = bytearray(whole)
    index = int(place * len(data))
    data[index] = value
    try:
        found = read(bytes(data[:index]) if is_cut else bytes(data), suffix)
    except DataError as error:
        assert "a" in str(error)
    else:
        assert len(found) == 2 or suffix == ".zip"


def test_a_tar_cut_off_between_members_is_an_error() -> None:
    data = tar(entry("a.txt"), entry("b.txt"))
    for end in (1024, 512, 700, 2048, 0):
        with pytest.raises(DataError, match="truncated"):
            read(data[:end], ".tar")
    with pytest.raises(DataError, match="data after the end"):
        read(data + tar(entry("c.txt")), ".tar")


def test_reading_an_archive_writes_and_opens_no_file(tmp_path: Path) -> None:
    watched: list[str] = []
    is_watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and event in ("open", "os.mkdir", "os.symlink", "os.link", "os.rename"):
            watched.append(f"{event} {arguments[0]}")

    bad = [entry(name) for name in BAD_NAMES] + [entry("a.txt", b"", k) for k in NO_FILES.values()]
    data = tar(*bad)
    read(data, ".tar")  # so that lazy imports are done
    sys.addaudithook(watch)  # a hook cannot be removed, only disabled
    try:
        read(data, ".tar")
    finally:
        is_watching = False
    assert watched == []
