"""A TCP proxy before a server, which hurts the connections that pass through it as a network does."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

GREETINGS = ("pass", "refuse", "reset", "reset after a reply", "silence")
"""
What a new connection meets: nothing; a close at once; a reset within 2 ms; a reset behind the first reply; no answer.
"""


@dataclass(eq=False)
class Line:
    """One connection through the proxy: what its client sent (its last 4,000 bytes), and whether it has gone silent."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    sent: bytes = b""
    is_silent: bool = False
    number: int = 0
    pumps: list[asyncio.Task[None]] = field(default_factory=list)

    def abort(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class Proxy:
    """
    Passes on what clients and the server say. Lives in a thread of its own.

    Attributes:
        greeting: what new connections meet, one of GREETINGS.
        delay_s: how long each piece takes, each way.
        counts: how often each fault was done.
    """

    def __init__(self, target: int, seed: int = 7) -> None:
        self._target, self._random = target, random.Random(seed)
        self.port, self.greeting, self.delay_s = 0, "pass", 0.0
        self.counts: dict[str, int] = {}
        self.lines: list[Line] = []
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    # ---- faults ------------------------------------------------------------------------------------------------------
    def silence(self, which: Callable[[Line], bool] = lambda line: True) -> int:
        """Pass on nothing more of these connections, and close none of them. Returns how many they are."""
        return self._hurt("silenced", which, lambda line: setattr(line, "is_silent", True))

    def reset(self, which: Callable[[Line], bool] = lambda line: True) -> int:
        return self._hurt("reset", which, Line.abort)

    def half_close(self, which: Callable[[Line], bool] = lambda line: True) -> int:
        """Tell these clients that the server says no more, but go on to take what they say."""

        def close(line: Line) -> None:
            with contextlib.suppress(OSError, RuntimeError):
                line.client.write_eof()

        return self._hurt("half-closed", which, close)

    def _hurt(self, name: str, which: Callable[[Line], bool], how: Callable[[Line], object]) -> int:
        async def hurt() -> int:
            chosen = [line for line in self.lines if which(line)]
            for line in chosen:
                how(line)
            self._count(name, len(chosen))
            return len(chosen)

        return asyncio.run_coroutine_threadsafe(hurt(), self._loop).result(5)

    def _count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    # ---- passing on --------------------------------------------------------------------------------------------------
    async def _meet(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        line = Line(client, number=sum(self.counts.values()))
        greeting = self.greeting
        if greeting != "pass":
            self._count(greeting)
        if greeting in ("refuse", "reset"):
            await asyncio.sleep(self._random.uniform(0, 0.002) if greeting == "reset" else 0)
            line.abort()
            return
        line.is_silent = greeting == "silence"
        self.lines.append(line)
        try:
            answers, line.server = await asyncio.open_connection("127.0.0.1", self._target)
            line.pumps = [
                asyncio.create_task(self._pump(line, reader, line.server, is_up=True)),
                asyncio.create_task(self._pump(line, answers, client, resets=greeting == "reset after a reply")),
            ]
            await asyncio.wait(line.pumps, return_when=asyncio.FIRST_COMPLETED)
        except (OSError, asyncio.CancelledError):  # cancelled: asyncio would log that as an error
            pass
        finally:
            line.abort()
            self.lines.remove(line)

    async def _pump(
        self,
        line: Line,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        is_up: bool = False,
        resets: bool = False,
    ) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            while piece := await reader.read(65536):
                if is_up:
                    line.sent = (line.sent + piece)[-4000:]
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if line.is_silent:
                    await asyncio.Event().wait()
                writer.write(piece)
                await writer.drain()
                if resets:
                    return

    def _run(self) -> None:
        async def serve() -> None:
            self._server = await asyncio.start_server(self._meet, "127.0.0.1", 0, backlog=1000)
            self.port = self._server.sockets[0].getsockname()[1]
            self._ready.set()

        asyncio.set_event_loop(self._loop)
        self._loop.create_task(serve())
        self._loop.run_forever()

    def start(self) -> None:
        self._thread.start()
        self._ready.wait(5)

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
        self._thread.join(5)
        self._loop.close()


@contextlib.contextmanager
def proxy_to(port: int, seed: int = 7) -> Iterator[Proxy]:
    """A proxy before the server at this port."""
    proxy = Proxy(port, seed)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
