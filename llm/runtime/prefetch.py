"""Make things ahead of their use, in a thread."""

from collections.abc import Generator, Iterator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], num_ahead: int) -> Generator[T]:
    """Yield what `items` yields, in its order, while a thread makes up to `num_ahead` more.

    What `items` raises is raised here, after what came before it. When this generator is closed,
    or dropped, the thread ends first, at the latest with the item that it is making.
    """
    made: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()
    room, is_closing = Semaphore(num_ahead - 1), Event()  # there is room for the first

    def make() -> None:
        try:
            for item in items:
                made.put((item,))
                room.acquire()
                if is_closing.is_set():
                    return
            made.put(None)
        except BaseException as error:  # it is raised where the items are used
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
