"""Prefetch items of an iterator in a background thread."""

from collections.abc import Generator, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], num_ahead: int) -> Generator[T]:
    """Yield `items` in order, while a thread makes up to `num_ahead` more of them.

    An error of `items` is raised here, after the items before it. Closing this generator ends the
    thread first, at the latest with the item that it is making.
    """
    made: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room, is_closing = Semaphore(num_ahead - 1), Event()  # the first needs no permit

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                room.acquire()
                if is_closing.is_set():
                    return
            made.put(None)
        except BaseException as error:  # raised in the consumer's thread
            made.put(error)

    thread = Thread(target=make, name="prefetch", daemon=True)
    thread.start()
    try:
        while (found := made.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found[0]
    finally:
        is_closing.set()
        room.release()
        thread.join()
