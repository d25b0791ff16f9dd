"""Hostile zip and tar files: paths that leave the archive, members that are not files."""

import io
import tarfile
import zipfile

LEADS_OUT = "name leads out of the archive"
BAD_NAMES = {
    "../a.txt": LEADS_OUT,
    "a/../../b.txt": LEADS_OUT,
    "/etc/passwd.txt": LEADS_OUT,
    "//host/share/a.txt": LEADS_OUT,
    "C:\\windows\\a.txt": LEADS_OUT,
    "c:a.txt": LEADS_OUT,
    "..\\..\\a.txt": LEADS_OUT,
    "\\\\host\\share\\a.txt": LEADS_OUT,
    "a/..": LEADS_OUT,
    "inner.zip": "archive in an archive",
    "inner.tar.gz": "archive in an archive",
    "inner.TGZ": "archive in an archive",
    "a.exe": "unknown format",
    "a": "unknown format",
    ".hidden.txt": "hidden",
    "b/._a.txt": "hidden",
}
NO_FILES = {
    "link": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "character device": tarfile.CHRTYPE,
    "block device": tarfile.BLKTYPE,
    "pipe": tarfile.FIFOTYPE,
    "sparse": tarfile.GNUTYPE_SPARSE,
    "unknown": b"Z",
}


def tar(*entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for info, data in entries:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def entry(
    name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, **pax: str
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, "/etc/passwd", pax
    return info, data


def zipped(*entries: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return out.getvalue()
