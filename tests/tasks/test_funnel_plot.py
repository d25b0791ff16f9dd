"""The cleaning funnel is logged to MLflow as a table and a plot."""

import json
from pathlib import Path

from mlflow import MlflowClient

from llm.artifact import Json
from tests.tasks.tracked_folder import TrackedFolder, finish_stage, start_stage

FUNNEL: list[Json] = [
    {"step": "read", "dropped": 1, "left": 9},
    {"step": "near duplicates", "dropped": 4, "left": 5},
]


def test_the_funnel_is_a_table_and_a_plot(tracked: TrackedFolder, tmp_path: Path) -> None:
    tracker = tracked.start()
    start_stage(tracker, "clean", "corpus")
    summary: dict[str, Json] = {"read_documents": 10, "funnel": FUNNEL}
    finish_stage(tracker, "clean", "corpus", digest="c" * 32, summary=summary)
    tracker.close()
    run = tracked.runs("pipelines")["clean corpus"]
    assert run.data.metrics == {"seconds": 1.0, "read_documents": 10}
    assert not any("funnel" in name for name in run.data.tags if name.startswith("summary"))
    client: MlflowClient = tracked.client
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files >= {"funnel.json", "funnel.png"}
    table = json.loads(
        Path(client.download_artifacts(run.info.run_id, "funnel.json", str(tmp_path))).read_text()
    )
    assert table["columns"] == ["step", "dropped", "left"]
    assert table["data"] == [["read", 1, 9], ["near duplicates", 4, 5]]
