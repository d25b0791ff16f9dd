"""A journal keeps events in order and is sent by one process at a time."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.tracking.journal import (
    Dataset,
    Event,
    Journal,
    ModelFinished,
    ModelStarted,
    PipelineFinished,
    PipelineStarted,
    ReportFinished,
    StageCached,
    StageFinished,
    StageStarted,
)

EVENTS: list[Event] = [
    PipelineStarted(
        tracking_uri="sqlite:///x", project="p", name="n", settings={"a.b": 1.5}, links={}
    ),
    StageStarted(stage="pack", role="chats", key="k", tags={"reason": "é\n"}),
    StageFinished(
        stage="pack", role="chats", digest="d", seconds=1.0, summary={"n": 1}, status="FINISHED"
    ),
    StageCached(stage="clean", role="corpus", digest="d", run_id=""),
    ModelStarted(
        stage="pretrain",
        role="",
        key="k",
        settings={"seed": 1},
        datasets=[Dataset(name="rows", digest="d", path="/x", context="training")],
        work_folder="/work",
        links={},
    ),
    ModelFinished(stage="pretrain", role="", digest="d", folder="/f", summary={}, status="KILLED"),
    ReportFinished(folder="/r", models=["base"], metrics={"base/loss": 2}),
    PipelineFinished(status="FAILED"),
]


def read_all(journal: Journal) -> list[Event]:
    events: list[Event] = []
    while (entry := journal.next_entry()) is not None:
        events.append(entry.event)
        journal.acknowledge()
    return events


def test_every_event_is_read_as_it_was_written(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    for event in EVENTS:
        journal.append(event)
    journal.close()
    (again,) = Journal.abandoned(tmp_path)
    assert read_all(again) == EVENTS
    again.remove()
    assert not list(tmp_path.iterdir())


def test_an_entry_is_given_until_it_is_acknowledged(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    assert journal.next_entry() is None
    for event in EVENTS[:2]:
        journal.append(event)
    assert journal.next_entry() is journal.next_entry()
    journal.acknowledge()
    entry = journal.next_entry()
    assert entry is not None
    assert entry.event == EVENTS[1]
    journal.close()


def test_a_journal_whose_owner_lives_is_left_alone(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path)
    journal.append(EVENTS[0])
    assert list(Journal.abandoned(tmp_path)) == []
    with pytest.raises(BlockingIOError):
        Journal(journal.path)
    journal.close()


def test_a_killed_owner_leaves_its_journal_to_one_other(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tasks.tracking.journal import Journal, PipelineFinished
journal = Journal.create(Path({str(tmp_path)!r}))
journal.append(PipelineFinished(status="FINISHED"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    first, second = Journal.abandoned(tmp_path), Journal.abandoned(tmp_path)
    journal = next(first)
    assert list(second) == []
    assert read_all(journal) == [PipelineFinished(status="FINISHED")]
    journal.close()


def test_half_a_line_and_an_unknown_event_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "1.journal"
    path.write_text('{"event": "OfTheFuture", "at_ms": 1, "content": {}}\nnonsense\n')
    journal = Journal(path)
    journal.append(EVENTS[0])
    with path.open("ab") as file:
        file.write(b'{"event": "Pipe')  # the disk was full, or the machine stopped
    assert read_all(journal) == EVENTS[:1]
    assert caplog.text.count("skipped") == 2
    journal.close()


def _send_all(folder: Path, sent: "multiprocessing.Queue[str]") -> None:
    for journal in Journal.abandoned(folder):
        for event in read_all(journal):
            assert isinstance(event, StageStarted)
            sent.put(event.key)
        journal.remove()


def test_many_processes_send_every_journal_once(tmp_path: Path) -> None:
    for number in range(30):
        journal = Journal(tmp_path / f"{number}.journal")
        journal.append(StageStarted(stage="pack", role="", key=str(number), tags={}))
        journal.close()
    context = multiprocessing.get_context("spawn")
    sent: multiprocessing.Queue[str] = context.Queue()
    processes = [context.Process(target=_send_all, args=[tmp_path, sent]) for _ in range(3)]
    for process in processes:
        process.start()
    keys = [sent.get(timeout=30) for _ in range(30)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(keys, key=int) == [str(number) for number in range(30)]
    assert sent.empty()
    assert not list(tmp_path.iterdir())
    sent.close()


def test_appending_costs_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waits for the disk"))
    journal = Journal.create(tmp_path)
    journal.append(EVENTS[0])
    journal.close()
