"""An error in any process of a run reaches the command line: message, type and exit code."""

from pathlib import Path

import pytest

from tests.flows.orchestrated import printed_by, start_run

pytestmark = pytest.mark.slow

# Processes of FAILING_PART of FAILING_STAGE raise the error named by FAILING_WITH.
SITECUSTOMIZE = """
import os
if "FAILING_PART" in os.environ:
    from llm import errors
    from llm.runtime import job

    def fail(of):
        rank = os.environ.get("RANK")
        part = "shard" if of.shard else f"rank {rank}" if rank else "stage"
        if (of.stage, part) == (os.environ["FAILING_STAGE"], os.environ["FAILING_PART"]):
            raise getattr(errors, os.environ["FAILING_WITH"])("pack.seq_len: too large")

    job._refuse_changed_code = fail
"""


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("errors") / "artifacts"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "part", "kind", "code"),
    [
        ("clean", "stage", "ConfigError", 2),
        ("clean", "shard", "ConfigError", 2),
        ("clean", "shard", "DataError", 1),
        pytest.param("pretrain", "rank 1", "ConfigError", 2, marks=pytest.mark.slow),
    ],
)
def test_error_of_any_process_is_one_line_with_its_exit_code(
    stage: str, part: str, kind: str, code: int, artifacts: Path, prefect_server: dict[str, str]
) -> None:
    (artifacts.parent / "sitecustomize.py").write_text(SITECUSTOMIZE)
    failing = {"FAILING_STAGE": stage, "FAILING_PART": part, "FAILING_WITH": kind}
    run = start_run(
        artifacts,
        "clean.shard_bytes=3000",
        "runtime.shard_workers=2",
        "runtime.num_processes=2",
        "runtime.device=cpu",
        **prefect_server,
        **failing,
        PYTHONPATH=str(artifacts.parent),
    )
    said = printed_by(run)
    assert run.returncode == code, said
    assert f"error: {stage}: pack.seq_len: too large\n" in said
    assert "Traceback" not in said and "again" not in said
