"""A hand on every script: tests of the protocol play workers, clients and relays one call at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import redis

from rq_ceylon.goals import compile_goals
from rq_ceylon.models import Goal
from rq_ceylon.store import scripts, transitions
from rq_ceylon.store.codec import encode, task_text
from rq_ceylon.store.keys import STREAMS, Keys
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Ack, Committed, Delivery, GroupFacts, Page, PageAck, StagedTask

LEASE_MS = 400


class Bench:
    """One namespace on a real server. With `twice`, every call is sent twice, and the repetition is answered."""

    def __init__(self, url: str, namespace: str) -> None:
        self.redis: Any = redis.Redis.from_url(url, decode_responses=True, protocol=2)
        self.keys = Keys(namespace)
        self.calls = 0

    def run(self, call: Call) -> Any:
        self.calls += 1
        words = scripts.words(call)
        try:
            return self.redis.execute_command(*words)
        except redis.exceptions.NoScriptError:
            self.redis.script_load(scripts.source(call.script))
            return self.redis.execute_command(*words)

    # ---- clients -----------------------------------------------------------------------------------------------------
    def submit(
        self,
        gid: str,
        tasks: Sequence[str] = ("a",),
        *,
        needs: Mapping[str, Sequence[str]] | None = None,
        goal: str | Goal | Sequence[Goal | str] = (),
        role: str = "p",
        priority: int = 2,
        part: int = 1,
        last: bool = True,
        rolling: bool = False,
        digest: str = "d",
        delay_ms: int | None = None,
        expires_ms: int | None = None,
        crash_limit: int | None = None,
        depends_on: Sequence[str] = (),
        on_need_failed: str = "skip",
        open: Literal["0", "o", "i"] = "0",
        max_running: int = 0,
        lazy: bool = False,
    ) -> transitions.SubmitReply:
        facts = GroupFacts(
            "g", 86_400_000, goals=compile_goals(goal), depends_on=depends_on, on_need_failed=on_need_failed,
            open=open, open_timeout_ms=86_400_000, max_running=max_running, lazy=lazy,
        )  # fmt: skip
        text = task_text(role, priority, delay_ms, expires_ms, crash_limit, b"{}")
        staged = [StagedTask(tid, text, (needs or {}).get(tid, ())) for tid in tasks]
        for call in transitions.announce(self.keys, gid, [role]):
            self.run(call)
        call = transitions.submit(self.keys, gid, facts, staged, part=part, last=last, digest=digest, rolling=rolling)
        return transitions.submit_reply(gid, self.run(call))

    def ring(self, pages: Sequence[Page]) -> None:
        """Take pages where they belong, and acknowledge them."""
        for page in pages:
            if page.is_message:
                self.run(transitions.tell_group(self.keys, page))
                self.run(transitions.outbox(self.keys, page.gid, acks=[PageAck(page)]))
                continue
            horizon = self.run(transitions.enqueue(self.keys, page.role, [page]))
            self.run(transitions.outbox(self.keys, page.gid, acks=[PageAck(page, horizon)]))

    def queued(self, gid: str, tasks: Sequence[str] = ("a",), **options: Any) -> None:
        self.ring(self.submit(gid, tasks, **options).pages)

    # ---- workers -----------------------------------------------------------------------------------------------------
    def fetch(
        self,
        worker: str,
        budget: int = 10,
        *,
        role: str = "p",
        acks: Sequence[str] = (),
        recover: Sequence[str] | None = None,
        names: Sequence[str] = (),
    ) -> list[Delivery]:
        call = transitions.fetch(
            self.keys,
            role,
            worker,
            budget=budget,
            lease_ms=LEASE_MS,
            acks=[Ack(entry, "completed") for entry in acks],
            recover=recover,
            names=dict.fromkeys(names, 1000),
        )
        return list(transitions.fetch_reply(role, self.run(call)).deliveries)

    def renew(self, worker: str, *entries: str, role: str = "p") -> list[str]:
        answers: list[str] = self.run(transitions.renew(self.keys, role, worker, entries, lease_ms=LEASE_MS))
        return answers[1:]

    def unknown(self, worker: str, delivery: Delivery, name: str = "name") -> str:
        """Claim a task whose name this worker does not know, and have it wait for one that does."""
        assert self.claim(worker, delivery) == ["GRANTED"]
        verdict, pages = self.commit_with_pages(worker, delivery, "release")
        for page in pages:
            task = {(delivery.gid, delivery.tid): name}
            horizon = self.run(transitions.enqueue(self.keys, page.role, [page], names=task))
            self.run(transitions.outbox(self.keys, page.gid, acks=[PageAck(page, horizon)]))
        self.fetch(worker, 0, role=delivery.role, acks=[delivery.entry])
        return verdict

    def waiting_names(self, worker: str, *, role: str = "p") -> list[str]:
        """What a fetch tells of the names that tasks wait for."""
        call = transitions.fetch(self.keys, role, worker, budget=0, lease_ms=LEASE_MS)
        return sorted(transitions.fetch_reply(role, self.run(call)).names)

    def probe(self, gid: str, horizon: str, *, role: str = "p", to_the_end: bool = False) -> list[str]:
        """The word, and what the role shows; of the first answer, or of all."""
        begin = ""
        shown: list[str] = []
        while True:
            call = transitions.probe(self.keys, role, gid, horizon, begin)
            word, begin, tids = transitions.probe_reply(self.run(call))
            shown += tids
            if word != "MORE" or not to_the_end:
                return [word, *shown]

    def relay(self, gid: str) -> None:
        """Hand over all that is visible in an outbox."""
        call = transitions.outbox(self.keys, gid, wanted=50)
        while pages := transitions.outbox_reply(gid, self.run(call)).pages:
            self.ring(pages)

    def claim(self, worker: str, *deliveries: Delivery, suspect: bool = True) -> list[str]:
        reply = self.run(transitions.claim(self.keys, deliveries[0].gid, worker, deliveries, suspect=suspect))
        return [answer.verdict for answer in transitions.claim_reply(reply, len(deliveries)).answers]

    def commit(self, worker: str, delivery: Delivery, kind: str = "completed", **options: Any) -> str:
        verdict, pages = self.commit_with_pages(worker, delivery, kind, **options)
        self.ring(pages)
        return verdict

    def commit_with_pages(
        self,
        worker: str,
        delivery: Delivery,
        kind: str = "completed",
        *,
        reason: str = "error",
        delay_ms: int = 0,
        message: str = "m",
        children: Sequence[StagedTask] = (),
    ) -> tuple[str, Sequence[Page]]:
        blob = encode({"type": "E", "message": message})
        outcome = Committed(delivery.tid, delivery.fence, kind, reason, delay_ms, 5, blob, children)
        reply = self.run(transitions.commit(self.keys, delivery.gid, worker, [outcome]))
        answer = transitions.commit_reply(delivery.gid, reply, 1)
        return answer.verdicts[0], answer.pages

    def started(self, worker: str, gid: str) -> Delivery:
        """Fetch and claim the next task of this group."""
        (delivery,) = self.fetch(worker, 1)
        assert delivery.gid == gid
        assert self.claim(worker, delivery) == ["GRANTED"]
        return delivery

    def age(self, ms: int, *, role: str = "p") -> None:
        """
        Let every delivery look as old as this, as if nobody had renewed for so long, with the role being fetched from
        all the while.
        """
        for stream in STREAMS:
            key = self.keys.role_part(role, stream)
            if not self.redis.exists(key):
                continue
            for entry in self.redis.xpending_range(key, "workers", "-", "+", 1000):
                self.redis.execute_command(
                    "XCLAIM", key, "workers", entry["consumer"], 0, entry["message_id"], "IDLE", ms, "JUSTID"
                )
        seconds, micros = self.redis.time()
        now_ms = int(seconds) * 1000 + int(micros) // 1000
        self.redis.hset(self.keys.role_part(role, "meta"), mapping={"pause_until": 0, "last": now_ms})

    # ---- looking -----------------------------------------------------------------------------------------------------
    def meta(self, gid: str) -> dict[str, str]:
        found: dict[str, str] = self.redis.hgetall(self.keys.group_part(gid, "meta"))
        return found

    def state(self, gid: str) -> dict[str, Any]:
        """All that is stored of a group."""
        found: dict[str, Any] = {}
        for key in self.keys.group(gid):
            match self.redis.type(key):
                case "hash":
                    found[key] = self.redis.hgetall(key)
                case "zset":
                    found[key] = self.redis.zrange(key, 0, -1)
                case "list":
                    found[key] = self.redis.lrange(key, 0, -1)
        return found

    def counters(self, gid: str) -> dict[str, int]:
        meta = self.meta(gid)
        names = ("total", "waiting", "pending", "in_progress", "completed", "failed", "cancelled")
        return {name: int(meta[name]) for name in names if int(meta.get(name, 0))}
