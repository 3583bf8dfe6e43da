"""What a worker's turns say and leave unsaid, call by call, against a real server."""

from __future__ import annotations

import collections
import time
from collections.abc import Sequence
from typing import Any

import pytest
from bench import LEASE_MS, Bench

from rq_ceylon.maintenance.relay import relay
from rq_ceylon.store import transitions
from rq_ceylon.store.connection import Connection
from rq_ceylon.store.scripts import Call
from rq_ceylon.store.transitions import Committed
from rq_ceylon.worker import turn
from rq_ceylon.worker.delivery import Granted, Held, Stage
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.neighbours import bury
from rq_ceylon.worker.turn import Turns

pytestmark = pytest.mark.every_engine


class Hand:
    """A worker whose round trips are made by hand."""

    def __init__(
        self, bench: Bench, name: str, *, roles: Sequence[str] = ("p",), slots: int = 4, knows: Sequence[str] = ()
    ) -> None:
        self.bench, self.name, self.slots = bench, name, slots
        leases = Leases(url="", keys=bench.keys, worker=name, roles=roles, lease_ms=LEASE_MS)
        self.turns = Turns(
            keys=bench.keys,
            worker=name,
            roles=roles,
            slots=slots,
            lease_ms=LEASE_MS,
            leases=leases,
            knows=knows,
            may_send=lambda key: True,
        )
        self.calls: list[Call] = []

    def turn(self, *, unanswered: str = "") -> list[Granted]:
        """
        One pipeline.

        Args:
            unanswered: replies to this script are lost, and it is sent again, if it may be.
        """
        self.calls = []
        for step in self.turns.plan(self.slots - len(self.turns.running())):
            self.calls.append(step.call)
            reply = self.bench.run(step.call)
            if step.call.script == unanswered and step.on_no_reply is not None:
                step.on_no_reply()
            else:
                step.absorb(self.bench.run(step.call) if step.call.script == unanswered else reply)
        granted, self.turns.granted = self.turns.granted, []
        return granted

    def started(self) -> Held:
        self.turn()
        (grant,) = self.turn()
        return grant.held

    def end(self, held: Held, kind: str = "completed", reason: str = "") -> None:
        delivery = held.delivery
        self.turns.finish(held, Committed(delivery.tid, delivery.fence, kind, reason, 0, 1, b"1"))

    def acknowledged(self) -> list[str]:
        """The entries that the last turn acknowledged."""
        (fetch,) = [call for call in self.calls if call.script == "fetch"]
        return [str(word) for word in fetch.args[6 + int(fetch.args[5]) :][1:] if str(word).startswith("2:")]


def test_an_entry_is_acknowledged_in_the_turn_after_its_commit_was_answered(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    held = worker.started()
    worker.end(held)
    worker.turn()
    assert [call.script for call in worker.calls] == ["commit", "fetch"]
    assert worker.acknowledged() == []
    worker.turn()
    assert worker.acknowledged() == [held.delivery.entry]
    assert worker.turns.is_idle()


def test_what_another_worker_holds_is_forgotten_and_never_acknowledged(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    stale = worker.started()
    bench.age(LEASE_MS + 1)
    bench.started("other", "g")
    worker.end(stale)
    for _ in range(3):
        worker.turn()
        assert worker.acknowledged() == []
    assert worker.turns.is_idle()
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 1


def test_a_delivery_overtaken_before_its_claim_is_never_acknowledged(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    worker.turn()
    bench.age(LEASE_MS + 1)
    bench.started("other", "g")
    assert worker.turn() == []
    for _ in range(2):
        worker.turn()
        assert worker.acknowledged() == []
    assert worker.turns.is_idle()
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 1


def test_what_an_unanswered_fetch_delivered_is_recovered_by_the_next_one(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    worker = Hand(bench, "w")
    worker.turn(unanswered="fetch")
    assert not worker.turns.held
    worker.turn()
    assert {held.delivery.tid for held in worker.turns.held.values()} == {"a", "b"}
    assert len(worker.turn()) == 2


def test_acknowledgements_of_an_unanswered_fetch_are_sent_again(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    held = worker.started()
    worker.end(held)
    worker.turn()
    worker.turn(unanswered="fetch")
    worker.turn()
    assert worker.acknowledged() == [held.delivery.entry]


def test_a_worker_that_reclaims_its_own_entry_keeps_the_recorded_fence(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    held = worker.started()
    bench.age(LEASE_MS + 1)
    worker.turn()
    assert worker.turn() == []
    assert worker.turns.held["p", held.delivery.entry] is held
    worker.end(held)
    worker.turn()
    assert bench.meta("g")["completed"] == "1"
    assert bench.meta("g")["crashes"] == "0"


def test_a_low_mark_is_the_smallest_fence_held_or_above_all_received(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    worker = Hand(bench, "w")
    worker.turn()
    worker.turn()
    first, second = sorted(worker.turns.held.values(), key=lambda held: held.delivery.fence)
    assert worker.turns.low_marks() == {"p": first.delivery.fence}
    worker.end(first)
    worker.turn()
    assert worker.turns.low_marks() == {"p": second.delivery.fence}
    worker.end(second)
    worker.turn()
    assert worker.turns.low_marks() == {"p": second.delivery.fence + 1}


class Recorder:
    """A connection that remembers what was sent."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.scripts: list[str] = []

    async def run(self, calls: list[Call], **_: Any) -> list[Any]:
        self.scripts += [f"{call.script} acks" if self._acks(call) else call.script for call in calls if call.script]
        return [self.bench.run(call) for call in calls]

    @staticmethod
    def _acks(call: Call) -> bool:
        return call.script == "outbox" and int(call.args[3]) > 0


@pytest.mark.anyio
async def test_a_relay_acknowledges_a_page_only_after_it_was_enqueued(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    bench.submit("g", ["b"], part=2, digest="2")
    recorder = Recorder(bench)
    await relay(recorder, bench.keys, "g")  # type: ignore[arg-type]
    assert recorder.scripts == ["outbox", "enqueue", "outbox acks"]
    assert transitions.outbox_reply("g", bench.run(transitions.outbox(bench.keys, "g"))).pages == []


@pytest.mark.parametrize("unanswered", ["", "commit"])
def test_more_dependents_than_one_commit_looks_at_follow_in_the_next_turns(bench: Bench, unanswered: str) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    names = [str(n) for n in range(1200)]
    for part in range(3):
        some = names[400 * part : 400 * (part + 1)]
        needs: dict[str, Sequence[str]] = {tid: ["a"] for tid in some}
        bench.submit("g", some, part=2 + part, last=part == 2, digest=f"{2 + part}", needs=needs)
    bench.relay("g")
    worker = Hand(bench, "w")
    worker.end(worker.started())
    worker.turn(unanswered=unanswered)
    assert bench.counters("g")["waiting"] == 200
    worker.turn()
    assert "waiting" not in bench.counters("g")
    worker.turn()
    entries = bench.redis.xlen(bench.keys.role_part("p", "normal"))
    assert entries >= 1200


@pytest.mark.parametrize("unanswered", ["", "commit", "depend", "outbox"])
def test_a_group_that_was_told_goes_on_in_the_next_turns(bench: Bench, unanswered: str) -> None:
    bench.queued("first")
    bench.submit("second", depends_on=["first"])
    bench.run(transitions.register(bench.keys, "first", "second"))
    worker = Hand(bench, "w")
    worker.end(worker.started())
    for number in range(6):
        worker.turn(unanswered=unanswered if number < 3 else "")
    assert [held.delivery.gid for held in worker.turns.held.values()] == ["second"]


def test_a_retry_reaches_its_role_though_the_answer_to_its_commit_was_lost(bench: Bench) -> None:
    bench.queued("g")
    worker = Hand(bench, "w")
    worker.end(worker.started(), "retry")
    worker.turn(unanswered="commit")
    granted = [grant.claimed.attempt for _ in range(4) for grant in worker.turn()]
    assert granted == [2]


@pytest.mark.anyio
@pytest.mark.parametrize(("kind", "follows"), [("completed", "b"), ("retry", "a")])
async def test_what_a_worker_committed_before_it_died_is_handed_on_with_what_it_held(
    bench: Bench, connection: Connection, kind: str, follows: str
) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    bench.submit("g", ["b"], part=2, digest="2", needs={"b": ["a"]})
    bench.relay("g")
    dead, worker = Hand(bench, "dead"), Hand(bench, "w")
    dead.end(dead.started(), kind)
    dead.turn()
    assert dead.turns.is_due(1)  # it was about to enqueue what follows
    await bury(connection, bench.keys, "dead", ["p"])

    granted = [grant.held.delivery.tid for _ in range(3) for grant in worker.turn()]

    assert granted == [follows]


def test_a_task_that_ended_while_it_waited_by_name_wants_no_hidden_pages(bench: Bench) -> None:
    bench.queued("g")
    first, second = Hand(bench, "v"), Hand(bench, "w", knows=["n"])
    first.end(first.started(), "release", "unknown:n")
    for _ in range(3):
        first.turn()
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))

    calls = [call for _ in range(5) for call in (second.turn(), second.calls)[1]]

    assert {call.args[1] for call in calls if call.script == "outbox"} == {0}


class Direct:
    """The connection of a lease thread."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def run_each(self, calls: list[Call]) -> list[Any]:
        return [self.bench.run(call) for call in calls]


def test_the_lease_thread_keeps_the_clock_of_roles_with_nothing_held(bench: Bench) -> None:
    leases = Leases(url="", keys=bench.keys, worker="w", roles=["p", "q"], lease_ms=LEASE_MS)
    leases.adopt("q", 3 * LEASE_MS)
    leases.renew(Direct(bench))  # type: ignore[arg-type]
    kept = [bench.redis.hmget(bench.keys.role_part(role, "meta"), "lease", "last") for role in ("p", "q")]
    assert [lease for lease, _ in kept] == [str(LEASE_MS), str(3 * LEASE_MS)]
    assert all(last for _, last in kept)
    assert leases.lease_s == LEASE_MS / 1000


def test_a_new_lease_reaches_the_lease_thread_before_it_reclaims_anything(bench: Bench) -> None:
    bench.queued("g")
    (held,) = bench.fetch("w")
    leases = Leases(url="", keys=bench.keys, worker="w", roles=["p"], lease_ms=LEASE_MS)
    bench.age(LEASE_MS - 100)
    now_ms = int(bench.redis.hget(bench.keys.role_part("p", "meta"), "last"))
    bench.run(transitions.set_lease(bench.keys, "p", 100, now_ms))
    assert bench.fetch("v") == []
    leases.hold("p", held.entry, time.monotonic() + 60)
    leases.renew(Direct(bench))  # type: ignore[arg-type]
    assert leases.lease_s == 0.1


def test_a_lease_is_renewed_until_its_limit_and_no_longer(bench: Bench) -> None:
    bench.queued("g", ["over", "kept"])
    over, kept = bench.fetch("w", 2)
    leases = Leases(url="", keys=bench.keys, worker="w", roles=["p"], lease_ms=LEASE_MS)
    leases.hold("p", over.entry, time.monotonic() - 1)
    leases.hold("p", kept.entry, time.monotonic() + 60)
    bench.age(60_000)

    leases.renew(Direct(bench))  # type: ignore[arg-type]
    assert [delivery.tid for delivery in bench.fetch("v")] == ["over"]


def test_of_the_claims_of_one_turn_only_one_may_start_a_suspect(bench: Bench) -> None:
    for gid in ("g", "h"):
        bench.queued(gid)
    worker = Hand(bench, "w")
    worker.turn()
    worker.turn()
    assert [call.args[1] for call in worker.calls if call.script == "claim"] == [1, 0]


def test_a_role_whose_slot_moves_while_it_is_fetched_is_not_fetched_twice_at_once(bench: Bench) -> None:
    worker = Hand(bench, "w")
    in_flight = worker.turns.plan(4)
    worker.turns.ring()
    assert [step.call.script for step in in_flight] == ["fetch"]
    assert worker.turns.plan(4) == []
    for step in in_flight:
        step.absorb(bench.run(step.call))
    assert [step.call.script for step in worker.turns.plan(4)] == ["fetch"]


def test_a_grant_whose_lease_was_lost_on_its_way_does_not_run(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    worker.turn()
    (held,) = worker.turns.held.values()
    steps = worker.turns.plan(4)
    worker.turns.forget(held)
    for step in steps:
        step.absorb(bench.run(step.call))
    assert worker.turns.granted == []
    assert worker.turns.running() == []


def test_what_follows_from_a_task_that_ended_at_its_claim_follows_at_once(bench: Bench) -> None:
    bench.submit("g", ["expired"], part=1, last=False, digest="1", expires_ms=0, on_need_failed="continue")
    bench.submit("g", ["next"], part=2, digest="2", needs={"next": ["expired"]})
    bench.relay("g")
    began = bench.redis.time()
    while bench.redis.time() < (began[0], began[1] + 1000):  # until it has expired
        pass
    worker = Hand(bench, "w")
    for _ in range(6):
        worker.turn()
    assert [held.delivery.tid for held in worker.turns.running()] == ["next"]


def test_a_worker_whose_claim_ends_a_task_logs_why_once(bench: Bench, said: list[str]) -> None:
    bench.queued("poison", crash_limit=0)
    bench.started("lost", "poison")
    bench.queued("expired", expires_ms=0)
    began = bench.redis.time()
    while bench.redis.time() < (began[0], began[1] + 1000):  # until it has expired
        pass
    bench.age(LEASE_MS + 1)
    worker = Hand(bench, "w")
    for _ in range(6):
        worker.turn()
        worker.turns.ring()

    told = sorted((line.strip() for line in said if " is over (" in line), reverse=True)

    assert len(told) == 2, said
    assert told[0].startswith("WARNING: expired/a is over (expired): it had not started when it expired, ")
    assert told[1].startswith("ERROR: poison/a is over (poison): its worker was lost under it once: ")


def test_what_a_stopping_worker_has_not_started_is_given_back(bench: Bench) -> None:
    bench.queued("g", ["a"])
    worker = Hand(bench, "w")
    worker.turn()
    worker.turns.stopping = True
    assert worker.turn() == []
    assert worker.turns.is_idle()
    assert [delivery.tid for delivery in bench.fetch("other")] == ["a"]


def test_a_worker_that_knows_a_waiting_name_has_its_task_two_turns_later(bench: Bench) -> None:
    bench.queued("g", ["a"])
    old, new = Hand(bench, "old"), Hand(bench, "new", knows=["name"])
    old.end(old.started(), "release", "unknown:name")
    for _ in range(4):
        old.turn()
    assert old.turns.is_idle()
    assert old.turn() == []
    new.turns.ring()
    new.turn()
    assert new.turns.is_due(4)  # it has heard of the name
    new.turn()
    assert [held.delivery.tid for held in new.turns.held.values()] == ["a"]
    (grant,) = new.turn()
    assert grant.claimed.releases == 1
    assert bench.waiting_names("old") == []


def test_a_full_worker_that_knows_a_name_does_not_ask_again_and_again(bench: Bench) -> None:
    bench.queued("g", ["a"])
    bench.unknown("old", bench.fetch("old")[0])
    full = Hand(bench, "full", slots=0, knows=["name"])
    for _ in range(3):
        full.turn()
    assert not full.turns.is_due(0)


@pytest.mark.parametrize("unanswered", ["commit", "enqueue"])
def test_a_task_of_unknown_name_is_with_its_role_though_an_answer_was_lost(bench: Bench, unanswered: str) -> None:
    bench.queued("g", ["a"])
    old = Hand(bench, "old")
    old.end(old.started(), "release", "unknown:name")
    for number in range(6):
        for grant in old.turn(unanswered=unanswered if number < 2 else ""):
            old.end(grant.held, "release", "unknown:name")
    for _ in range(6):
        old.turn()
    assert len(bench.fetch("new", names=["name"])) >= 1


def test_an_entry_that_cannot_start_is_given_back_and_not_fetched_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g", ["a", "b"])
    worker = Hand(bench, "w", slots=2)
    worker.turn()
    assert 1 < worker.turns.rest_s <= turn.UNCLAIMED_S or worker.turns.rest_s <= LEASE_MS / 3000
    assert not worker.turns.is_due(0)
    monkeypatch.setattr(turn, "UNCLAIMED_S", 0.0)
    assert worker.turns.rest_s == 0
    assert worker.turns.is_due(0)
    worker.turns._recent.extend([time.monotonic()] * 2)  # as if it could read ahead
    worker.slots = 0
    worker.turn()
    assert [call.script for call in worker.calls] == ["release"]
    assert [delivery.tid for delivery in bench.fetch("idle")] == ["a", "b"]


def test_all_roles_together_give_no_more_than_can_start_in_turns(bench: Bench) -> None:
    roles = [f"r{number}" for number in range(5)]
    for role in roles:
        bench.queued(role, [str(n) for n in range(20)], role=role)
    worker = Hand(bench, "w", roles=roles, slots=1)
    ran: list[str] = []
    for _ in range(60):
        for grant in worker.turn():
            ran.append(grant.held.delivery.role)
            worker.turns._recent.clear()
            worker.end(grant.held)
            worker.turns._recent.clear()
        assert len([held for held in worker.turns.held.values() if held.stage is not Stage.ENDED]) <= 1
    counts = collections.Counter(ran)
    assert set(counts) == set(roles)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_worker_of_many_roles_with_one_slot_finds_the_one_that_has_a_task(bench: Bench) -> None:
    roles = [f"r{number}" for number in range(8)]
    bench.queued("g", role="r6")
    worker = Hand(bench, "w", roles=roles, slots=1)
    turns = 0
    while not worker.turn():
        turns += 1
        assert turns < 12
    assert [held.delivery.role for held in worker.turns.held.values()] == ["r6"]


def test_a_worker_whose_roles_are_empty_says_so_and_asks_no_more(bench: Bench) -> None:
    worker = Hand(bench, "w", roles=["a", "b", "c"], slots=1)
    for _ in range(3):
        assert worker.turns.is_due(1)
        worker.turn()
    assert worker.turns.fetched_nothing
    assert not worker.turns.is_due(1)


def test_a_worker_that_hands_a_dependent_to_another_role_has_nothing_more_to_ask(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    bench.submit("g", ["b"], part=2, digest="2", needs={"b": ["a"]}, role="other")
    bench.relay("g")
    worker = Hand(bench, "w")
    worker.end(worker.started())
    for _ in range(4):
        worker.turn()
    assert bench.redis.xlen(bench.keys.role_part("other", "normal")) == 1
    assert not worker.turns.is_due(1)
    assert worker.turns.is_idle()
