"""Generation with a cache, without one, and by transformers, on the same weights.

    python -m benchmarks.generation

GPT-2 of 124M parameters with random weights, greedy decoding, fixed numbers of tokens. All ways
alternate in one process with the same threads; each time is the median of the rounds. The share of
the memory bandwidth is the bytes of all matrices over the time of a step, against the fastest sum
over a gigabyte.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llm.exchange.huggingface import read_model
from llm.inference.generate import generate
from llm.inference.options import GenerationOptions
from llm.inference.packed import packed
from llm.model.transformer import Transformer

PROMPT_TOKENS = 16
BATCH_LENGTHS = (5, 16, 9, 30, 12, 24, 7, 18)  # prompts of unequal length, side by side

Ids = list[list[int]]
Way = Callable[[Sequence[Sequence[int]], int], Ids]


def make_models() -> tuple[object, Transformer]:
    """Return the same GPT-2 as a transformers model and as ours."""
    import transformers

    torch.manual_seed(1)
    transformers.logging.set_verbosity_error()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = read_model(Path(folder)).eval()
    return theirs, ours


@torch.inference_mode()
def without_cache(model: Transformer, prompts: Sequence[Sequence[int]], count: int) -> Ids:
    """Process the whole sequence again for every token."""
    made: Ids = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            x = model.hidden_states(torch.tensor([ids]))
            ids.append(int(model.logits(x[:, -1]).argmax()))
        made.append(ids[len(prompt) :])
    return made


def with_transformers(model: object, prompts: Sequence[Sequence[int]], count: int) -> Ids:
    """Generate with transformers: prompts padded on the left, with an attention mask."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = model.generate(  # type: ignore[attr-defined]
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )
    return made[:, longest:].tolist()


def memory_bytes_per_second() -> float:
    """Return the memory bandwidth: the best of seven sums over a gigabyte."""
    block = torch.ones(1 << 28)
    seconds: list[float] = []
    for _ in range(7):
        started_at = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - started_at)
    return block.nbytes / min(seconds)


def compare(
    title: str,
    ways: dict[str, Way],
    prompts: Sequence[Sequence[int]],
    count: int,
    rounds: int,
    step_bytes: dict[str, int],
    memory_speed: float,
) -> None:
    """Print a table: time per token, tokens per second, and the ratio to the last way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    made: dict[str, Ids] = {}
    for way in ways.values():
        way(prompts, 3)  # warm-up
    for _ in range(rounds):
        for name, way in ways.items():
            started_at = time.perf_counter()
            made[name] = way(prompts, count)
            seconds[name].append(time.perf_counter() - started_at)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    *_, base = ways
    print(f"\n{title}: {len(prompts)} prompt(s), {count} tokens each, {rounds} round(s)\n")
    print(f"| way | ms/token | tokens/s | times {base} | of memory bandwidth | same tokens |")
    print("|---|---|---|---|---|---|")
    for name, value in medians.items():
        share = "-"
        if name in step_bytes:
            share = f"{step_bytes[name] * count / value / memory_speed:.0%}"
        same = statistics.mean(
            mine == wanted
            for row, base_row in zip(made[name], made[base], strict=True)
            for mine, wanted in zip(row, base_row, strict=True)
        )
        print(
            f"| {name} | {value / count * 1e3:.1f} | {len(prompts) * count / value:.1f}"
            f" | {medians[base] / value:.2f}x | {share} | {same:.0%} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--part", choices=("cache", "fp32", "bf16", "batch"), help="only this table"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    theirs, ours = make_models()
    generator = torch.Generator().manual_seed(2)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, ours.vocab_size, (length,), generator=generator).tolist()

    def our_way(model: Transformer) -> Way:
        return lambda prompts, count: generate(
            model, prompts, GenerationOptions(max_new_tokens=count)
        )

    speed = memory_bytes_per_second()
    matrices = sum(p.numel() for p in ours.parameters() if p.ndim == 2)
    num_read = matrices - ours.seq_len * ours.config.d_model  # position embeddings are looked up
    print(f"{options.threads} thread(s), memory read at {speed / 1e9:.1f} GB/s")
    fp32, bf16 = packed(ours), packed(ours, "bf16")
    sizes = {"cached": 4 * num_read, "transformers": 4 * num_read}
    one, several = [prompt(PROMPT_TOKENS)], [prompt(length) for length in BATCH_LENGTHS]
    parts = {
        "cache": (
            "With and without a cache, fp32",
            {
                "cached": our_way(fp32),
                "no cache": lambda prompts, count: without_cache(ours, prompts, count),
            },
            one,
            1,
        ),
        "fp32": (
            "One prompt, fp32",
            {
                "cached": our_way(fp32),
                "transformers": lambda prompts, count: with_transformers(theirs, prompts, count),
            },
            one,
            options.rounds,
        ),
        "batch": (
            "Prompts of unequal length, fp32",
            {
                "cached": our_way(fp32),
                "transformers": lambda prompts, count: with_transformers(theirs, prompts, count),
            },
            several,
            options.rounds,
        ),
        "bf16": (
            "One prompt, bf16",
            {
                "cached": our_way(bf16),
                "transformers": lambda prompts, count: with_transformers(theirs, prompts, count),
            },
            one,
            options.rounds,
        ),
    }
    for name in [options.part] if options.part else parts:
        if name == "bf16":  # last, since it changes the model
            theirs = theirs.bfloat16()  # type: ignore[attr-defined]
            sizes = {"cached": 2 * num_read, "transformers": 2 * num_read}
        title, ways, prompts, rounds = parts[name]
        compare(title, ways, prompts, options.tokens, rounds, sizes, speed)


if __name__ == "__main__":
    main()
