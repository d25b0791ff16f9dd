"""How the sequences of a step are divided: among processes, into micro-batches, data and replay.

Imports nothing, since the settings are checked with it.
"""


def share_of(num_sequences: int, process: int, num_processes: int) -> range:
    """Return the sequences of a step that a process trains on. The last share is a largest one."""
    # shares differ by one at most; boundaries rounded down give the longer ones to the last
    return range(
        process * num_sequences // num_processes, (process + 1) * num_sequences // num_processes
    )


def even_size(num_sequences: int, limit: int) -> int:
    """Return a micro-batch size, at most `limit`, that leaves the last micro-batch nearly full."""
    # Only sizes over half of the limit: a smaller one would double the number of passes. A divisor
    # of num_sequences wastes nothing and wins; among equals the largest.
    limit = min(limit, num_sequences)
    return min(range(limit // 2 + 1, limit + 1), key=lambda size: (-num_sequences % size, -size))


def replayed_per_step(fraction: float, global_batch_size: int) -> int:
    """Return how many sequences of a step are pretraining text."""
    # the same number in each step, so that any step is known without those before
    return round(fraction * global_batch_size)


def idle_share(global_batch_size: int, num_processes: int) -> float:
    """Return the share of all processes' time spent waiting for those with a sequence more."""
    largest_share = -(-global_batch_size // num_processes)
    return 1 - global_batch_size / (largest_share * num_processes)


def uneven_warning(stage: str, global_batch_size: int, num_processes: int) -> str:
    """Return the warning about shares of different sizes, with a number of processes that avoids
    them.
    """
    largest_share = -(-global_batch_size // num_processes)
    return (
        f"{stage}.global_batch_size: {global_batch_size} sequences among {num_processes}"
        f" processes: some train on {largest_share} in each step, the others on fewer and wait,"
        f" {idle_share(global_batch_size, num_processes):.0%} of all time. As fast:"
        f" runtime.num_processes={-(-global_batch_size // largest_share)}"
    )
