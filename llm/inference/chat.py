"""Chat with a model in the terminal: `python -m llm.inference.chat FOLDER`.

torch is imported inside functions, so that `--help` is instant.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from llm.errors import ArtifactError, ConfigError, DataError, FromscratchError
from llm.inference.options import GenerationOptions
from llm.seeds import derive_seed

if TYPE_CHECKING:
    from llm.data.chat import Message
    from llm.model.precision import Precision
    from llm.model.transformer import Transformer
    from llm.tokenizer.base import Tokenizer

NEEDED = ("model.json", "model.safetensors", "tokenizer.json")
OPTIONS: Mapping[str, tuple[type, str]] = {
    "temperature": (float, "divides the logits; 0: greedy decoding"),
    "top_k": (int, "sample from the K most probable tokens; 0: off"),
    "top_p": (float, "sample from the smallest set of tokens with probability P; 1: off"),
    "min_p": (float, "drop tokens below P times the top token's probability; 0: off"),
    "repetition_penalty": (float, "above 1: penalize tokens already in the conversation"),
    "seed": (int, "random seed for sampling"),
    "max_new_tokens": (int, "maximum length of an answer in tokens"),
}
EXAMPLE_FOLDER = "artifacts/finetune/DIGEST"
HELP = "/reset clears the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Conversation:
    """A model and the messages so far, truncated to its context."""

    def __init__(
        self, model: "Transformer", tokenizer: "Tokenizer", options: GenerationOptions
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._options = replace(options, stop_ids=(tokenizer.end_id, tokenizer.bos_id))
        self._num_questions = 0
        self.messages: list[Message] = []
        self.num_dropped = 0
        """Messages dropped, oldest first, to fit the last question into the context."""

    def reset(self) -> None:
        """Clear the conversation."""
        self.messages.clear()

    def ask(self, question: str) -> Generator[str]:
        """Generate the answer piece by piece. A caller that closes the generator early keeps the
        pieces so far in the conversation.

        Raises:
            DataError: the question leaves no room for an answer.
        """
        self.num_dropped = 0
        messages, prompt = self._fit(question)
        self.num_dropped = len(self.messages) + 1 - len(messages)
        self._num_questions += 1
        return self._answer(messages, prompt)

    def _answer(self, messages: "list[Message]", prompt: Sequence[int]) -> Generator[str]:
        from llm.inference.generate import stream_texts

        seed = derive_seed(self._options.seed, "answer", self._num_questions)
        options = replace(self._options, seed=seed)
        pieces = stream_texts(self._model, self._tokenizer, [prompt], options)
        answer: list[str] = []
        try:
            for _, piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _fit(self, question: str) -> "tuple[list[Message], list[int]]":
        """Return the newest messages that fit, ending with the question, and their token ids."""
        from llm.data.chat import render_prompt

        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        context = self._model.seq_len
        room = max(1, min(self._options.max_new_tokens, context // 4))  # kept free for the answer
        while len(prompt := render_prompt(messages, self._tokenizer)) + room > context:
            if len(messages) == 1:
                raise DataError(
                    f"the question has {len(prompt)} tokens, expected at most {context - room} in a"
                    f" context of {context}; ask a shorter question"
                )
            messages = messages[2:]  # the oldest question and its answer
        return messages, prompt


def chat_terminal(
    folder: Path, options: GenerationOptions, *, precision: "Precision" = "fp32"
) -> None:
    """Chat with the model in `folder` until the input ends.

    At a terminal, answers appear token by token. From a pipe or a file, every line is a question of
    one conversation and every answer is one line, with line breaks written as `\\n`.

    Raises:
        ArtifactError: `folder` holds no complete model.
        ConfigError: `max_new_tokens` is below 1.
    """
    if options.max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: found {options.max_new_tokens}, expected at least 1")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ArtifactError(
            f"{folder}: no {', '.join(missing)} there; expected the folder of a chat model, as"
            f" `fromscratch run` writes it to {EXAMPLE_FOLDER}"
        )
    # a script's background jobs start with Ctrl-C ignored; here it stops an answer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from llm.inference.packed import packed
    from llm.model.weights import load_model
    from llm.tokenizer.load import load_tokenizer

    for file in (sys.stdin, sys.stdout):
        if isinstance(file, io.TextIOWrapper):  # invalid UTF-8, or a terminal without it
            file.reconfigure(errors="replace")
    model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    conversation = Conversation(packed(model, precision), load_tokenizer(folder), options)
    if sys.stdin.isatty():
        size = f"{model.num_parameters():,} parameters, context of {model.seq_len} tokens"
        print(f"Model: {folder} ({size})")
        _chat_interactively(conversation)
    else:
        answer_lines(conversation, sys.stdin, sys.stdout)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the generation options, as `chat_with_options` reads them."""
    defaults = GenerationOptions()
    for name, (kind, text) in OPTIONS.items():
        option, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        parser.add_argument(option, type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--stop", action="append", default=[], help="end the answer before this text; repeatable"
    )
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is faster"
    )


def chat_with_options(folder: Path, options: argparse.Namespace) -> None:
    """Chat with the model in `folder` by the options of `add_options`.

    Raises:
        ArtifactError: as `chat_terminal`.
        ConfigError: an option is out of range.
    """
    chosen = {name: getattr(options, name) for name in OPTIONS}
    generation = GenerationOptions(stops=tuple(options.stop), **chosen)
    chat_terminal(folder, generation, precision=options.precision)


def answer_lines(conversation: Conversation, questions: Iterable[str], output: TextIO) -> None:
    """Answer each line with one line; `/reset` and `/exit` give none.

    A question that does not fit the context gives an empty line and a message on stderr.
    """
    for number, line in enumerate(questions, start=1):
        question = line.strip()
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
        elif question:
            answer = ""
            try:
                answer = "".join(conversation.ask(question))
            except DataError as error:
                print(f"line {number}: {error}", file=sys.stderr)
            if conversation.num_dropped:
                print(f"line {number}: {_notice(conversation)}", file=sys.stderr)
            print(printable(answer.strip()).replace("\n", "\\n"), file=output, flush=True)


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey, by U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _chat_interactively(conversation: Conversation) -> None:
    """Read questions with line editing and history; print answers as they are generated."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # line editing for input(); missing on some systems
    print(HELP)
    while True:
        try:
            print()
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n{HELP}", end="")
            continue
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            print("Conversation cleared.")
        elif question.startswith("/"):
            print(HELP)
        elif question:
            _print_answer(conversation, question)


def _print_answer(conversation: Conversation, question: str) -> None:
    try:
        with contextlib.closing(conversation.ask(question)) as pieces:
            if conversation.num_dropped:
                print(f"[{_notice(conversation)}]")
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except DataError as error:
        print(error, end="")
    print()


def _notice(conversation: Conversation) -> str:
    return f"the context is full: dropped the {conversation.num_dropped} oldest messages"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and chat; return the exit code, 1 if the model cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.inference.chat",
        description="Chat with a model in the terminal.",
        epilog=f"{HELP} Questions may also be piped in, one per line: each answer is one line, and"
        " /reset between two questions makes them independent.",
    )
    parser.add_argument("folder", type=Path, help=f"folder of a chat model: {EXAMPLE_FOLDER}")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        chat_with_options(options.folder, options)
    except FromscratchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
