"""A full disk in any stage: one line with bytes needed and free, and the next run resumes."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from llm.errors import DiskFullError
from tasks.store import ArtifactStore
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LONG = pytest.mark.skipif("FROMSCRATCH_LONG" not in os.environ, reason="FROMSCRATCH_LONG=1 asks")
DATA = ("download corpus", "clean corpus", "train_tokenizer", "pack corpus")
MODELS = ("pretrain", "finetune", "evaluate")
BOTH = [
    pytest.param(DATA, id="data"),
    pytest.param(MODELS, id="models", marks=[pytest.mark.slow, LONG]),
]
SHARDS = ("clean.shard_bytes=8000", "pack.shard_bytes=8000")
# In a process of the stage that FULL_STAGE names nothing more can be written to an artifact, or,
# where the disk is full to the last byte, at all.
SITECUSTOMIZE = """
import errno, os, sys
if f"llm.{os.environ['FULL_STAGE']}" in sys.orig_argv:
    from llm import artifact

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if "FULL_TO_THE_LAST_BYTE" in os.environ:
        os.fsync = fail
    else:
        def open_full(self, path):
            init(self, path)
            self._file.close()
            self._file = open("/dev/full", "wb", buffering=0)

        init = artifact.HashingFile.__init__
        artifact.HashingFile.__init__ = open_full
"""


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set FULL_STAGE by it: the disk is full for that stage."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FULL_STAGE", "")
    return monkeypatch


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("steps", BOTH)
@pytest.mark.parametrize("last_byte", [False, True], ids=["nearly", "to the last byte"])
def test_full_disk_in_any_stage_is_one_line_and_what_is_done_stays(
    tmp_path: Path, full: pytest.MonkeyPatch, last_byte: bool, steps: Sequence[str]
) -> None:
    artifacts = tmp_path / "artifacts"
    overrides = [*tiny.write_sources(tmp_path), *SHARDS, "runtime.shard_workers=2"]
    if steps is MODELS:
        tiny.build(artifacts, overrides, "pack corpus")
        tiny.build(artifacts, overrides, "pack chats")
    if last_byte:
        full.setenv("FULL_TO_THE_LAST_BYTE", "1")
    for step in steps:
        stage = step.split()[0]
        display = tiny.SilentDisplay()
        full.setenv("FULL_STAGE", stage)
        before = set(ArtifactStore(artifacts).artifacts([stage]))
        with pytest.raises(DiskFullError) as caught:
            tiny.build(artifacts, overrides, step, display=display)
        message = str(caught.value)
        assert message.startswith(f"{stage}: ") and "\n" not in message
        assert "no space left" in message
        if not last_byte:
            assert "free" in message and ("needed" in message or "checkpoint of" in message)
        assert not [line for line in display.shown if "again" in line], "it was started again"
        assert set(ArtifactStore(artifacts).artifacts([stage])) == before
        assert not list(artifacts.glob("staging/*/out/manifest.json"))
        full.setenv("FULL_STAGE", "")
        assert tiny.build(artifacts, overrides, step)[step].status == "built"
    for folder in ArtifactStore(artifacts).artifacts([step.split()[0] for step in steps]):
        ArtifactStore(artifacts).verify(folder, is_thorough=True)


SCRIPT = """
import sys
from pathlib import Path
from llm.errors import DiskFullError
from tests import tiny

try:
    tiny.build(Path(sys.argv[1]), sys.argv[3:], sys.argv[2])
except DiskFullError as error:
    print(error)
"""
LEVELS_KIB = {
    "pack corpus": (8, 16, 32, 64, 128, 65536),
    "evaluate": (8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 65536),
}
TMPFS = """
mount -t tmpfs -o size=8k tmpfs "$1" || exit 77
for size in {levels}; do
    mount -o remount,size=${{size}}k "$1" || exit 77
    "{python}" -c "$2" "$1/artifacts" "${{@:3}}" || exit 1
done
echo $(ls "$1/artifacts")
"""
LIMITED = """
for size in {levels}; do
    (ulimit -f $size; exec "{python}" -c "$2" "$1/artifacts" "${{@:3}}") || exit 1
done
echo $(ls "$1/artifacts")
"""


@pytest.mark.parametrize(
    "last", ["pack corpus", pytest.param("evaluate", marks=[pytest.mark.slow, LONG])]
)
@pytest.mark.parametrize("kind", ["tmpfs", "ulimit"])
def test_disk_that_is_full_at_any_level_is_said_in_a_line_until_there_is_room(
    tmp_path: Path, kind: str, last: str
) -> None:
    """Real file systems: one that fills up, and a limit to the size of files."""
    overrides = tiny.write_sources(tmp_path)
    (tmp_path / "disk").mkdir()
    shell = (TMPFS if kind == "tmpfs" else LIMITED).format(
        levels=" ".join(map(str, LEVELS_KIB[last])), python=sys.executable
    )
    unshare = ["unshare", "--map-root-user", "--mount"] if kind == "tmpfs" else []
    done = subprocess.run(
        [*unshare, "bash", "-c", shell, "bash", str(tmp_path / "disk"), SCRIPT, last, *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if kind == "tmpfs" and (done.returncode == 77 or "unshare" in done.stderr):
        pytest.skip("no user may mount a file system here")
    assert done.returncode == 0, done.stderr
    *said, listed = done.stdout.splitlines()
    assert said, "every level was enough"
    for line in said:
        assert "bytes free, needed" in line or "checkpoint of" in line
    assert last.split()[0] in listed.split() and "damaged" not in listed.split()
