"""Talk to a chat model in the terminal: `python -m llm.inference.chat FOLDER`.

torch and what needs it are imported where they are used, so that `--help` answers at once.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
import unicodedata
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from llm.errors import ArtifactError, ConfigError, DataError, FromscratchError
from llm.seeds import derive_seed

if TYPE_CHECKING:
    from llm.data.chat import Message
    from llm.inference.sampling import Sampling
    from llm.model.precision import Precision
    from llm.model.transformer import Transformer
    from llm.tokenizer.base import Tokenizer

DEFAULT_NEW_TOKENS = 128
NEEDED = ("model.json", "model.safetensors", "tokenizer.json")
HELP = "/reset forgets what was said, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


class Conversation:
    """A model, what was said so far, and as much of it as fits the context."""

    def __init__(
        self,
        model: "Transformer",
        tokenizer: "Tokenizer",
        *,
        sampling: "Sampling",
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._num_asked = 0
        self.messages: list[Message] = []
        self.num_forgotten = 0
        """Messages left out, oldest first, when the last question was put."""

    def reset(self) -> None:
        """Forget what was said."""
        self.messages.clear()

    def ask(self, question: str) -> Generator[str]:
        """Return the answer's pieces, made as they are taken. Those taken are remembered, also when
        the caller stops early and closes it.

        Raises:
            DataError: the question alone leaves no room for an answer.
        """
        self.num_forgotten = 0
        messages, prompt = self._fit(question)
        self.num_forgotten = len(self.messages) + 1 - len(messages)
        self._num_asked += 1
        return self._pieces(messages, prompt)

    def _pieces(self, messages: "list[Message]", prompt: Sequence[int]) -> Generator[str]:
        from llm.inference.generate import stream_texts

        pieces = stream_texts(
            self._model,
            self._tokenizer,
            [prompt],
            max_new_tokens=self._max_new_tokens,
            stop_ids=(self._tokenizer.end_id, self._tokenizer.bos_id),
            sampling=replace(
                self._sampling, seed=derive_seed(self._sampling.seed, "answer", self._num_asked)
            ),
        )
        answer: list[str] = []
        try:
            for _, piece in pieces:
                answer.append(piece)
                yield piece
        finally:
            self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def _fit(self, question: str) -> "tuple[list[Message], list[int]]":
        """Return the newest messages that fit, the question last, and the ids to answer."""
        from llm.data.chat import render_prompt

        messages: list[Message] = [*self.messages, {"role": "user", "content": question}]
        context = self._model.seq_len
        room = max(1, min(self._max_new_tokens, context // 4))  # the least to leave for an answer
        while len(prompt := render_prompt(messages, self._tokenizer)) + room > context:
            if len(messages) == 1:
                raise DataError(
                    f"the question has {len(prompt)} tokens, expected at most {context - room} in a"
                    f" context of {context}; ask a shorter one"
                )
            messages = messages[2:]  # a question goes with its answer
        return messages, prompt


def chat_terminal(
    folder: Path,
    *,
    sampling: "Sampling",
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    precision: "Precision" = "fp32",
) -> None:
    """Talk with the model in `folder` until the input ends.

    At a terminal answers appear token by token. From a pipe or a file every line is a question of
    the same conversation, and every answer is one line, its line breaks written as `\\n`.

    Raises:
        ArtifactError: there is no whole model in `folder`.
        ConfigError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: found {max_new_tokens}, expected at least 1")
    if missing := [name for name in NEEDED if not (folder / name).is_file()]:
        raise ArtifactError(
            f"{folder}: no {', '.join(missing)} there; expected the folder of a chat model, as"
            " `fromscratch run` leaves in artifacts/finetune/"
        )
    # a script's background job begins with Ctrl-C ignored; here it stops an answer
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import torch

    from llm.inference.packed import packed
    from llm.model.weights import load_model
    from llm.tokenizer.load import load_tokenizer

    for file in (sys.stdin, sys.stdout):
        if isinstance(file, io.TextIOWrapper):  # bytes that are no UTF-8, or a terminal without it
            file.reconfigure(errors="replace")
    model = load_model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    conversation = Conversation(
        packed(model, precision),
        load_tokenizer(folder),
        sampling=sampling,
        max_new_tokens=max_new_tokens,
    )
    if sys.stdin.isatty():
        size = f"{model.num_parameters():,} parameters, context of {model.seq_len} tokens"
        print(f"Model: {folder} ({size})")
        _talk(conversation)
    else:
        answer_lines(conversation, sys.stdin, sys.stdout)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how answers are made, as `talk_as_asked` reads them."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, help="0: the likeliest token")
    add("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="draw from the likeliest that sum to this; 1: all")
    add("--min-p", type=float, default=0.0, help="leave out what is less likely, by this share")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: say other things")
    add("--stop", action="append", default=[], help="a text that ends an answer; any number")
    add("--seed", type=int, default=0, help="of what is drawn above temperature 0")
    add("--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, help="longest answer")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is faster")


def talk_as_asked(folder: Path, options: argparse.Namespace) -> None:
    """Talk with the model in `folder` by the options of `add_options`.

    Raises:
        ArtifactError: as `chat_terminal`.
        ConfigError: an option is out of range.
    """
    from llm.inference.sampling import Sampling

    chat_terminal(
        folder,
        sampling=Sampling(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            stops=tuple(options.stop),
            seed=options.seed,
        ),
        max_new_tokens=options.max_new_tokens,
        precision=options.precision,
    )


def answer_lines(conversation: Conversation, questions: Iterable[str], output: TextIO) -> None:
    """Answer every line by a line. `/reset` is obeyed and `/exit` ends, both without a line.

    A question that does not fit the context is answered by an empty line and a word on stderr.
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
            if conversation.num_forgotten:
                print(f"line {number}: {_notice(conversation)}", file=sys.stderr)
            print(printable(answer.strip()).replace("\n", "\\n"), file=output, flush=True)


def printable(text: str) -> str:
    """Return `text` with control characters, which a terminal would obey, as U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _talk(conversation: Conversation) -> None:
    """Read questions with line editing and history; print answers as they come."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its editing; some systems lack it
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
            print("Forgotten.")
        elif question.startswith("/"):
            print(HELP)
        elif question:
            _answer(conversation, question)


def _answer(conversation: Conversation, question: str) -> None:
    try:
        with contextlib.closing(conversation.ask(question)) as pieces:
            if conversation.num_forgotten:
                print(f"[{_notice(conversation)}]")
            for piece in pieces:
                print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except DataError as error:
        print(error, end="")
    print()


def _notice(conversation: Conversation) -> str:
    return f"the context is full, so the oldest {conversation.num_forgotten} messages are forgotten"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and talk; 1 where there is nothing to talk to."""
    parser = argparse.ArgumentParser(
        prog="python -m llm.inference.chat",
        description="Talk to a chat model in the terminal.",
        epilog=f"{HELP} Questions may also be piped in, one a line: each answer is one line, and"
        " /reset between two makes them independent.",
    )
    parser.add_argument("folder", type=Path, help="of a chat model: artifacts/finetune/DIGEST")
    add_options(parser)
    options = parser.parse_args(arguments)
    try:
        talk_as_asked(options.folder, options)
    except FromscratchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:  # whoever read the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
