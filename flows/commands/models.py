"""The commands on finished artifacts: `tokenizers`, `chat`, `export`, `merge` and `import`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from flows.commands.options import add_artifacts_option
from llm.artifact import read_manifest
from llm.errors import ArtifactError
from llm.inference.chat import add_options, chat_with_options
from llm.models import MODELS
from tasks.store import ArtifactStore


def add_model_commands(commands: Any) -> None:
    """Add the commands to the subparsers."""
    _add_tokenizers(commands)
    chat = commands.add_parser("chat", help="chat with a model in the terminal")
    chat.add_argument("model", nargs="?", default="", help="its folder; default: the newest one")
    add_options(chat)
    add_artifacts_option(chat)
    chat.set_defaults(command=_chat)
    export = commands.add_parser("export", help="export a model to transformers, llama.cpp or PEFT")
    export.add_argument("model", nargs="?", default="", help="its folder; default: the newest one")
    export.add_argument(
        "--format",
        choices=("hf", "gguf", "peft"),
        default="hf",
        help="peft: the adapter of a LoRA training alone; default: hf",
    )
    export.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    export.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; default: float32",
    )
    add_artifacts_option(export)
    export.set_defaults(command=_export)
    merging = commands.add_parser("merge", help="merge a LoRA adapter into its base model")
    merging.add_argument(
        "base", type=Path, help="folder of the model that its training started from"
    )
    merging.add_argument("adapter", type=Path, help="folder of the model trained with it")
    merging.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    merging.set_defaults(command=_merge)
    importing = commands.add_parser("import", help="import a model from transformers")
    importing.add_argument("folder", type=Path, help="as written by `save_pretrained`")
    importing.add_argument("--to", type=Path, required=True, metavar="FOLDER", help="a new folder")
    importing.set_defaults(command=_import)


def _add_tokenizers(commands: Any) -> None:
    text = "compare tokenizers on one text: lengths, single bytes, round trips, speed"
    tokenizers = commands.add_parser("tokenizers", help=text, description=text)
    tokenizers.add_argument(
        "folders",
        nargs="*",
        type=Path,
        metavar="FOLDER",
        help="of a tokenizer; default: all in the artifacts folder",
    )
    tokenizers.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="a text file or a cleaned corpus; default: validation documents of the newest corpus",
    )
    tokenizers.add_argument(
        "--to", type=Path, metavar="FOLDER", help="write all metrics and a plot to this folder"
    )
    add_artifacts_option(tokenizers)
    tokenizers.set_defaults(command=_tokenizers)


def _chat(options: argparse.Namespace) -> int:
    folder = _model_folder(options)
    if not options.model and not sys.stdin.isatty():  # in a terminal the chat itself prints it
        print(f"model: {folder}", file=sys.stderr)
    chat_with_options(folder, options)
    return 0


def _export(options: argparse.Namespace) -> int:
    folder = _model_folder(options)
    if options.format == "gguf":
        from llm.exchange.gguf import export_gguf as export
    elif options.format == "peft":
        from llm.exchange.adapters import export_adapter as export
    else:
        from llm.exchange.folders import export_model as export
    export(folder, options.to, dtype=options.dtype)
    print(options.to)
    return 0


def _merge(options: argparse.Namespace) -> int:
    from llm.exchange.adapters import merge_adapter

    merge_adapter(options.base, options.adapter, options.to)
    print(options.to)
    return 0


def _import(options: argparse.Namespace) -> int:
    from llm.exchange.folders import import_model

    import_model(options.folder, options.to)
    print(options.to)
    return 0


def _model_folder(options: argparse.Namespace) -> Path:
    """Return the folder of the named model, or of the newest chat model.

    Raises:
        ArtifactError: there is no such folder, or no chat model.
    """
    if not options.model:
        return _newest_chat_model(options.artifacts)
    folder = Path(options.model)
    if not folder.is_dir():
        raise ArtifactError(
            f"{folder}: no such folder; expected the folder of a model, artifacts/STAGE/DIGEST with"
            f" a STAGE of {', '.join(MODELS)}, or nothing for the newest chat model"
        )
    return folder


def _newest_chat_model(artifacts: Path) -> Path:
    store = ArtifactStore(artifacts)
    for record in store.records(*MODELS):
        folder = store.folder(record.parts.stage, record.digest)
        if folder.is_dir() and read_manifest(folder).summary.get("content") != "text":
            return folder
    raise ArtifactError(
        f"{store.root}: no chat model; build one with `fromscratch run quickstart`, or name the"
        " folder of a model: `fromscratch chat FOLDER`"
    )


def _tokenizers(options: argparse.Namespace) -> int:
    from flows import compare_tokenizers as comparing
    from flows.display import print_tokenizers

    store = ArtifactStore(options.artifacts)
    texts = comparing.read_texts(options.text or comparing.find_text(store))
    folders = options.folders or comparing.find_tokenizers(store)
    measured = comparing.measure_tokenizers(comparing.name_tokenizers(folders), texts)
    print_tokenizers(measured)
    if options.to:
        comparing.write_report(measured, options.to)
    return 0
