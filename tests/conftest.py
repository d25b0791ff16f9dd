"""Settings that hold for all tests; read before any test module imports torch."""

import os
from collections.abc import Iterator

import pytest

# On matrices this small threads cost more than they give. On a busy machine they wait for each
# other awake: one test of test_loop.py took 152 s with two threads and 12 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A Prefect server; yield the environment of its clients."""
    # here, because tests of llm/ alone run without prefect
    from flows.services.temporary_server import TemporaryPrefectServer

    server = TemporaryPrefectServer(tmp_path_factory.mktemp("prefect"))
    try:
        server.wait_ready()
        yield server.environment
    finally:
        server.stop()
