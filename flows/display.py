"""Terminal output: live progress of a run, and tables of plans, results and comparisons."""

import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from flows.sweep import Member, comparison, differing_bytes, short_name
from llm.models import MODELS, model_name
from tasks.cached import Outcome
from tasks.launch import Progress as StageProgress
from tasks.plan import PlannedStep

if TYPE_CHECKING:
    from flows.compare_tokenizers import MeasuredTokenizer

SECONDS_BETWEEN_LINES = 10.0  # progress lines where stderr is no terminal
UNWRAPPED_COLUMNS = 1000  # the terminal wraps the lines; rich would truncate numbers

err = Console(stderr=True, highlight=False)
out = Console(highlight=False)


class _Rate(ProgressColumn):
    """Column `done/total unit, rate`."""

    def render(self, task: Task) -> Text:
        unit = task.fields.get("unit", "")
        if not unit:
            return Text("")
        total = f"/{task.total:,.0f}" if task.total else ""
        rate = f", {task.speed:,.1f}/s" if task.speed else ""
        return Text(f"{task.completed:,.0f}{total} {unit}{rate}", style="dim")


class LiveDisplay:
    """Progress on stderr: live bars on a terminal, occasional lines elsewhere."""

    def __init__(self, console: Console = err) -> None:
        """Prepare; nothing is drawn before the first step starts."""
        self._console = console
        self._bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            _Rate(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        self._next_line_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "LiveDisplay":
        """Start drawing."""
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bars."""
        if self._console.is_terminal:
            self._bars.stop()

    def started(self, name: str, reason: str) -> None:
        """Print a step and the reason to build it."""
        self._print(name, f"building: {reason}")
        with self._lock:
            if self._console.is_terminal:
                self._tasks[name] = self._bars.add_task(name, total=None, unit="")
            self._next_line_at[name] = time.monotonic() + SECONDS_BETWEEN_LINES

    def waits(self, name: str) -> None:
        """Print that another run builds the same artifact."""
        self._print(name, "another run is building it; waiting")

    def progressed(self, name: str, progress: StageProgress) -> None:
        """Update the bar, or print a line every SECONDS_BETWEEN_LINES."""
        with self._lock:
            if name in self._tasks:
                self._bars.update(
                    self._tasks[name],
                    completed=progress.done,
                    total=progress.total or None,
                    unit=progress.unit,
                )
            elif time.monotonic() >= self._next_line_at.get(name, 0.0):
                self._next_line_at[name] = time.monotonic() + SECONDS_BETWEEN_LINES
                total = f" of {progress.total:,}" if progress.total else ""
                self._console.print(f"{name:<16} {progress.done:,}{total} {progress.unit}")

    def restarted(self, name: str, why: str) -> None:
        """Print that a step was restarted, and why."""
        self._print(name, f"[yellow]{why}; restarting it[/yellow]")

    def finished(self, outcome: Outcome) -> None:
        """Replace the bar with a line."""
        with self._lock:
            if outcome.name in self._tasks:
                self._bars.remove_task(self._tasks.pop(outcome.name))
        text = "[cyan]cached[/cyan]"
        if outcome.status == "built":
            took, summary = _seconds(outcome.seconds), _short_summary(outcome.summary)
            text = f"[green]built in {took}[/green]  [dim]{summary}[/dim]"
        self._print(outcome.name, text)

    def _print(self, name: str, text: str) -> None:
        self._console.print(f"[bold]{name:<16}[/bold] {text}", soft_wrap=True)


def print_plan(plan: Sequence[PlannedStep], console: Console = out) -> None:
    """Print the status of every step and the reason for it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "status", "reason", "artifact"):
        table.add_column(heading, overflow="fold")
    for item in plan:
        style = "cyan" if item.status == "cached" else "yellow"
        reason = f"{item.reason} ({item.note})" if item.note else item.reason
        table.add_row(item.step.name, f"[{style}]{item.status}[/]", reason, item.digest[:12])
    console.print(table)
    num_to_build = sum(item.status == "build" for item in plan)
    console.print(f"{num_to_build} of {len(plan)} to build" if num_to_build else "nothing to build")


def print_outcomes(
    outcomes: Sequence[Outcome],
    metrics: Mapping[str, float],
    samples: Sequence[Mapping[str, object]],
    addresses: Mapping[str, str],
    seconds: float,
    console: Console = out,
) -> None:
    """Print the result of a run: stages and times, metrics, sample answers, page addresses."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("stage", "status", "seconds", "artifact"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for outcome in outcomes:
        style = "cyan" if outcome.status == "cached" else "green"
        took = f"{outcome.seconds:.1f}" if outcome.status == "built" else ""
        artifact = f"{outcome.stage}/{outcome.digest[:12]}"
        table.add_row(outcome.name, f"[{style}]{outcome.status}[/]", took, artifact)
    console.print()
    console.print(table)
    console.print(f"\ntotal {_seconds(seconds)}")
    if metrics:
        _print_metrics(metrics, console)
    models = [model_name(o.stage, o.role) for o in outcomes if o.stage in MODELS]
    for sample in samples[:3] if models else ():
        console.print(f"\n[bold]Q[/bold] {_plain(sample.get('prompt'))}", soft_wrap=True)
        console.print(f"[bold]A[/bold] {_plain(sample.get(models[-1]))}", soft_wrap=True)
        if sample.get("expected"):
            console.print(f"[dim]expected: {_plain(sample.get('expected'))}[/dim]", soft_wrap=True)
    if addresses:
        console.print()
    for name, address in addresses.items():
        console.print(f"{name:<8} {address}", soft_wrap=True)


def print_sweep(members: Sequence[Member], console: Console = out) -> None:
    """Print a table of a sweep's members, best first, and the errors of those that failed."""
    headings, rows = comparison(members)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        heading = heading.replace(" a ", "\na ").replace(" per ", "\nper ")
        table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(_plain(row[0]), *row[1:])
    console.print()
    console.print(table)
    if note := differing_bytes(members):
        console.print(f"\n{note}", soft_wrap=True)
    for member in members:
        if member.error:
            console.print(f"\n{_plain(short_name(member))}: {_plain(member.error)}", soft_wrap=True)


def print_tokenizers(measured: "Sequence[MeasuredTokenizer]") -> None:
    """Print a table of tokenizers: token counts on one text, round trips and speed."""
    table = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("tokenizer", no_wrap=True)
    for heading in (
        "vocabulary", "tokens\nper word", "bytes\nper token", "tokens per\ncharacter",
        "single\nbytes", "texts\nrefused", "round trips\nfailed", "encode\nMB/s", "decode\nMB/s",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    for tokenizer in measured:
        report, speed = tokenizer.report, tokenizer.speed
        table.add_row(
            _plain(tokenizer.name),
            f"{report.vocab_size:,}",
            f"{report.tokens_per_word:.2f}",
            f"{report.bytes_per_token:.2f}",
            f"{report.tokens_per_character:.3f}",
            f"{report.single_byte_share:.1%}",
            f"{report.num_refused_documents:,}",
            f"{report.num_round_trip_failures:,}",
            f"{speed.encode_megabytes_per_second:.1f}",
            f"{speed.decode_megabytes_per_second:.1f}",
        )
    Console(width=UNWRAPPED_COLUMNS, highlight=False).print(table)


def _print_metrics(metrics: Mapping[str, float], console: Console) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in metrics.items():
        if name.count("/") > 1 or (name.startswith(("leak/", "data/")) and name != "leak/passed"):
            continue  # details, shown in the report only
        table.add_row(name, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}")
    console.print()
    console.print(table)


def _short_summary(summary: Mapping[str, object]) -> str:
    """Return the first four values of a summary on one line."""
    parts: list[str] = []
    for name, value in summary.items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            style = {float: ",.4g", int: ",", str: ""}[type(value)]
            parts.append(f"{name.replace('_', ' ')} {value:{style}}")
    return ", ".join(parts[:4])


def _seconds(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _plain(value: object) -> str:
    return str(value).replace("[", "\\[").strip()
