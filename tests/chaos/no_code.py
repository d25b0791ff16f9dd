"""Nothing that is loaded can run code (promise 18). This is the process that is watched:

    python -m tests.chaos.no_code FOLDER all|few

It makes one good thing of each kind that the project loads, replaces each of its files by each of a
dozen hostile contents, and loads that under an audit hook: Python itself then says what is opened,
imported, run, unpickled, started or connected to. Prints a line of JSON for each load.
"""

import functools
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from llm.artifact import MANIFEST, ArtifactWriter, file_sha256, load_artifact, read_manifest
from llm.config import OptimizationConfig, SourceConfig
from llm.data.documents import DocumentReader
from llm.data.packed import PackedSequences
from llm.data.sources.fingerprint import fingerprint
from llm.errors import FromscratchError
from llm.exchange.folders import export_model, import_model, load_both
from llm.exchange.import_tokenizer import import_tokenizer
from llm.model.weights import save_model
from llm.recipes import load_config
from llm.tokenizer.load import load_tokenizer
from llm.tokenizer.sentencepiece import SentencePieceTokenizer
from llm.training.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from llm.training.loop import TrainState
from llm.training.optimizers import make_optimizer
from tests.chaos.counting import Figure
from tests.chaos.small_data import LONG, TEXTS, lines, rows_of
from tests.chaos.tokenizer_promises import CORPUS, TOKENIZERS
from tests.llm.cleaning import run_clean
from tests.llm.hostile_archives import entry, tar, zipped
from tests.llm.training_setup import tiny_model

ROOT = Path(__file__).parents[2]
TRUSTED = tuple({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, ROOT)})
NEVER = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn",
    "os.fork", "os.forkpty", "pty.spawn", "socket.connect", "socket.bind", "socket.getaddrinfo",
    "ctypes.dlopen", "code.__new__", "os.putenv", "builtins.input", "webbrowser.open",
    "urllib.Request", "sys.addaudithook",
)  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.chmod",
           "os.chown", "os.truncate", "shutil.move", "shutil.copyfile")  # fmt: skip
MOST_MEMORY_BYTES = 6 << 30  # for what unfolds without end: an error, and not the machine's end
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


RAW_SUFFIXES = (
    ".parquet", ".jsonl", ".json", ".csv", ".zip", ".tar", ".tar.gz", ".txt.gz", ".txt.xz",
    ".txt.bz2", ".txt.zst", ".txt",
)  # fmt: skip
UNTOUCHED = "x"
FEW = ("a pickle", "YAML that calls", "JSON 100,000 deep", "a header that lies")
"""The contents that a test tries."""


class Watch:
    """Keeps the events that loading data must not cause, while it is on."""

    def __init__(self, folder: Path) -> None:
        """Allow changes below `folder` alone."""
        self.folder, self.is_on, self.seen = str(folder), False, list[str]()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        self.is_on = False  # what is done here is not heard
        try:
            if self._is_wrong(event, arguments):
                self.seen.append(f"{event} {arguments!r}"[:300])
        finally:
            self.is_on = True

    def _is_wrong(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            is_writing = bool(flags & WRITING) or set(str(arguments[1] or "")) & set("wax+")
            return bool(is_writing) and not self._is_inside(arguments[0])
        if event in CHANGES:
            paths = [one for one in arguments if isinstance(one, str | bytes)]
            folders = [one for one in arguments[-1:] if isinstance(one, int) and one >= 0]
            at = os.readlink(f"/proc/self/fd/{folders[0]}") if folders else ""  # noqa: PTH115
            return not all(self._is_inside(Path(at, os.fsdecode(one))) for one in paths)
        if event == "exec":
            name = getattr(arguments[0], "co_filename", "")
            return not name.startswith(("<frozen ", *TRUSTED))
        return event in NEVER

    def _is_inside(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self.folder)


class Attack:
    """Pickled, a call that leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def hostile_contents(marker: Path) -> dict[str, bytes]:
    """Return what each file is replaced by; `marker` is a file that must never be there."""
    pickled, call = pickle.dumps(Attack(marker)), f"touch {marker}"
    torch_file = io.BytesIO()
    with zipfile.ZipFile(torch_file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
    objects = io.BytesIO()
    np.save(objects, np.array([Attack(marker)], dtype=object), allow_pickle=True)
    loads = {"py/object": "os.system", "__reduce__": ["os.system", [call]]}
    return {
        "a pickle": pickled,
        "a file of torch": torch_file.getvalue(),
        "objects of numpy": objects.getvalue(),
        "YAML that calls": f"!!python/object/apply:os.system ['{call}']\n".encode(),
        "JSON that names": json.dumps(loads).encode(),
        "Python": f"import os\nos.system({call!r})\n".encode(),
        "JSON 100,000 deep": b"[" * 100_000,
        "objects 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "a number of 6,000 digits": b'{"kind": ' + b"9" * 6000 + b"}",
        "a list": b"[1, null]",
        "null": b"null",
        "no JSON number": b'{"model": NaN, "vocab_size": Infinity, "seq_len": -1}',
        "bytes that are no text": bytes(range(256)) * 9,
        "zeros": bytes(5000),
        "nothing": b"",
        "a header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
        "a header that lies": _safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40],
                                                  "data_offsets": [0, 4]}}),
        "a header that overlaps": _safetensors({n: {"dtype": "F32", "shape": [1],
                                                    "data_offsets": [0, 4]} for n in "ab"}),
        "a header of no tensors": _safetensors({"__metadata__": {"a": "b"}}),
        "a header of text": _safetensors({"a": "b"}),
    }  # fmt: skip


def _safetensors(header: Mapping[str, object]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A kind of thing that is loaded: a good one, and how."""

    folder: Path
    load: Callable[[Path], object]
    files: tuple[str, ...] = ()
    """Those to replace; empty for all."""
    has_sums: bool = False
    """Whether its manifest is made to agree with what is replaced, as an attacker would."""


def good_things(folder: Path) -> dict[str, Loaded]:
    """Make one of each kind."""
    tokenizer = TOKENIZERS["bpe code"]()
    model = tiny_model(seed=1, vocab_size=tokenizer.vocab_size)
    save_model(ArtifactWriter(folder / "model"), model, tokenizer.to_files())
    export_model(folder / "model", folder / "exported")
    shutil.copytree(folder / "exported", folder / "pickled")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    shutil.copytree(folder / "exported", folder / "parts")
    (folder / "parts" / "model.safetensors").rename(folder / "parts" / "part.safetensors")
    names = {"weight_map": {"model.norm.weight": "part.safetensors"}}
    (folder / "parts" / "model.safetensors.index.json").write_text(json.dumps(names))
    optimizer = make_optimizer(model, OptimizationConfig())
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0
    optimizer.step()
    state = TrainState(step=1, tokens=1, epoch=0, row=1, loss=1.0)
    save_checkpoint(folder / "checkpoints", model, optimizer, state, keep=2)
    documents, _, rows = rows_of(folder / "data", "a.jsonl", lines([*TEXTS, *LONG]))
    pieces = folder / "sentencepiece"
    pieces.mkdir()
    for name, data in SentencePieceTokenizer.train(CORPUS, 600, "bpe").to_files().items():
        (pieces / name).write_bytes(data)
    (folder / "published").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "published" / "tokenizer"),
        vocab_size=600, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity",
    )  # fmt: skip
    for name, content in {
        "recipe/a.yaml": "seed: 1\n", "cache/sources.json": "{}", "cache/a.txt": "words",
        **{f"records/a{suffix}": UNTOUCHED for suffix in RAW_SUFFIXES},
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    def checkpoint(here: Path) -> None:
        other = tiny_model(seed=2, vocab_size=tokenizer.vocab_size)
        with redirect_stderr(io.StringIO()):
            path = newest_checkpoint(here)
        if path is not None:
            load_checkpoint(path, other, make_optimizer(other, OptimizationConfig()))

    def read_rows(here: Path) -> None:
        for split in ("train", "validation"):
            rows = PackedSequences(here, split)
            rows.read([0, rows.num_sequences - 1])

    def read_documents(here: Path) -> None:
        file = DocumentReader(here, "train")
        list(file.read(range(len(file))))

    def read_recipe(here: Path) -> None:
        load_config(here / "a.yaml")

    def plan(here: Path) -> None:
        source = SourceConfig(kind="files", path=str(here / "a.txt"))
        fingerprint(source, "corpus", here / "sources.json")

    def read_raw(here: Path) -> None:
        every = sorted(here.iterdir())
        for path in [one for one in every if one.read_text("latin-1") != UNTOUCHED] or every:
            with suppress(FromscratchError):
                data = {path.name: path.read_bytes(), "z.jsonl": lines(TEXTS)}
                run_clean(here / f"{path.name}.clean", data, validation_fraction=0.2)

    return {
        "model": Loaded(folder=folder / "model", load=load_both),
        "Hugging Face folder": Loaded(
            folder=folder / "exported", load=lambda here: import_model(here, here / "imported")
        ),
        "Hugging Face folder, pickled": Loaded(
            folder=folder / "pickled", load=lambda here: import_model(here, here / "imported"),
            files=("pytorch_model.bin",),
        ),
        "Hugging Face folder, in parts": Loaded(
            folder=folder / "parts", load=lambda here: import_model(here, here / "imported"),
            files=("model.safetensors.index.json", "part.safetensors"),
        ),
        "tokenizer": Loaded(
            folder=folder / "model", load=load_tokenizer, files=("tokenizer.json",)
        ),
        "pieces": Loaded(folder=pieces, load=load_tokenizer, files=("tokenizer.json",)),
        "SentencePiece": Loaded(
            folder=folder / "published", load=import_tokenizer, files=("tokenizer.model",)
        ),
        "checkpoint": Loaded(folder=folder / "checkpoints", load=checkpoint, has_sums=True),
        "rows": Loaded(folder=rows, load=read_rows),
        "documents": Loaded(
            folder=documents, load=read_documents,
            files=("documents.json", "train/00000.jsonl", "train/00000.offsets.bin"),
        ),
        "artifact": Loaded(folder=documents, load=load_artifact, files=(MANIFEST,)),
        "recipe": Loaded(folder=folder / "recipe", load=read_recipe),
        "sums of sources": Loaded(folder=folder / "cache", load=plan, files=("sources.json",)),
        "raw files": Loaded(folder=folder / "records", load=read_raw),
    }  # fmt: skip


def special_cases(folder: Path, marker: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what is hostile beyond a file of another content."""
    attack = f"import os\nos.system('touch {marker}')\n"
    exported = folder / "good" / "exported"
    for name in ("modeling.py", "configuration.py", "tokenization.py", "sitecustomize.py"):
        (exported / name).write_text(attack)
    config = json.loads((exported / "config.json").read_bytes())
    named = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
    (exported / "config.json").write_text(
        json.dumps(config | {"auto_map": named, "trust_remote_code": True})
    )
    yield "code beside a model", lambda: import_model(exported, folder / "imported")
    pickled = pickle.dumps(Attack(marker))
    odd = ("a.bin", "a.pt", "a.pkl", "a.py", "sitecustomize.py", "a.npy", "a.txt")
    for suffix in (".tar", ".zip"):
        data = (
            tar(*(entry(name, pickled) for name in odd))
            if suffix == ".tar"
            else zipped(*((name, pickled) for name in odd))
        )
        yield (
            f"pickles in a {suffix}",
            lambda suffix=suffix, data=data: run_clean(
                folder / f"pickles{suffix}", {f"a{suffix}": data, "z.jsonl": lines(TEXTS)},
                validation_fraction=0.2,
            ),
        )  # fmt: skip
    table = _parquet_with_pickles(pickled)
    yield (
        "a Parquet type that unpickles",
        lambda: run_clean(
            folder / "extension", {"a.parquet": table, "z.jsonl": lines(TEXTS)},
            validation_fraction=0.2,
        ),
    )  # fmt: skip
    endless: list[tuple[str, int]] = [
        (name, value) for name in ("d_model", "num_layers", "d_ff", "num_heads", "vocab_size",
                                   "seq_len", "head_dim") for value in (1 << 40, 1 << 62, -8)
    ]  # fmt: skip
    for name, value in endless:
        title = f"a model of {name} {value}"
        yield title, functools.partial(_odd_model, folder / title, folder / "good", name, value)
    for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
                 "max_position_embeddings", "num_attention_heads"):  # fmt: skip
        title = f"a Hugging Face model of {name} 2^40"
        yield title, functools.partial(_odd_config, folder / title, folder / "good", name)


def _odd_model(here: Path, good: Path, name: str, value: int) -> None:
    shutil.copytree(good / "model", here)
    shape = json.loads((here / "model.json").read_bytes())
    (shape if name in shape else shape["model"])[name] = value
    (here / "model.json").write_text(json.dumps(shape))
    load_both(here)


def _odd_config(here: Path, good: Path, name: str) -> None:
    shutil.copytree(good / "exported", here)
    config = json.loads((here / "config.json").read_bytes())
    assert name in config
    (here / "config.json").write_text(json.dumps(config | {name: 1 << 40}))
    import_model(here, here / "imported")


def _parquet_with_pickles(pickled: bytes) -> bytes:
    """Return a table whose schema asks pyarrow to unpickle a type (CVE-2023-47248)."""
    import pyarrow
    from pyarrow import parquet

    marks = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickled,
    }
    field = pyarrow.field("text", pyarrow.string(), metadata=marks)
    schema = pyarrow.schema([field], metadata={b"pandas": pickled})
    out = io.BytesIO()
    parquet.write_table(pyarrow.table([pyarrow.array(["a", "b"])], schema=schema), out)
    return out.getvalue()


def replaced(thing: Loaded, contents: Mapping[str, bytes], at: Path) -> Iterator[tuple[str, Path]]:
    """Yield copies of a good thing, of each of which one file has another content."""
    every = [path for path in thing.folder.rglob("*") if path.is_file()]
    chosen = [path for path in every if not thing.files or path.name in thing.files]
    for path in sorted(chosen):
        inside = path.relative_to(thing.folder)
        for title, content in contents.items():
            here = at / "hostile"
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(thing.folder, here)
            (here / inside).write_bytes(content)
            if thing.has_sums and inside.name != MANIFEST:
                _make_sums_agree((here / inside).parent)
            yield f"{inside}: {title}", here


def _make_sums_agree(folder: Path) -> None:
    manifest = asdict(read_manifest(folder))
    for record in manifest["files"]:
        path = folder / record["path"]
        record |= {"size_bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def attempt(watch: Watch, marker: Path, load: Callable[[], object]) -> list[str]:
    """Load under the watch; return what was wrong."""
    watch.seen.clear()
    problems: list[str] = []
    watch.is_on = True
    try:
        load()
    except FromscratchError:
        pass
    except BaseException as error:
        watch.is_on = False
        frame = traceback.extract_tb(error.__traceback__)[-1]
        problems.append(f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"[:300])
    finally:
        watch.is_on = False
    problems += watch.seen
    if marker.exists():
        problems.append("it ran")
        marker.unlink()
    return problems


def try_to_run_code(folder: Path, contents: str) -> Figure:
    """Count the loads in a process of their own, for a hook cannot be taken away again."""
    command = [sys.executable, "-m", "tests.chaos.no_code", str(folder / "watched"), contents]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    figure = Figure(name="hostile loads", note="under an audit hook")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        if line.startswith("["):
            name, problems = json.loads(line)
            figure.num_tried += 1
            figure.failures += [f"{name}: {'; '.join(problems)}"] if problems else []
    return figure


def main() -> None:
    """Load everything hostile in `sys.argv[1]`."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    folder = Path(sys.argv[1]).resolve()
    (folder / "good").mkdir(parents=True)
    (folder / "tmp").mkdir()
    os.environ["TMPDIR"] = str(folder / "tmp")
    marker = folder / "it-ran"
    things = good_things(folder / "good")
    contents = hostile_contents(marker)
    if sys.argv[2] == "few":
        contents = {title: contents[title] for title in FEW}
    for thing in things.values():  # what is imported late is imported
        shutil.copytree(thing.folder, folder / "warm")
        with suppress(FromscratchError):
            thing.load(folder / "warm")
        shutil.rmtree(folder / "warm")
    watch = Watch(folder)
    canary = attempt(watch, marker, lambda: pickle.loads(pickle.dumps(Attack(marker))))
    print(json.dumps(["the watch sees an attack", [] if len(canary) >= 3 else canary or ["blind"]]))
    for kind, thing in things.items():
        for title, here in replaced(thing, contents, folder):
            problems = attempt(watch, marker, functools.partial(thing.load, here))
            print(json.dumps([f"{kind}, {title}", problems]), flush=True)
    for title, load in special_cases(folder, marker):
        print(json.dumps([title, attempt(watch, marker, load)]), flush=True)


if __name__ == "__main__":
    main()
