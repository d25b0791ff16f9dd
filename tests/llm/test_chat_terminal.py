"""Chat in the terminal: streaming, history, pipes, signals and errors."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import llm.runtime.job
from llm.artifact import ArtifactWriter
from llm.config import ModelConfig
from llm.data.chat import Message, render_chat, render_prompt
from llm.errors import ArtifactError, DataError
from llm.inference.chat import (
    Conversation,
    answer_lines,
    chat_terminal,
    main,
    printable,
)
from llm.inference.options import GenerationOptions
from llm.model.loss import IGNORED, token_losses
from llm.model.transformer import Transformer
from llm.model.weights import save_model
from llm.tokenizer.bpe import ByteLevelBPE

pytestmark = pytest.mark.flaky(reason="a real terminal and signals, on a machine that may be busy")

SEQ_LEN = 64
SHAPE = ModelConfig(num_layers=2, d_model=32, num_heads=2, num_kv_heads=1, d_ff=48)
ROOT = Path(llm.runtime.job.__file__).parents[2]
ANSWERS = {"red?": "blue", "two\nlines?": "naïve\n文字", "end?": ""}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on two threads, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tokenizer: ByteLevelBPE) -> Transformer:
    """Random weights: generates noise until it is stopped."""
    made = Transformer(SHAPE, tokenizer.vocab_size, SEQ_LEN)
    made.initialize(torch.Generator().manual_seed(1))
    return made.eval()


@pytest.fixture(scope="module")
def knowing_model(tokenizer: ByteLevelBPE) -> Transformer:
    """Overfitted on ANSWERS as first questions of a conversation."""
    made = Transformer(SHAPE, tokenizer.vocab_size, SEQ_LEN)
    made.initialize(torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    chats = [
        [Message(role="user", content=asked), Message(role="assistant", content=said)]
        for asked, said in ANSWERS.items()
    ]
    rendered = [render_chat(chat, tokenizer) for chat in chats]
    for _ in range(100):
        optimizer.zero_grad()
        for chat in rendered:
            ids, mask = map(torch.tensor, chat)
            targets = torch.where(mask, ids, IGNORED)
            token_losses(made(ids[None, :-1]), targets[None, 1:]).mean().backward()
        optimizer.step()
    return made.eval()


@pytest.fixture
def folder(tmp_path: Path, knowing_model: Transformer, tokenizer: ByteLevelBPE) -> Path:
    save_model(ArtifactWriter(tmp_path / "chat"), knowing_model, tokenizer.to_files())
    return tmp_path / "chat"


def talk(folder: Path, typed: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Run the program with `typed` piped into it."""
    command = [sys.executable, "-m", "llm.inference.chat", str(folder), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=typed, capture_output=True, cwd=ROOT, env=environment)


def test_the_prompt_holds_the_whole_conversation(
    model: Transformer, tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[list[int]] = []

    def remember(
        model: Transformer, tokenizer: ByteLevelBPE, asked: list[list[int]], options: object
    ) -> Iterator[tuple[int, str]]:
        prompts.extend(asked)
        return iter([(0, " fi"), (0, "ne")])

    monkeypatch.setattr("llm.inference.generate.stream_texts", remember)
    conversation = Conversation(model, tokenizer, GenerationOptions(max_new_tokens=4))
    assert "".join(conversation.ask("hi")) == " fine"
    assert "".join(conversation.ask("and you")) == " fine"
    said = [
        Message(role="user", content="hi"),
        Message(role="assistant", content=" fine"),
        Message(role="user", content="and you"),
    ]
    assert prompts == [render_prompt(said[:1], tokenizer), render_prompt(said, tokenizer)]
    conversation.reset()
    "".join(conversation.ask("hi"))
    assert prompts[2] == prompts[0]


def test_the_oldest_messages_are_dropped_when_the_context_is_full(
    model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    conversation = Conversation(model, tokenizer, GenerationOptions(max_new_tokens=8))
    dropped = 0
    for number in range(12):
        "".join(conversation.ask(f"q {number}"))
        dropped += conversation.num_dropped
        messages = conversation.messages
        assert len(messages) == 2 * (number + 1) - dropped
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages[-2]["content"] == f"q {number}"
        assert len(render_prompt(messages[:-1], tokenizer)) + 8 <= SEQ_LEN
    assert dropped > 0


def test_a_question_that_fills_the_context_is_refused_and_dropped(
    model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    conversation = Conversation(model, tokenizer, GenerationOptions(max_new_tokens=8))
    "".join(conversation.ask("hi"))
    before = list(conversation.messages)
    with pytest.raises(DataError, match="expected at most 56 in a context of 64"):
        conversation.ask("w x y z " * 40)
    assert conversation.messages == before


def test_the_generated_part_of_a_stopped_answer_stays_in_the_conversation(
    model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    conversation = Conversation(model, tokenizer, GenerationOptions(temperature=1.0))
    pieces = conversation.ask("hi")
    start = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": start}


def test_every_line_is_answered_by_a_line(
    knowing_model: Transformer, tokenizer: ByteLevelBPE, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(knowing_model, tokenizer, GenerationOptions(max_new_tokens=16))
    lines = ["red?\n", "\n", "/reset\n", "end?\n", "/reset\n", "w x " * 99, "red?", "/exit", "red?"]
    output = io.StringIO()
    answer_lines(conversation, lines, output)
    assert output.getvalue() == "blue\n\n\nblue\n"
    assert capsys.readouterr().err.startswith("line 6: the question has ")


def test_line_breaks_in_an_answer_do_not_end_its_line(
    knowing_model: Transformer, tokenizer: ByteLevelBPE
) -> None:
    conversation = Conversation(knowing_model, tokenizer, GenerationOptions(max_new_tokens=16))
    assert "".join(conversation.ask("two\nlines?")) == "naïve\n文字"
    output = io.StringIO()
    conversation.reset()
    answer_lines(conversation, ["two\nlines?"], output)
    assert output.getvalue() == "naïve\\n文字\n"


def test_control_characters_never_reach_the_terminal() -> None:
    assert (
        printable("a\x1b]0;x\x07\x9b31m\r\b\tb\n") == "a\ufffd]0;x\ufffd\ufffd31m\ufffd\ufffd\tb\n"
    )


def test_questions_may_be_piped_in_even_if_they_are_no_utf8(folder: Path) -> None:
    done = talk(folder, b"red?\n/reset\n\xff\xfe\n/reset\nred?", "--max-new-tokens", "8")
    lines = done.stdout.decode().split("\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert (len(lines), lines[0], lines[2], lines[3]) == (4, "blue", "blue", "")


def test_a_closed_output_pipe_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "llm.inference.chat", str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdout.close()
        child.stdin.write(b"red?\nred?\n")
        child.stdin.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


def test_a_folder_without_a_model_is_one_line_and_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=r"no model\.json, model\.safetensors"):
        chat_terminal(tmp_path, GenerationOptions())
    assert main([str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--temperature=-1", "temperature"),
        ("--temperature=nan", "temperature"),
        ("--top-p=0", "top_p"),
        ("--stop=", "stops"),
        ("--max-new-tokens=0", "max_new_tokens"),
    ],
)
def test_chat_refuses_options_out_of_range(
    folder: Path, option: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), option]) == 1
    assert capsys.readouterr().err.startswith(f"{name}: found ")


def test_help_is_given_without_torch() -> None:
    code = (
        "import sys, llm.inference.chat as chat\n"
        "try: chat.main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "/reset" in done.stdout and done.stdout.endswith("False False\n")


class Terminal:
    """The program at a pseudo-terminal."""

    def __init__(self, folder: Path, *options: str) -> None:
        main_end, program_end = pty.openpty()
        command = [sys.executable, "-m", "llm.inference.chat", str(folder), *options]
        self._file = main_end
        self._seen = ""
        self.child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=program_end,
            stdout=program_end,
            stderr=program_end,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
        )
        os.close(program_end)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """Read until `text` appears; return and forget what came up to it."""
        give_up_at = time.monotonic() + seconds
        while text not in self._seen:
            assert time.monotonic() < give_up_at, f"{text!r} did not come; {self._seen!r} did"
            if select.select([self._file], [], [], 0.1)[0]:
                try:
                    self._seen += os.read(self._file, 4096).decode(errors="replace")
                except OSError:  # the program has ended
                    assert text in self._seen, self._seen
        before, _, self._seen = self._seen.partition(text)
        return before

    def interrupt(self) -> None:
        """Send what Ctrl-C sends, once the program waits: in the instant between showing a prompt
        and waiting, Python notes the signal and acts on the next key."""
        time.sleep(0.5)
        os.kill(self.child.pid, signal.SIGINT)

    def exit_code(self) -> int:
        return self.child.wait(timeout=30)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._file)


def test_a_person_asks_resets_interrupts_and_leaves(folder: Path) -> None:
    with Terminal(folder) as terminal:
        begin = terminal.wait_for("> ")
        assert f"Model: {folder} (" in begin.replace("\r\n", "") and " parameters, context" in begin
        terminal.type("red?\n")
        assert "blue" in terminal.wait_for("> ")
        terminal.type("/reset\n")
        assert "Conversation cleared." in terminal.wait_for("> ")
        terminal.type("/what\n")
        assert "/exit" in terminal.wait_for("> ")
        terminal.interrupt()
        assert "Ctrl-D leaves" in terminal.wait_for("> ")
        terminal.type("w x y z " * 60 + "\n")
        terminal.wait_for("ask a shorter question")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.exit_code() == 0


def test_an_interrupted_answer_stops_and_the_chat_goes_on(
    tmp_path: Path, tokenizer: ByteLevelBPE
) -> None:
    shape = ModelConfig(num_layers=4, d_model=256, num_heads=4, num_kv_heads=4, d_ff=704)
    endless = Transformer(shape, tokenizer.vocab_size, 20_000)
    endless.initialize(torch.Generator().manual_seed(1))
    save_model(ArtifactWriter(tmp_path / "endless"), endless, tokenizer.to_files())
    options = ("--max-new-tokens", "19000", "--temperature", "1", "--seed", "9")
    with Terminal(tmp_path / "endless", *options) as terminal:
        terminal.wait_for("> ")
        terminal.type("go\n")
        terminal.wait_for("go\r\n")
        terminal.interrupt()
        terminal.wait_for("[stopped]")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.exit_code() == 0
