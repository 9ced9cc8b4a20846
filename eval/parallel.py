"""Work done side by side, that can be stopped at any time."""

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
    """Does the work of each item in a thread of its own, in their order.

    Once this is closed, or interrupted, nothing more is begun. Threads do not keep the program from
    ending.

    Args:
      work: what is done.
      items: what it is done with.
      workers: how many are worked on at a time.
      may_begin: asked before an item is begun; after a no it is asked again when another is done,
        and what is left is not done if there is none.
      stop: makes the work that goes on end soon, which is then waited for; None: it is left alone.

    Yields:
      Each item that is done, and what came of it.
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
