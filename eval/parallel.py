"""Runs work in threads, which can be stopped at any time."""

import collections
import concurrent.futures
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def as_done(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    may_begin: Callable[[Item], bool] = lambda item: True,
    stop: Callable[[], None] | None = None,
) -> Generator[tuple[Item, "concurrent.futures.Future[Result]"], None, None]:
    """Runs `work` on each item in its own thread, starting in order.

    Closing or interrupting the generator starts no further items. The threads are daemons and do
    not keep the program alive.

    Args:
      work: Function to run.
      items: Arguments of `work`.
      workers: Number of items that run at once.
      may_begin: Whether an item may start. If not, it is asked again after another item has
        finished. If none is running, the remaining items are skipped.
      stop: Makes running work end soon, so that it can be joined; None: work is left running.

    Yields:
      Each finished item with its future.
    """
    done: queue.SimpleQueue = queue.SimpleQueue()

    def do(item: Item) -> None:
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        try:
            future.set_result(work(item))
        except BaseException as error:
            future.set_exception(error)
        done.put((item, future))

    waiting = collections.deque(items)
    threads: list[threading.Thread] = []
    running = 0
    try:
        while True:
            while waiting and running < workers and may_begin(waiting[0]):
                threads = [thread for thread in threads if thread.is_alive()]
                threads.append(threading.Thread(target=do, args=(waiting.popleft(),), daemon=True))
                threads[-1].start()
                running += 1
            if not running:
                return
            yield done.get()
            running -= 1
    finally:
        if stop is not None:
            stop()
            for thread in threads:
                thread.join()
