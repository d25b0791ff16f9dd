"""Archives, addresses and links that would leave their folder or fill the disk (promise 19).

Each case cleans one hostile file beside good ones. It must end in a counted skip or a DataError,
and every file outside the stage's own folder must be as it was.
"""

import bz2
import functools
import gzip
import hashlib
import io
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from llm.artifact import ArtifactWriter, Json
from llm.config import SourceConfig
from llm.data.sources.fingerprint import list_files
from llm.download import download
from llm.errors import DataError
from llm.runtime.job import Job
from tests.chaos.counting import Case
from tests.llm.cleaning import TEXTS, corpus, run_clean, texts_of
from tests.llm.hostile_archives import BAD_NAMES, LEADS_OUT, NO_FILES, entry, tar, zipped
from tests.llm.http_server import HostileServer, answer

SECRET = "What lies outside and is not to be read."
BOMB_BYTES = 70 << 20
"""More than any file may decompress to."""
LIMITS: dict[str, Json] = {"reading": {"max_unpacked_bytes": 1 << 20}}

Make = Callable[[Path], bytes]


def clean_one(folder: Path, name: str, data: bytes, expected: str, **settings: Json) -> None:
    """Clean the file `name` beside good ones; `expected` is the reason of a skip or an error."""
    job = folder / "a" / "b" / "job"
    job.mkdir(parents=True)
    (folder / "secret.txt").write_text(SECRET)
    before = snapshot(folder, job)
    try:
        summary, outputs, _ = run_clean(
            job, {name: data, "z.jsonl": corpus(TEXTS)}, validation_fraction=0.2, **settings
        )
    except DataError as error:
        assert expected in str(error) and name in str(error), str(error)
    else:
        assert expected in summary["skipped"], summary["skipped"]  # type: ignore[operator]
        assert all(example["file"].startswith(name) for example in outputs["rejected"])  # type: ignore[union-attr]
        found = texts_of(outputs["train"] + outputs["validation"])
        assert found <= {*TEXTS, "good"} and set(TEXTS) <= found
    assert snapshot(folder, job) == before, "a file outside was touched"
    left = {path.name for path in (job / "raw" / "files").rglob("*")}
    assert left == {name, "z.jsonl"}, "an archive was unpacked"


def snapshot(folder: Path, job: Path) -> dict[str, bytes]:
    """Return the bytes of all files below `folder` except the job's, and all links."""
    return {
        str(path): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if job not in path.parents and (path.is_symlink() or path.is_file())
    }


def named(suffix: str, name: str) -> bytes:
    """Return an archive with a member of this name and a valid one."""
    if suffix == ".tar":
        return tar(entry(name, b"evil"), entry("b.txt", b"good"))
    info = zipfile.ZipInfo("placeholder")
    info.filename = name
    return zipped((info, b"evil"), ("b.txt", b"good"))


def linked(kind: bytes, folder: Path) -> bytes:
    """Return a tar with a member of this type that points outside."""
    info, data = entry("a.txt", b"", kind)
    info.linkname = str(folder / "secret.txt")
    return tar((info, data), entry("b.txt", b"good"))


def linked_zip(kind: int, folder: Path) -> bytes:
    """Return the same as a zip."""
    info = zipfile.ZipInfo("a.txt")
    info.external_attr = (kind | 0o644) << 16
    return zipped((info, str(folder / "secret.txt").encode()), ("b.txt", b"good"))


def through_a_link() -> bytes:
    """Return a tar that links a name to a folder outside, then writes below that name."""
    info, data = entry("d", b"", tarfile.SYMTYPE)
    info.linkname = "../../.."
    return tar((info, data), entry("d/secret.txt", b"good"))


def patched(data: bytes, mark: bytes, place: int, form: str, *values: int) -> bytes:
    """Return a zip with a field after the last `mark` set."""
    changed = bytearray(data)
    struct.pack_into(form, changed, changed.rindex(mark) + place, *values)
    return bytes(changed)


def overlapping_zip(num_members: int) -> bytes:
    """Return a zip with overlapping members (Fifield 2019, "A better zip bomb")."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    plain = bytes(8 << 20)
    body = compressor.compress(plain) + compressor.flush()
    common = (0, 8, 0, 0, zlib.crc32(plain), len(body), len(plain), 5, 0)
    local = struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, *common) + b"a.txt"
    listed = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *common, 0, 0, 0, 0, 0) + b"a.txt"
    start = len(local) + len(body)
    end = struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, num_members, num_members, num_members * len(listed),
        start, 0,
    )  # fmt: skip
    return local + body + num_members * listed + end


def many(suffix: str) -> bytes:
    """Return an archive of 300 members."""
    names = [f"{number}.txt" for number in range(300)]
    return (
        tar(*map(entry, names)) if suffix == ".tar" else zipped(*((name, b"x") for name in names))
    )


def long_header(kind: bytes) -> bytes:
    """Return a tar with a header that declares a name of 8 GiB."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 8 << 30
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


def gzip_bomb() -> bytes:
    return gzip.compress(bytes(BOMB_BYTES), mtime=0)


def zstd_bomb() -> bytes:
    from backports import zstd

    return zstd.compress(bytes(BOMB_BYTES))


def parquet_bomb() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    column = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 200, pyarrow.int32()), pyarrow.array(["x" * (1 << 20)])
    )
    parquet.write_table(pyarrow.table({"text": column}), out, compression="snappy")
    return out.getvalue()


def by_address(folder: Path, path: str) -> None:
    """Fetch from a URL whose path would lead outside."""
    job = Job(stage="download", role="corpus", settings={})
    job.out, job.work = folder / "a" / "b" / "out", folder / "a" / "b" / "work"
    job.work.mkdir(parents=True)
    body = b"One text."
    sha256 = hashlib.sha256(body).hexdigest()
    with HostileServer([answer(body)]) as server:
        job.settings = {"kind": "url", "url": server.url + path, "sha256": sha256}
        try:
            download(job, ArtifactWriter(job.out))
        except DataError as error:
            assert "download.corpus.url" in str(error)
        else:
            (found,) = [one for one in (job.out / "files").rglob("*") if one.is_file()]
            assert found.parent == job.out / "files" and found.read_bytes() == body
    assert snapshot(folder, folder / "a" / "b") == {}


def by_link(folder: Path, target: str) -> None:
    """List a folder of local files in which a link leads to a folder outside."""
    source, outside = folder / "source", folder / "outside"
    for place in (source / "inside", outside):
        place.mkdir(parents=True)
        (place / "a.txt").write_text("x")
    (source / "link").symlink_to(target)
    found = list_files(SourceConfig(kind="files", path=str(source)), "corpus")
    assert [name for name, _ in found.files] == ["inside/a.txt"]


def archive_cases() -> dict[str, Case]:
    """Return every case by name."""
    cases: dict[str, Case] = {}

    def add(title: str, name: str, make: Make, expected: str, **settings: Json) -> None:
        def case(folder: Path) -> None:
            clean_one(folder, name, make(folder), expected, **settings)

        cases[title] = case

    for suffix in (".tar", ".zip"):
        for name, reason in BAD_NAMES.items():
            make = functools.partial(lambda suffix, name, _: named(suffix, name), suffix, name)
            add(f"{suffix}: {name}", f"a{suffix}", make, f"archive: {reason}")
        add(
            f"{suffix}: a name that is this machine's own", f"a{suffix}",
            functools.partial(lambda suffix, at: named(suffix, f"{at}/evil.txt"), suffix),
            f"archive: {LEADS_OUT}",
        )  # fmt: skip
        add(
            f"{suffix}: many members", f"a{suffix}",
            functools.partial(lambda suffix, _: many(suffix), suffix),
            "more than 299 members", reading={"max_members": 299},
        )  # fmt: skip
    for title, kind in NO_FILES.items():
        make = functools.partial(linked, kind)
        add(f".tar: a {title}", "a.tar", make, "archive: no plain file")
    for title, mode in (("link", stat.S_IFLNK), ("device", stat.S_IFBLK), ("pipe", stat.S_IFIFO)):
        make = functools.partial(linked_zip, mode)
        add(f".zip: a {title}", "a.zip", make, "archive: no plain file")
    add(".tar: a path through a link", "a.tar", lambda _: through_a_link(),
        "archive: no plain file")  # fmt: skip
    one = zipped(("a.txt", b"x"))
    listed, end = b"PK\x01\x02", b"PK\x05\x06"
    add(".zip: encrypted", "a.zip", lambda _: patched(one, listed, 8, "<H", 1),
        "archive: encrypted")  # fmt: skip
    add(".zip: unknown compression", "a.zip", lambda _: patched(one, listed, 10, "<H", 99),
        "archive: unknown compression")  # fmt: skip
    add(".zip: lies about its members", "a.zip",
        lambda _: patched(many(".zip"), end, 8, "<HH", 1, 1), "more than 299 members",
        reading={"max_members": 299})  # fmt: skip
    add(".zip: members that share their bytes", "a.zip", lambda _: overlapping_zip(20), "a.zip")
    for title, size in (("negative", "-1"), ("no number", "x"), ("endless", "9" * 20)):
        add(f".tar: a size that is {title}", "a.tar",
            functools.partial(lambda size, _: tar(entry("a.txt", b"x", size=size)), size),
            "archive is")  # fmt: skip
    add(".tar: a name of 8 GiB", "a.tar", lambda _: long_header(tarfile.GNUTYPE_LONGNAME),
        "archive is damaged")  # fmt: skip
    add(".tar: attributes of 8 GiB", "a.tar", lambda _: long_header(tarfile.XHDTYPE),
        "archive is damaged")  # fmt: skip
    add(".tar: sparse by its attributes", "a.tar",
        lambda _: tar(entry("a.txt", b"1\n0\n9\n", **{"GNU.sparse.major": "1"})),
        "archive: no plain file")  # fmt: skip
    add("bomb: .gz by its ratio", "a.txt.gz", lambda _: gzip_bomb(), "decompress to more than")
    add("bomb: .zst by its ratio", "a.txt.zst", lambda _: zstd_bomb(), "decompress to more than")
    add("bomb: .zip by its ratio", "a.zip", lambda _: deflated(bytes(BOMB_BYTES)),
        "decompress to more than")  # fmt: skip
    add("bomb: .gz in .tar by its ratio", "a.tar", lambda _: tar(entry("b.txt.gz", gzip_bomb())),
        "decompress to more than")  # fmt: skip
    add("bomb: .tar.gz by its ratio", "a.tgz",
        lambda _: gzip.compress(tar(entry("b.txt", bytes(BOMB_BYTES))), mtime=0),
        "decompress to more than")  # fmt: skip
    add("bomb: .bz2 by its bytes", "a.txt.bz2", lambda _: bz2.compress(bytes(2 << 20)),
        "decompress to more than 1,048,576", **LIMITS)  # fmt: skip
    add("bomb: .xz by its bytes", "a.txt.xz", lambda _: lzma.compress(bytes(2 << 20)),
        "decompress to more than 1,048,576", **LIMITS)  # fmt: skip
    add(
        "bomb: .parquet by its ratio",
        "a.parquet",
        lambda _: parquet_bomb(),
        "decompress to more than",
    )
    for path in (
        "/..%2f..%2fevil.txt", "/%2e%2e/%2e%2e%2fevil.txt", "/a/../../../evil.txt", "/.evil.txt",
        "/evil%00.txt", "/%2fetc%2fevil.txt", "/..%5c..%5cevil.txt",
    ):  # fmt: skip
        cases[f"address: {path}"] = functools.partial(by_address, path=path)
    for target in ("../outside", "..", "/", "."):
        cases[f"a local folder with a link to {target}"] = functools.partial(by_link, target=target)
    return cases


def deflated(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.txt", data)
    return out.getvalue()


ARCHIVE_CASES = archive_cases()
