"""
The scripts against a model of a few lines: any order of submit, claim, commit, retry, die, reclaim, double entries,
cancel, pause, resume, add, spawn, seal and reopen, with and without a limit of what runs, gives what the model says,
and every group comes to its end.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from bench import Bench
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rq_ceylon.store import transitions
from rq_ceylon.store.codec import task_text
from rq_ceylon.store.transitions import Delivery, Page, StagedTask
from rq_ceylon.views import COUNTERS

CRASH_LIMIT = 3
LEASE_MS = 60_000  # so long that none ends by itself
TEXT = task_text("p", 2, None, None, None, b"{}")
ENDED = ("completed", "failed", "cancelled")


@dataclass
class Modelled:
    """A task. `holder` is the delivery on record: it runs under it, or did last."""

    needs: Sequence[str]
    status: str
    issue: int = 1
    crashes: int = 0
    holder: tuple[str, Delivery] | None = None
    has_result: bool = False
    to_stop: bool = False


@dataclass
class Group:
    goal: int
    tasks: dict[str, Modelled] = field(default_factory=dict)
    status: str = "active"
    attempts: int = 0
    crashes: int = 0
    max_running: int = 0
    is_open: bool = False
    goal_status: str = ""

    @property
    def is_closed(self) -> bool:
        return self.status in ("closing", "finished")

    def count(self, *statuses: str) -> int:
        return sum(task.status in statuses for task in self.tasks.values())

    def add(self, tid: str, needs: Sequence[str]) -> bool:
        if tid in self.tasks:
            return False
        is_open = {need for need in needs if self.tasks[need].status not in ENDED}
        self.tasks[tid] = Modelled(needs, "waiting" if is_open else "pending")
        if any(self.tasks[need].status in ("failed", "cancelled") for need in needs):
            self.tasks[tid].status, self.tasks[tid].has_result = "cancelled", True
        return True

    def reopen(self) -> list[str]:
        """All that did not complete, in the order of their needs."""
        words = []
        if self.status == "finished":
            for task in self.tasks.values():
                task.has_result = True
        for task in self.tasks.values():
            if not task.has_result or task.status == "completed":
                words.append("open" if not task.has_result else "completed")
            elif any(self.tasks[need].status in ("failed", "cancelled") for need in task.needs):
                words.append("blocked")
            else:
                is_ready = all(self.tasks[need].status == "completed" for need in task.needs)
                task.status, task.issue = "pending" if is_ready else "waiting", task.issue + 1
                task.has_result, task.to_stop, task.holder, task.crashes = False, False, None, 0
                words.append("reopened")
        if "reopened" in words:
            self.status = "active" if self.status == "finished" else self.status
            if self.goal_status == "failed" and self.count("completed") + self.open >= self.goal:
                self.goal_status = ""
        return words

    @property
    def open(self) -> int:
        return self.count("waiting", "pending", "in_progress")

    def end(self, tid: str, outcome: str) -> None:
        task = self.tasks[tid]
        task.status, task.has_result = outcome, True
        if not self.is_closed:
            for name, child in self.tasks.items():
                if child.status == "waiting" and tid in child.needs:
                    if outcome != "completed":
                        self.end(name, "cancelled")
                    elif all(self.tasks[need].status == "completed" for need in child.needs):
                        child.status = "pending"
        self.look()

    def close(self) -> None:
        self.status, self.is_open = "closing", False
        for task in self.tasks.values():
            if task.status in ("waiting", "pending"):
                task.status = "cancelled"
        self.look()

    def look(self) -> None:
        completed = self.count("completed")
        if not self.goal_status and completed >= self.goal:
            self.goal_status = "achieved"
        elif not self.goal_status and completed + self.open < self.goal and not self.is_open:
            self.goal_status = "failed"
        if self.open == 0 and not self.is_open:
            self.status = "finished"

    def grant(self, worker: str, delivery: Delivery) -> str:
        task = self.tasks[delivery.tid]
        task.status, task.holder, task.to_stop = "in_progress", (worker, delivery), False
        self.attempts += 1
        return "GRANTED"

    def claim(self, worker: str, delivery: Delivery) -> str:
        task = self.tasks[delivery.tid]
        if task.has_result:
            return "DONE"
        if task.status == "in_progress":
            assert task.holder
            _, held = task.holder
            if task.holder == (worker, delivery):
                return "GRANTED"  # a repeated call
            if held.lineage != delivery.lineage:
                return "DUPLICATE"
            return self.take_over(worker, delivery) if delivery.fence > held.fence else "LOST"
        if self.is_closed:
            return "CLOSED"
        if int(delivery.issue) < task.issue:
            return "OUTDATED"
        if self.status == "paused":
            task.issue += 1
            return "PARKED"
        if self.max_running and self.count("in_progress") >= self.max_running:
            task.issue += 1
            return "PARKED"
        return self.grant(worker, delivery)

    def take_over(self, worker: str, delivery: Delivery) -> str:
        task = self.tasks[delivery.tid]
        if self.is_closed or task.to_stop:
            self.end(delivery.tid, "cancelled")
            return "DONE"
        task.crashes += 1
        self.crashes += 1
        if task.crashes > CRASH_LIMIT:
            self.end(delivery.tid, "failed")
            return "DONE"
        if self.status == "paused":
            task.status, task.issue = "pending", task.issue + 1
            return "PARKED"
        return self.grant(worker, delivery)

    def commit(self, worker: str, delivery: Delivery, kind: str) -> str:
        task = self.tasks[delivery.tid]
        if task.holder != (worker, delivery):
            return "DONE" if task.has_result else "STALE"
        if task.status != "in_progress":
            return "DONE"
        if kind == "completed":
            self.end(delivery.tid, "completed")
        elif self.is_closed or task.to_stop:
            self.end(delivery.tid, "cancelled")
        elif kind == "failed":
            self.end(delivery.tid, "failed")
        else:
            task.status, task.issue = "pending", task.issue + 1
        return "OK"


class Machine(RuleBasedStateMachine):
    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(self.url, f"test-{uuid.uuid4().hex[:12]}")
        self.group = Group(0)
        self.pages: list[Page] = []
        self.delivered: list[tuple[str, Delivery]] = []
        self.runs: list[tuple[str, Delivery]] = []

    @initialize(
        needs=st.lists(st.sets(st.integers(0, 4), max_size=2), min_size=2, max_size=6),
        goal=st.integers(1, 3),
        is_open=st.booleans(),
        max_running=st.sampled_from([0, 0, 1, 2]),
    )
    def submit(self, needs: list[set[int]], goal: int, is_open: bool, max_running: int) -> None:
        self.group.goal = min(goal, len(needs))
        self.group.is_open, self.group.max_running = is_open, max_running
        for number, some in enumerate(needs):
            names = [f"t{need}" for need in sorted(some) if need < number]
            self.group.tasks[f"t{number}"] = Modelled(names, "waiting" if names else "pending")
        wanted = {tid: task.needs for tid, task in self.group.tasks.items()}
        reply = self.bench.submit(
            "g",
            list(wanted),
            needs=wanted,
            goal=f"completed >= {self.group.goal}",
            open="o" if is_open else "0",
            max_running=max_running,
        )
        self.pages = list(reply.pages)
        self.bench.ring(reply.pages)
        self.bench.run(transitions.release_all(self.bench.keys, "p", "nobody"))  # makes the consumer groups

    @rule(worker=st.sampled_from(["u", "v", "w"]), budget=st.integers(1, 3), sleeps=st.booleans())
    def work(self, worker: str, budget: int, sleeps: bool) -> None:
        deliveries = self.bench.fetch(worker, budget)
        self.delivered += [(worker, delivery) for delivery in deliveries]
        if not sleeps:
            for delivery in deliveries:
                self.claim(worker, delivery)

    @precondition(lambda self: self.delivered)
    @rule(data=st.data())
    def a_sleeper_claims(self, data: st.DataObject) -> None:
        self.claim(*self.delivered[data.draw(st.integers(0, len(self.delivered) - 1))])

    def claim(self, worker: str, delivery: Delivery) -> None:
        expected = self.group.claim(worker, delivery)
        assert self.bench.claim(worker, delivery) == [expected]
        if expected == "GRANTED":
            self.runs.append((worker, delivery))
        elif expected != "LOST":
            self.bench.fetch(worker, 0, acks=[delivery.entry])

    @precondition(lambda self: self.runs)
    @rule(
        data=st.data(),
        kind=st.sampled_from(["completed", "completed", "failed", "retry", "release"]),
        spawned=st.sets(st.integers(0, 9), max_size=2),
    )
    def commit(self, data: st.DataObject, kind: str, spawned: set[int]) -> None:
        """Of any delivery that was ever granted: a live worker's, a sleeper's, or a second time."""
        worker, delivery = self.runs[data.draw(st.integers(0, len(self.runs) - 1))]
        takes = self.group.is_open
        expected = self.group.commit(worker, delivery, kind)
        if takes and kind == "completed" and expected == "OK":
            for number in spawned:
                self.group.add(f"t{number}", ())
            self.group.look()
        children = [StagedTask(f"t{number}", TEXT) for number in spawned]
        verdict, pages = self.bench.commit_with_pages(worker, delivery, kind, children=children)
        assert verdict == expected
        self.pages += pages
        self.bench.ring(pages)
        if verdict != "STALE":
            self.bench.fetch(worker, 0, acks=[delivery.entry])

    @rule()
    def all_workers_die(self) -> None:
        self.bench.age(LEASE_MS + 1)

    @rule(worker=st.sampled_from(["u", "v", "w"]))
    def a_dead_worker_is_buried(self, worker: str) -> None:
        self.bench.run(transitions.release_all(self.bench.keys, "p", worker))

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        """A page is handed over again."""
        page = self.pages[data.draw(st.integers(0, len(self.pages) - 1))]
        self.bench.run(transitions.enqueue(self.bench.keys, "p", [page]))

    @precondition(lambda self: self.group.tasks and self.group.is_open)
    @rule(numbers=st.lists(st.integers(0, 9), max_size=3, unique=True), data=st.data())
    def add(self, numbers: list[int], data: st.DataObject) -> None:
        staged, added = [], 0
        for number in numbers:
            needs = sorted(data.draw(st.sets(st.sampled_from(sorted(self.group.tasks)), max_size=2)))
            staged.append(StagedTask(f"t{number}", TEXT, needs))
            added += self.group.add(f"t{number}", needs)
        reply = transitions.add_reply("g", self.bench.run(transitions.add(self.bench.keys, "g", staged)))
        assert (reply.word, reply.added) == ("OK", added)
        self.pages += reply.pages
        self.bench.ring(reply.pages)
        self.group.look()

    @precondition(lambda self: self.group.tasks and self.group.is_open)
    @rule()
    def seal(self) -> None:
        self.bench.run(transitions.seal(self.bench.keys, "g", untouched_ms=0))
        self.group.is_open = False
        self.group.look()

    @precondition(lambda self: self.group.tasks and self.group.status != "closing")
    @rule()
    def reopen(self) -> None:
        """All that did not complete is retried, in two parts."""
        keys, tasks = self.bench.keys, self.group.tasks
        if self.group.status == "finished":
            assert self.bench.run(transitions.settle(keys, "g", "0"))[0] == "OK"
        wanted = [(tid, tasks[tid].needs) for tid in tasks]
        expected = self.group.reopen()
        words: list[str] = []
        for part in (wanted[:2], wanted[2:]):
            words += self.bench.run(transitions.reopen(keys, "g", part))[2:]
        assert words == expected
        self.bench.run(transitions.end_retry(keys, "g"))
        self.group.look()
        self.bench.relay("g")

    @rule(number=st.integers(0, 5))
    def cancel_task(self, number: int) -> None:
        tid = f"t{number}"
        task = self.group.tasks.get(tid)
        expected = "unknown"
        if task and task.status == "in_progress":
            task.to_stop, expected = True, "stopping"
        elif task and (task.has_result or self.group.is_closed):
            expected = "ended"
        elif task:
            self.group.end(tid, "cancelled")
            expected = "cancelled"
        reply = self.bench.run(transitions.cancel_tasks(self.bench.keys, "g", [tid]))
        assert reply[2:] == [expected]
        self.bench.relay("g")

    @precondition(lambda self: self.group.status == "active" and self.group.count(*ENDED) > 1)
    @rule()
    def cancel(self) -> None:
        self.bench.run(transitions.cancel_group(self.bench.keys, "g"))
        self.group.close()

    @precondition(lambda self: self.group.status == "active")
    @rule()
    def pause(self) -> None:
        self.bench.run(transitions.pause_group(self.bench.keys, "g"))
        self.group.status = "paused"

    @precondition(lambda self: self.group.status == "paused")
    @rule()
    def resume(self) -> None:
        self.bench.run(transitions.resume_group(self.bench.keys, "g"))
        self.group.status = "active"
        self.bench.relay("g")

    @invariant()
    def counters_and_goal_are_the_models(self) -> None:
        if not self.group.tasks:
            return
        meta = self.bench.meta("g")
        expected = {name: self.group.count(name) for name in COUNTERS}
        assert {name: int(meta.get(name, 0)) for name in COUNTERS} == expected
        assert meta["status"] == self.group.status
        assert (int(meta.get("attempts", 0)), int(meta.get("crashes", 0))) == (self.group.attempts, self.group.crashes)
        assert meta.get("goal:goal", "").partition("|")[0] == self.group.goal_status
        if self.group.max_running:
            assert expected["in_progress"] <= self.group.max_running

    def teardown(self) -> None:
        """Whatever happened, a healthy worker brings the group to its end."""
        if not self.group.tasks:
            return
        if self.group.is_open:
            self.seal()
        if self.group.status == "paused":
            self.resume()
        for _ in range(60):
            if self.group.status == "finished":
                break
            self.bench.age(LEASE_MS + 1)
            self.bench.relay("g")  # what a claim made room for
            before = len(self.runs)
            self.work("w", 3, False)
            for worker, delivery in self.runs[before:]:
                assert self.bench.commit(worker, delivery) == self.group.commit(worker, delivery, "completed")
                self.bench.fetch(worker, 0, acks=[delivery.entry])
        assert self.group.status == "finished"
        self.counters_and_goal_are_the_models()
        self.bench.redis.close()


@pytest.mark.every_engine
def test_any_order_of_calls_gives_what_the_model_says(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.LEASE_MS", LEASE_MS)
    Machine.url = redis_url
    limits = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # to shrink takes minutes
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=limits)
