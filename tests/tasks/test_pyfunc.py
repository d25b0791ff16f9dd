"""A logged model is self-contained: a fresh process loads it and it answers prompts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.data.chat import Message, render_prompt
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.model.transformer import Transformer
from llm.model.weights import load_model, save_model
from llm.tokenizer.bpe import ByteLevelBPE
from llm.tokenizer.load import load_tokenizer
from tasks.tracking.journal import ModelFinished
from tests.tasks.tracked_folder import SUMMARY, TrackedFolder, start_model, write_points

pytestmark = pytest.mark.slow

ASK = """
import json, sys, mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
frame = pandas.DataFrame({"prompt": json.loads(sys.argv[2])})
answers = model.predict(frame, params=json.loads(sys.argv[3]))
import llm
print(json.dumps({"answers": answers["completion"].tolist(), "code": llm.__file__}))
"""
PARAMETERS = {"max_new_tokens": 5, "temperature": 1.0, "seed": 1}
PROMPTS = ["def f(", "<|end|>\\u00e9 "]


@pytest.fixture
def model_folder(tracked: TrackedFolder) -> Path:
    """A model with random weights and a tokenizer that learned little."""
    tokenizer = ByteLevelBPE.train(["def f(x): return x\n"] * 50, 300)
    config = ModelConfig(num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, d_ff=64)
    model = Transformer(config, tokenizer.vocab_size, 64)
    model.initialize(torch.Generator().manual_seed(1))
    folder = tracked.path / "model"
    writer = ArtifactWriter(folder)
    save_model(writer, model, tokenizer.to_files())
    writer.write_bytes("metrics.jsonl", b"", is_log=True)
    writer.finish(stage="finetune", summary=SUMMARY)
    return folder


def log_model(tracked: TrackedFolder, folder: Path, stage: str) -> str:
    """Have the model logged as a run would, and return its id in MLflow."""
    tracker = tracked.start()
    start_model(tracker, tracked.work, stage)
    write_points(tracked.work, range(2))
    content = "text" if stage == "pretrain" else "chats"
    event = ModelFinished(
        stage=stage,
        role="",
        digest="d" * 32,
        folder=str(folder),
        summary={**SUMMARY, "content": content},
    )
    tracker.log(event)
    tracker.close()
    run = tracked.client.get_run(tracker.model_run_id(stage))
    return run.outputs.model_outputs[0].model_id


def ask(tracked: TrackedFolder, model_id: str) -> subprocess.CompletedProcess[str]:
    """Ask the logged model in a process that knows nothing but MLflow's address."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tracked.path),
        "MLFLOW_TRACKING_URI": tracked.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    return subprocess.run(
        [sys.executable, "-c", ASK, f"models:/{model_id}", *map(json.dumps, (PROMPTS, PARAMETERS))],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tracked.path,
        timeout=120,
    )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_logged_model_answers_in_a_fresh_process(
    tracked: TrackedFolder, model_folder: Path, stage: str
) -> None:
    done = ask(tracked, log_model(tracked, model_folder, stage))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tokenizer, model = load_tokenizer(model_folder), load_model(model_folder)
    if stage == "finetune":
        ids = [render_prompt([Message(role="user", content=p)], tokenizer) for p in PROMPTS]
    else:
        ids = [[tokenizer.bos_id, *text] for text in tokenizer.encode_batch(PROMPTS)]
    stop_ids = (tokenizer.end_id, tokenizer.bos_id)
    options = GenerationOptions(max_new_tokens=5, stop_ids=stop_ids, temperature=1.0, seed=1)
    answers = generate(model, ids, options)
    assert found["answers"] == [tokenizer.decode(answer) for answer in answers]
    assert any(found["answers"])
    assert "mlruns" in found["code"], "the code that was logged, not the one installed here"


def test_a_logged_model_whose_bytes_changed_is_refused(
    tracked: TrackedFolder, model_folder: Path
) -> None:
    model_id = log_model(tracked, model_folder, "finetune")
    (weights,) = (tracked.path / "mlruns").rglob("model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = ask(tracked, model_id)
    assert done.returncode != 0
    assert "missing or damaged" in done.stderr


def test_no_file_of_a_logged_model_is_a_pickle(tracked: TrackedFolder, model_folder: Path) -> None:
    log_model(tracked, model_folder, "finetune")
    (bundle,) = (tracked.path / "mlruns" / "models").iterdir()
    files = [path for path in bundle.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {
        "", ".json", ".jsonl", ".md", ".py", ".safetensors", ".sh", ".txt", ".yaml", ".yml",
    }  # fmt: skip
    assert not [path for path in files if path.read_bytes()[:1] == b"\x80"], "pickle's first byte"
