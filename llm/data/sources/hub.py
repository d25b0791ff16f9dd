"""The files of a Hugging Face dataset at one commit, read by this project's own readers.

`datasets` only lists the files of a configuration and split: its readers turn numbers into text and
missing keys into None (docs/decisions/0009-hub.md). A token comes from HF_TOKEN alone, the hub's
URL from HF_ENDPOINT.
"""

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from llm.config import SourceConfig
from llm.data.raw.formats import is_readable, readable_suffixes
from llm.errors import DataError

COMMIT = re.compile(r"[0-9a-f]{40}")
STREAM_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """A file of a dataset's repository at one commit."""

    path: str
    size_bytes: int
    sha256: str
    """Empty for a small file, which git stores by its blob id."""
    blob_id: str
    url: str

    @property
    def digest(self) -> str:
        """The expected result of `digest_of`."""
        return self.sha256 or self.blob_id


def resolve_commit(source: SourceConfig, role: str) -> str:
    """Return the commit of `hub_revision`; only a branch or a tag needs a request to the hub.

    Raises:
        DataError: no such dataset or revision, or a package is missing.
        ConnectionError: the hub cannot be reached.
    """
    if COMMIT.fullmatch(source.hub_revision):
        return source.hub_revision
    with _hub_errors(source, role) as hub:
        info = hub.HfApi(endpoint=_endpoint(), token=_token()).dataset_info(
            source.hub_name, revision=source.hub_revision
        )
    return str(info.sha)


def dataset_files(source: SourceConfig, role: str, commit: str) -> list[HubFile]:
    """List the files of the source's configuration and split at `commit`, in their order.

    Raises:
        DataError: no such dataset, configuration, split or commit; a missing package; or a file of
        an unknown format.
        ConnectionError: the hub cannot be reached.
    """
    with _hub_errors(source, role) as hub:
        from datasets import load_dataset_builder  # slow to import, and absent on a bare node

        builder: Any = load_dataset_builder(
            source.hub_name, source.hub_config or None, revision=commit, token=_token()
        )
        by_split = cast(dict[str, list[str]], builder.config.data_files or {})
        if source.hub_split not in by_split:
            raise DataError(
                f"download.{role}.hub_split: {source.hub_name} has no split {source.hub_split}; it"
                f" has {', '.join(map(str, by_split)) or 'none with files'}"
            )
        prefix = f"hf://datasets/{source.hub_name}@{commit}/"
        paths = [str(file).removeprefix(prefix) for file in by_split[source.hub_split]]
        api = hub.HfApi(endpoint=_endpoint(), token=_token())
        found = api.get_paths_info(source.hub_name, paths, revision=commit, repo_type="dataset")
        by_path = {info.path: info for info in found}
    if leaving := [path for path in paths if {"", ".", ".."} & set(path.split("/"))]:
        raise DataError(
            f"download.{role}.hub_name: {source.hub_name} has a file with the path {leaving[0]!r},"
            " outside of its folder"
        )
    if missing := [path for path in paths if path not in by_path or not is_readable(path, role)]:
        raise DataError(
            f"download.{role}.hub_name: the format of {missing[0]} in {source.hub_name} is"
            f" unknown, expected {readable_suffixes(role)}"
        )
    return [
        HubFile(
            path=path,
            size_bytes=by_path[path].size,
            sha256=by_path[path].lfs.sha256 if by_path[path].lfs else "",
            blob_id=by_path[path].blob_id,
            url=hub.hf_hub_url(
                source.hub_name, path, repo_type="dataset", revision=commit, endpoint=_endpoint()
            ),
        )
        for path in paths
    ]


@contextlib.contextmanager
def open_hub_file(
    source: SourceConfig, role: str, commit: str, file: HubFile
) -> Generator[IO[bytes]]:
    """Open a remote file for reading over the network.

    Raises:
        ConnectionError: while reading, the network or the hub failed.
    """
    with _hub_errors(source, role) as hub:
        system = hub.HfFileSystem(endpoint=_endpoint(), token=_token())
        address = f"datasets/{source.hub_name}@{commit}/{file.path}"
        with system.open(address, "rb", block_size=STREAM_BLOCK_BYTES) as remote:
            yield io.BufferedReader(remote)


def digest_of(file: HubFile, path: Path) -> str:
    """Return the sha256 of the file at `path`, or its git blob id if the hub knows only that."""
    hasher = hashlib.sha256()
    if not file.sha256:
        hasher = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hasher).hexdigest()


def authorization() -> str:
    """Return the Authorization header, empty without a token."""
    token = _token()
    return f"Bearer {token}" if token else ""


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # False: nor a token stored by another program


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


@contextlib.contextmanager
def _hub_errors(source: SourceConfig, role: str) -> Generator[Any]:
    """Yield the module `huggingface_hub`, and translate its errors."""
    name = f"download.{role}: the dataset {source.hub_name} at {source.hub_revision[:12]}"
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise DataError(
            f"download.{role}.kind: hub needs the package `huggingface_hub`; pip install it, or"
            " set another kind"
        ) from error
    transport_error = cast(Any, errors).HTTPError  # httpx or httpx2, by version
    try:
        yield huggingface_hub
    except ImportError as error:
        raise DataError(
            f"download.{role}.kind: hub needs the package `datasets`; pip install datasets, or set"
            " another kind"
        ) from error
    except (DataError, ConnectionError):
        raise
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        kind = ConnectionError if status >= 500 or status in (408, 429) else DataError
        raise kind(f"{name} cannot be read: the hub answered {status}: {error}") from error
    except (transport_error, TimeoutError) as error:
        raise ConnectionError(f"{name} cannot be reached: {error}") from error
    except (OSError, ValueError, KeyError) as error:  # raised by datasets
        raise DataError(f"{name} cannot be read: {error}") from error
