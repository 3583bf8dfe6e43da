"""The protocol row by row: states, verdicts of claim and commit, what each script does when it is repeated."""

import collections
import random
from typing import Any

import pytest
import redis
from bench import LEASE_MS, Bench

from rq_ceylon.goals import compile_goals
from rq_ceylon.models import DEFAULT_MAX_CRASHES, Goal
from rq_ceylon.store import transitions
from rq_ceylon.store.codec import task_text
from rq_ceylon.store.transitions import Ack, Committed, Delivery, GroupFacts, PageAck, StagedTask
from rq_ceylon.worker.leases import Leases
from rq_ceylon.worker.turn import Turns

pytestmark = pytest.mark.every_engine


def turns_of(bench: Bench, roles: list[str], *, slots: int, lease_ms: int = LEASE_MS) -> Turns:
    leases = Leases(url="", keys=bench.keys, worker="w", roles=roles, lease_ms=lease_ms)
    return Turns(
        keys=bench.keys,
        worker="w",
        roles=roles,
        slots=slots,
        lease_ms=lease_ms,
        leases=leases,
        may_send=lambda key: True,
    )


# ---- states ----------------------------------------------------------------------------------------------------------
def test_tasks_wait_run_and_end_and_the_six_counters_always_sum_to_total(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], needs={"b": ["a"]})
    assert bench.counters("g") == {"total": 2, "waiting": 1, "pending": 1}
    a = bench.started("w", "g")
    assert bench.counters("g") == {"total": 2, "waiting": 1, "in_progress": 1}
    assert bench.commit("w", a) == "OK"
    assert bench.counters("g") == {"total": 2, "pending": 1, "completed": 1}
    b = bench.started("w", "g")
    assert bench.commit("w", b) == "OK"
    assert bench.counters("g") == {"total": 2, "completed": 2}
    meta = bench.meta("g")
    assert (meta["status"], meta["outcome"]) == ("finished", "completed")
    assert not bench.redis.exists(bench.keys.group_part("g", "tasks"), bench.keys.group_part("g", "outbox"))


def test_a_failed_task_keeps_its_payload_and_skips_those_that_need_it(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c"], needs={"b": ["a"], "c": ["b"]})
    assert bench.commit("w", bench.started("w", "g"), "failed") == "OK"
    assert bench.counters("g") == {"total": 3, "failed": 1, "cancelled": 2}
    results = bench.redis.hgetall(bench.keys.group_part("g", "results"))
    assert results["a"].endswith('[{"type":"E","message":"m"},{}]')
    assert results["b"].startswith("cancelled|skipped|")
    assert results["c"].startswith("cancelled|skipped|")
    assert bench.meta("g")["outcome"] == "failed"


def test_closing_a_group_cancels_what_has_not_started(bench: Bench) -> None:
    goal = Goal("completed >= 1", on_achieved="drain")
    bench.queued("g", ["a", "b", "c", "d"], goal=goal)
    first, second, third = bench.fetch("w", 3)
    assert bench.claim("w", first, second, third) == ["GRANTED"] * 3
    assert bench.commit("w", first) == "OK"
    assert (bench.meta("g")["status"], bench.counters("g")) == (
        "closing",
        {"total": 4, "in_progress": 2, "completed": 1, "cancelled": 1},
    )
    assert bench.commit("w", second) == "OK"
    assert bench.commit("w", third, "retry") == "OK"
    assert bench.counters("g") == {"total": 4, "completed": 2, "cancelled": 2}
    assert bench.meta("g")["outcome"] == "completed"


def test_cancelling_removes_a_staged_group_and_stops_a_running_one(bench: Bench) -> None:
    bench.submit("staged", ["a"], last=False)
    assert bench.run(transitions.cancel_group(bench.keys, "staged")) == ["OK", "pruned"]
    assert not bench.redis.keys(f"{bench.keys.prefix}{{g:staged}}*")
    bench.queued("g")
    bench.started("w", "g")
    bench.run(transitions.cancel_group(bench.keys, "g"))
    assert (bench.meta("g")["status"], bench.meta("g")["stop"]) == ("closing", "1")


def test_closing_a_group_drops_the_pages_that_nobody_has_taken(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    first, second = bench.fetch("w", 2)
    bench.claim("w", first, second)
    bench.commit_with_pages("w", first, "retry")
    bench.run(transitions.cancel_group(bench.keys, "g"))
    assert bench.meta("g")["status"] == "closing"
    assert not bench.redis.exists(bench.keys.group_part("g", "outbox"))


def test_a_group_without_goals_that_a_user_ends_is_cancelled(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.run(transitions.cancel_group(bench.keys, "g"))
    meta = bench.meta("g")
    assert (meta["status"], meta["outcome"], meta["cancelled"]) == ("finished", "cancelled", "2")


def test_a_group_whose_goals_were_settled_is_not_cancelled_by_a_later_cancel(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], goal="completed >= 1")
    assert bench.commit("w", bench.started("w", "g")) == "OK"
    bench.run(transitions.cancel_group(bench.keys, "g"))
    assert bench.meta("g")["outcome"] == "completed"


# ---- claim -----------------------------------------------------------------------------------------------------------
def test_claim_of_an_absent_group_or_task_is_gone_and_writes_nothing(bench: Bench) -> None:
    assert bench.claim("w", Delivery("p", "2:1-0", "none", "a", "1", "2:1-0", 1)) == ["GONE"]
    assert not bench.redis.keys(f"{bench.keys.prefix}*g:none*")
    bench.queued("g")
    assert bench.claim("w", Delivery("p", "2:1-0", "g", "zz", "1", "2:1-0", 1)) == ["GONE"]


def test_claim_of_a_task_with_a_result_is_done(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    delivery = bench.started("w", "g")
    bench.commit("w", delivery)
    assert bench.claim("w", delivery) == ["DONE"]


def test_a_repeated_claim_gets_the_same_grant(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    before = bench.state("g")
    assert bench.claim("w", delivery) == ["GRANTED"]
    assert bench.state("g") == before


def test_the_same_line_with_a_larger_fence_takes_over_and_counts_a_crash(bench: Bench) -> None:
    bench.queued("g")
    old = bench.started("v", "g")
    bench.age(LEASE_MS + 1)
    new = bench.started("w", "g")
    assert (new.entry, new.lineage) == (old.entry, old.lineage)
    assert new.fence > old.fence
    assert bench.meta("g")["crashes"] == "1"
    assert bench.commit("v", old) == "STALE"
    assert bench.commit("w", new) == "OK"
    assert bench.counters("g") == {"total": 1, "completed": 1}


def test_the_same_line_with_a_smaller_fence_is_lost(bench: Bench) -> None:
    bench.queued("g")
    old = bench.started("w", "g")
    bench.age(LEASE_MS + 1)
    new = bench.started("w", "g")
    assert bench.claim("w", old) == ["LOST"]
    assert bench.commit("w", old) == "STALE"
    assert bench.commit("w", new) == "OK"


def test_one_fence_is_granted_to_one_worker_only(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    assert bench.claim("v", delivery) == ["LOST"]
    assert bench.commit("w", delivery) == "OK"


def test_a_task_that_was_to_stop_and_lost_its_worker_is_cancelled_not_run(bench: Bench) -> None:
    bench.queued("g")
    bench.started("v", "g")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.counters("g") == {"total": 1, "cancelled": 1}


def test_another_entry_of_a_running_task_is_a_duplicate(bench: Bench) -> None:
    reply = bench.submit("g")
    bench.run(transitions.enqueue(bench.keys, "p", reply.pages))
    bench.ring(reply.pages)
    first, second = bench.fetch("w", 2)
    assert first.fence != second.fence
    assert bench.claim("w", first, second) == ["GRANTED", "DUPLICATE"]


def test_an_older_issue_is_outdated(bench: Bench) -> None:
    reply = bench.submit("g")
    bench.run(transitions.enqueue(bench.keys, "p", reply.pages))
    bench.ring(reply.pages)
    first, second = bench.fetch("w", 2)
    assert bench.claim("w", first) == ["GRANTED"]
    assert bench.commit("w", first, "retry") == "OK"
    assert bench.claim("w", second) == ["OUTDATED"]


def test_a_task_with_unmet_needs_is_not_ready(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], needs={"b": ["a"]})
    forged = bench.fetch("w")[0]._replace(tid="b")
    assert bench.claim("w", forged) == ["NOTREADY"]


def test_an_entry_of_a_closed_group_is_closed(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    first, second = bench.fetch("w", 2)
    bench.claim("w", first)
    bench.run(transitions.cancel_group(bench.keys, "g"))
    assert bench.claim("w", second) == ["CLOSED"]


def test_a_task_reclaimed_in_a_closed_group_is_cancelled_not_run(bench: Bench) -> None:
    bench.queued("g")
    bench.started("v", "g")
    bench.run(transitions.cancel_group(bench.keys, "g"))
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.counters("g") == {"total": 1, "cancelled": 1}
    assert bench.meta("g")["status"] == "finished"


def test_a_task_that_started_in_time_does_not_expire_between_two_attempts(bench: Bench) -> None:
    bench.queued("g", expires_ms=3_600_000)
    assert bench.commit("w", bench.started("w", "g"), "retry") == "OK"
    key = bench.keys.group_part("g", "tasks")
    role, priority, not_before, _, rest = bench.redis.hget(key, "a").split("|", 4)
    bench.redis.hset(key, "a", "|".join((role, priority, not_before, "1", rest)))  # long over

    (delivery,) = [one for one in bench.fetch("w") if one.issue == "2"]
    assert bench.claim("w", delivery) == ["GRANTED"]


def test_an_expired_task_is_cancelled_at_its_claim(bench: Bench) -> None:
    bench.queued("g", expires_ms=3_600_000)
    bench.redis.hset(bench.keys.group_part("g", "tasks"), "a", "p|2||1||{}")  # long over
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.redis.hget(bench.keys.group_part("g", "results"), "a").startswith("cancelled|expired|")


def test_one_reply_holds_4_mib_of_payload_or_a_single_task_and_puts_off_the_rest(bench: Bench) -> None:
    facts = GroupFacts("g", 86_400_000)
    for part in (1, 2):
        task = StagedTask(str(part), task_text("p", 2, None, None, None, b'{"a":"' + b"x" * 3_000_000 + b'"}'))
        call = transitions.submit(bench.keys, "g", facts, [task], part=part, last=part == 2, digest=str(part))
        bench.run(call)
    bench.relay("g")
    first, second = bench.fetch("w")
    assert bench.claim("w", first, second) == ["GRANTED", "LATER"]
    assert bench.claim("w", second) == ["GRANTED"]


def test_a_task_that_outlives_its_crash_limit_fails_as_poison(bench: Bench) -> None:
    bench.queued("g", crash_limit=1)
    bench.started("u", "g")
    bench.age(LEASE_MS + 1)
    bench.started("v", "g")
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    reply = bench.run(transitions.claim(bench.keys, "g", "w", [delivery]))
    (answer,) = transitions.claim_reply(reply, 1).answers
    assert (answer.verdict, answer.reason) == ("DONE", "poison")
    assert answer.words.startswith("its worker was lost under it 2 times: the process died, or answered nothing for a")
    assert answer.words.endswith("see the log of worker v")
    result = bench.redis.hget(bench.keys.group_part("g", "results"), "a")
    assert result.startswith("failed|poison|")
    assert f'"message":"{answer.words}"' in result
    assert bench.claim("w", delivery) == ["DONE"]


def test_a_task_survives_as_many_crashes_as_the_docs_say(bench: Bench) -> None:
    bench.queued("g")
    crashed(bench, "g", 1 + DEFAULT_MAX_CRASHES)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.counters("g") == {"total": 1, "failed": 1}


@pytest.mark.parametrize("told_to_stop", [False, True], ids=["at work", "told to stop"])
def test_what_survives_no_crash_never_runs_again_once_its_worker_is_lost(bench: Bench, told_to_stop: bool) -> None:
    bench.queued("g", crash_limit=0)
    lost = bench.started("v", "g")
    if told_to_stop:
        assert bench.commit("v", lost, "stopping") == "OK"
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.redis.hget(bench.keys.group_part("g", "results"), "a").startswith("failed|poison|")
    assert bench.meta("g")["attempts"] == "1"
    assert bench.commit("v", lost) == "DONE"


@pytest.mark.parametrize(
    ("reason", "limit", "runs_again"),
    [("interrupted", 0, False), ("interrupted", 1, True), ("interrupted", None, True), ("-", 0, True)],
    ids=["begun", "begun, one crash", "begun, no limit", "not begun"],
)
def test_what_survives_no_crash_is_given_back_only_if_its_handler_had_not_begun(
    bench: Bench, reason: str, limit: int | None, runs_again: bool
) -> None:
    bench.queued("g", crash_limit=limit)
    delivery = bench.started("v", "g")
    assert bench.commit("v", delivery, "release", reason=reason) == "OK"
    if runs_again:
        bench.commit("w", bench.started("w", "g"))
        assert bench.counters("g") == {"total": 1, "completed": 1}
    else:
        words = "its worker was stopped while it ran, and it may lose no worker (max_crashes 0)"
        error = f'[{{"type":"","message":"{words}","traceback":""}},{{}}]'
        result = bench.redis.hget(bench.keys.group_part("g", "results"), "a")
        assert result.startswith("failed|poison|")
        assert result.endswith(error)
        assert bench.meta("g")["outcome"] == "failed"


def test_a_task_asked_to_cancel_whose_worker_is_lost_is_cancelled_not_run(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.started("v", "g")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w", 1)
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.redis.hget(bench.keys.group_part("g", "results"), "a").startswith("cancelled|cancelled|")
    assert bench.meta("g")["crashes"] == "0"


def test_payloads_beyond_a_replys_limit_are_put_off_but_one_always_goes(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    for tid in "ab":
        bench.redis.hset(bench.keys.group_part("g", "tasks"), tid, "p|2||||" + 5_000_000 * "x")
    first, second = bench.fetch("w", 2)
    assert bench.claim("w", first, second) == ["GRANTED", "LATER"]
    assert bench.counters("g") == {"total": 2, "pending": 1, "in_progress": 1}
    assert bench.claim("w", second) == ["GRANTED"]


def test_losing_a_worker_that_was_told_to_stop_is_no_crash(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("v", "g")
    assert bench.commit("v", delivery, "stopping") == "OK"
    assert bench.counters("g") == {"total": 1, "in_progress": 1}
    bench.age(LEASE_MS + 1)
    bench.started("w", "g")
    assert bench.meta("g")["crashes"] == "0"


def test_one_batch_may_name_a_task_twice(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    outcome = Committed("a", delivery.fence, "retry", "error", 0, 1, b"{}")
    reply = bench.run(transitions.commit(bench.keys, "g", "w", [outcome, outcome]))
    assert reply[2] == ["OK", "DONE"]
    assert bench.counters("g") == {"total": 1, "pending": 1}


# ---- commit ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["completed", "failed", "retry", "release", "stopped"])
def test_a_repeated_commit_is_done_and_changes_nothing(bench: Bench, kind: str) -> None:
    bench.queued("g", ["a", "b"])
    delivery = bench.started("w", "g")
    verdict, pages = bench.commit_with_pages("w", delivery, kind)
    before = bench.state("g")
    assert verdict == "OK"
    assert bench.commit_with_pages("w", delivery, kind) == ("DONE", [])
    assert bench.state("g") == before

    again = transitions.outbox(bench.keys, "g", wanted=10, hidden=True)
    assert transitions.outbox_reply("g", bench.run(again)).pages == pages  # the answer that had them may be lost
    bench.ring(pages)
    assert transitions.outbox_reply("g", bench.run(again)).pages == []


def test_an_outbox_gives_again_what_is_not_acknowledged_but_not_what_it_withholds(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    pages = [bench.commit_with_pages("w", bench.started("w", "g"), "retry")[1][0] for _ in "ab"]
    once, again = (transitions.outbox(bench.keys, "g", wanted=10, hidden=again) for again in (False, True))
    assert transitions.outbox_reply("g", bench.run(once)).pages == []
    assert transitions.outbox_reply("g", bench.run(again)).pages == pages

    bench.run(transitions.pause_group(bench.keys, "g"))
    assert transitions.outbox_reply("g", bench.run(again)).pages == []


def test_an_outcome_that_a_batch_names_twice_counts_once(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    delivery = bench.started("w", "g")
    outcome = Committed("a", delivery.fence, "completed", "", 0, 1, b"1")
    assert bench.run(transitions.commit(bench.keys, "g", "w", [outcome, outcome]))[2] == ["OK", "DONE"]
    assert bench.counters("g") == {"total": 2, "pending": 1, "completed": 1}


def test_a_commit_by_another_worker_or_fence_is_stale(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    assert bench.commit("v", delivery) == "STALE"
    assert bench.commit("w", delivery._replace(fence=delivery.fence + 1)) == "STALE"


def test_a_release_spends_no_attempt_and_a_retry_spends_one(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.commit("w", delivery, "release")
    record = bench.redis.hget(bench.keys.group_part("g", "claims"), "a").split("|")
    assert (record[0], record[1], record[7]) == ("l", "1", "1")
    (again,) = bench.fetch("w", acks=[delivery.entry])
    assert again.issue == "2"
    assert bench.claim("w", again) == ["GRANTED"]
    bench.commit("w", again, "retry")
    record = bench.redis.hget(bench.keys.group_part("g", "claims"), "a").split("|")
    assert (record[0], record[1], record[7]) == ("r", "2", "1")


def test_the_errors_of_the_last_five_attempts_are_kept_until_the_task_completes(bench: Bench) -> None:
    errors = bench.keys.group_part("g", "errors")
    bench.queued("g", ["a"])
    for attempt in range(1, 8):
        bench.commit("w", bench.started("w", "g"), "retry", message=f"error {attempt}")
        assert "error " + str(attempt) in bench.redis.hget(errors, f"a {attempt}")
        assert bench.redis.hlen(errors) == min(attempt, 5)
    bench.commit("w", bench.started("w", "g"), "release")
    assert sorted(bench.redis.hkeys(errors)) == ["a 3", "a 4", "a 5", "a 6", "a 7"]
    bench.commit("w", bench.started("w", "g"))
    assert not bench.redis.exists(errors)


def test_the_errors_of_a_task_that_failed_are_kept_as_long_as_its_group(bench: Bench) -> None:
    bench.queued("g")
    bench.commit("w", bench.started("w", "g"), "retry")
    bench.commit("w", bench.started("w", "g"), "failed")
    errors = bench.keys.group_part("g", "errors")
    assert bench.redis.hkeys(errors) == ["a 1"]
    assert bench.redis.pttl(errors) > 86_400_000
    bench.redis.hset(bench.keys.group_part("g", "meta"), "retention", 0)
    assert bench.run(transitions.prune(bench.keys, "g", staging_ms=0)) == ["OK", "pruned"]
    assert not bench.redis.exists(errors)


def test_a_retry_with_a_delay_is_delivered_once_and_not_before_it_is_due(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.commit("w", delivery, "retry", delay_ms=60_000)
    assert bench.fetch("w", acks=[delivery.entry]) == []
    delayed = bench.keys.role_part("p", "delayed")
    (member,) = bench.redis.zrange(delayed, 0, -1)
    bench.redis.zadd(delayed, {member: 1})
    (again,) = bench.fetch("w")
    assert (again.tid, again.issue) == ("a", "2")
    assert not bench.redis.exists(delayed)
    assert bench.fetch("w") == []


# ---- submit ----------------------------------------------------------------------------------------------------------
def test_a_repeated_part_writes_nothing(bench: Bench) -> None:
    assert bench.submit("g", ["a"], part=1, last=False, digest="1").word == "OK"
    before = bench.state("g")
    assert bench.submit("g", ["a"], part=1, last=False, digest="1").word == "REPEAT"
    assert bench.state("g") == before
    assert bench.submit("g", ["b"], part=2, digest="2").word == "OK"
    before = bench.state("g")
    assert bench.submit("g", ["b"], part=2, digest="2").word == "REPEAT"
    assert bench.state("g") == before
    assert bench.counters("g") == {"total": 2, "pending": 2}


def test_other_content_under_a_known_id_exists(bench: Bench) -> None:
    bench.submit("g", ["a"], digest="1")
    before = bench.state("g")
    assert bench.submit("g", ["a"], digest="2").word == "EXISTS"
    assert bench.submit("g", ["a"], part=1, last=False, digest="3").word == "EXISTS"
    assert bench.state("g") == before


def test_a_submission_that_ends_earlier_than_the_one_on_its_way_is_other_content(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    bench.submit("g", ["b"], part=2, last=False, digest="2")
    assert bench.submit("g", ["a"], part=1, digest="1").word == "EXISTS"


def test_pages_of_a_staged_group_are_withheld_until_it_is_complete(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    call = transitions.outbox(bench.keys, "g", wanted=10)
    assert transitions.outbox_reply("g", bench.run(call)).pages == []
    assert bench.submit("g", ["b"], part=2, digest="2").pages == []
    assert len(transitions.outbox_reply("g", bench.run(call)).pages) == 2


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"tasks": ["a", "b"], "goal": "completed >= 3"}, ("goal", "goal")),
        ({"tasks": ["a", "a"]}, ("duplicate", "a")),
        ({"tasks": ["a"], "needs": {"a": ["zz"]}}, ("unknown need", "zz")),
        ({"tasks": ["b"], "part": 2, "digest": "2", "goal": "completed >= 3"}, ("goal", "goal")),
        ({"tasks": ["a"], "part": 2, "digest": "2"}, ("duplicate", "a")),
    ],
)
def test_a_refused_group_leaves_nothing(bench: Bench, options: dict, refusal: tuple[str, str]) -> None:  # type: ignore[type-arg]
    if options.get("part") == 2:
        bench.submit("g", ["a"], part=1, last=False, digest="1")
    reply = bench.submit("g", **options)
    assert (reply.word, reply.detail, reply.name) == ("REFUSED", *refusal)
    assert not bench.redis.keys(f"{bench.keys.prefix}{{g:*")


def test_a_copied_or_late_client_of_a_rolling_group_loses_nothing(bench: Bench) -> None:
    assert bench.submit("g", ["1"], rolling=True, last=False, digest="1").word == "OK"
    assert bench.submit("g", ["1"], rolling=True, last=False, digest="1").word == "REPEAT"
    assert bench.submit("g", ["1"], rolling=True, last=False, digest="x").word == "GAP"
    assert bench.submit("g", ["9"], part=3, rolling=True, last=False, digest="3").word == "GAP"
    bench.run(transitions.seal(bench.keys, "g", untouched_ms=0))
    assert bench.submit("g", ["2"], part=2, rolling=True, last=False, digest="2").word == "CLOSED"
    assert bench.counters("g") == {"total": 1, "pending": 1}


def test_an_unknown_layout_is_refused_before_any_write(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("w")
    bench.redis.hset(bench.keys.group_part("g", "meta"), "v", "99")
    before = bench.state("g")
    with pytest.raises(redis.ResponseError, match="LAYOUT"):
        bench.claim("w", delivery)
    assert bench.state("g") == before


def test_only_submit_is_refused_at_the_memory_limit(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c"])
    bench.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(redis.ResponseError, match="maxmemory"):
            bench.submit("h", ["a"])
        assert not bench.redis.keys(f"{bench.keys.prefix}{{g:h}}*")
        assert bench.run(transitions.register(bench.keys, "g", "h"))[0] == "OK"
        for _ in range(3):
            assert bench.commit("w", bench.started("w", "g")) == "OK"
    finally:
        bench.redis.config_set("maxmemory", 0)
    assert bench.meta("g")["status"] == "finished"


# ---- fetch, renew, release -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("first", ["fetch", "renew"])
def test_nothing_is_reclaimed_for_a_lease_after_no_worker_was_there(bench: Bench, first: str) -> None:
    bench.queued("g")
    bench.started("v", "g")
    bench.age(LEASE_MS + 1)
    bench.redis.hset(bench.keys.role_part("p", "meta"), "last", 1)
    if first == "renew":
        assert bench.renew("w") == []
    assert bench.fetch("w") == []
    bench.redis.hset(bench.keys.role_part("p", "meta"), "pause_until", 0)
    assert len(bench.fetch("w")) == 1


def test_a_survivor_that_fetches_late_still_reclaims_what_is_overdue(bench: Bench) -> None:
    bench.queued("g")
    bench.started("dead", "g")
    bench.age(LEASE_MS + 1)
    meta = bench.keys.role_part("p", "meta")
    bench.redis.hset(meta, "last", int(bench.redis.hget(meta, "last")) - LEASE_MS)  # the last fetch was so long ago
    bench.redis.hset(meta, "pause_until", 1)
    bench.renew("survivor")
    pause_until = bench.redis.hget(meta, "pause_until")
    for _ in range(4):  # its handlers block its loop; its lease thread goes on
        bench.redis.hset(meta, "last", int(bench.redis.hget(meta, "last")) - LEASE_MS // 3)
        bench.renew("survivor")
    assert bench.redis.hget(meta, "pause_until") == pause_until
    bench.redis.hset(meta, "pause_until", 1)
    assert len(bench.fetch("survivor")) == 1


def test_a_renewal_puts_the_lease_asked_for_in_force_where_the_role_has_none(bench: Bench) -> None:
    meta = bench.keys.role_part("p", "meta")
    for asked in (LEASE_MS, 2 * LEASE_MS):
        bench.run(transitions.renew(bench.keys, "p", "w", lease_ms=asked))
        assert bench.redis.hmget(meta, "lease", "v") == [str(LEASE_MS), "1"]


@pytest.mark.parametrize("first", ["fetch", "renew"])
def test_after_a_clock_step_back_present_owners_get_a_whole_lease(bench: Bench, first: str) -> None:
    bench.queued("g")
    delivery = bench.started("v", "g")
    bench.age(LEASE_MS + 1)
    bench.redis.hset(bench.keys.role_part("p", "meta"), "last", 9_000_000_000_000)
    if first == "renew":
        bench.renew("other")
    assert bench.fetch("w") == []
    (entry,) = bench.redis.xpending_range(bench.keys.role_part("p", "normal"), "workers", "-", "+", 1)
    assert entry["consumer"] == "v"
    assert entry["time_since_delivered"] < LEASE_MS
    assert bench.renew("v", delivery.entry) == ["MINE"]


def test_a_clock_step_back_is_made_good_for_however_many_are_delivered(bench: Bench) -> None:
    for n in range(3):
        bench.queued(f"g{n}", [str(n) for n in range(400)])
    stream = bench.keys.role_part("p", "normal")
    ids = [delivery.entry[2:] for delivery in bench.fetch("v", 1200)]
    bench.redis.execute_command("XCLAIM", stream, "workers", "v", 0, *ids, "IDLE", 60_000, "JUSTID")
    bench.redis.hset(bench.keys.role_part("p", "meta"), "last", 9_000_000_000_000)
    bench.fetch("w", 0)
    entries = bench.redis.xpending_range(stream, "workers", "-", "+", 2000)
    assert len(entries) == 1200
    assert max(entry["time_since_delivered"] for entry in entries) < 60_000


def test_recovery_gives_a_worker_its_own_entries_that_it_does_not_hold(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    first, second = bench.fetch("w", 2)
    (lost,) = bench.fetch("w", 0, recover=[first.entry])
    assert (lost.entry, lost.tid) == (second.entry, second.tid)
    assert lost.fence > second.fence


def test_recovery_finds_what_was_lost_behind_any_number_of_held_ones(bench: Bench) -> None:
    for n in range(3):
        bench.queued(f"g{n}", [str(n) for n in range(400)])
    *held, lost = bench.fetch("w", 1200)
    (again,) = bench.fetch("w", 0, recover=[delivery.entry for delivery in held])
    assert again.entry == lost.entry


def test_a_dead_workers_entry_is_found_behind_any_number_of_renewed_ones(bench: Bench) -> None:
    tids = [str(n) for n in range(41)]
    bench.queued("g", tids)
    held = bench.fetch("v", 41)
    bench.age(LEASE_MS + 1)
    bench.renew("v", *(delivery.entry for delivery in held[:-1]))
    got = [delivery.tid for _ in range(10) for delivery in bench.fetch("w", 1)]
    assert got == ["40"]


def test_an_entry_deleted_while_pending_is_acknowledged_when_recovered(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("w")
    normal = bench.keys.role_part("p", "normal")
    bench.redis.xdel(normal, delivery.entry.partition(":")[2])
    assert bench.fetch("w", 0, recover=[]) == []
    assert bench.redis.xpending(normal, "workers")["pending"] == 0


def test_acknowledgements_sent_twice_count_once(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    acks = [Ack(delivery.entry, "completed", run_ms=5)]
    for _ in range(2):
        bench.run(transitions.fetch(bench.keys, "p", "w", budget=0, lease_ms=LEASE_MS, acks=acks))
    fields = ("total:completed", "run_ms", "run_times:5")
    assert bench.redis.hmget(bench.keys.role_part("p", "meta"), *fields) == ["1", "5", "1"]


def test_a_fetch_without_an_answer_is_made_good_by_the_next(bench: Bench) -> None:
    bench.queued("g", ["a"])
    turns = turns_of(bench, ["p"], slots=1)
    (fetch,) = turns.plan(1)
    bench.run(fetch.call)
    assert fetch.on_no_reply is not None
    fetch.on_no_reply()
    assert turns.is_due(1)
    (fetch,) = turns.plan(1)
    fetch.absorb(bench.run(fetch.call))
    assert [held.delivery.tid for held in turns.held.values()] == ["a"]


def test_renewing_tells_mine_from_others_and_absent_ones(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    first, second = bench.fetch("v", 2)
    bench.age(LEASE_MS + 1)
    assert bench.renew("v", first.entry) == ["MINE"]
    (taken,) = bench.fetch("w")
    assert taken.entry == second.entry
    assert bench.renew("v", first.entry, second.entry, "2:1-0") == ["MINE", "OTHER", "ABSENT"]


def test_an_unclaimed_entry_given_back_reaches_another_worker_and_keeps_its_line(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("v")
    call = transitions.release(bench.keys, "p", "v", [delivery.entry])
    assert bench.run(call)[0] == 1
    assert bench.run(call)[0] == 0
    (copy,) = bench.fetch("w")
    assert copy.entry != delivery.entry
    assert copy.lineage == delivery.entry
    assert bench.claim("v", delivery) == ["GRANTED"]  # a sleeper claims the replaced entry, and dies
    assert bench.claim("w", copy) == ["GRANTED"]  # the copy takes over


def test_a_worker_gives_back_only_what_is_its_own(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("v")
    bench.age(LEASE_MS + 1)
    (taken,) = bench.fetch("w")
    assert bench.run(transitions.release(bench.keys, "p", "v", [delivery.entry]))[0] == 0
    assert bench.renew("w", taken.entry) == ["MINE"]


def test_what_is_given_back_goes_first_even_during_the_pause(bench: Bench) -> None:
    for gid in ("low", "normal", "high"):
        bench.queued(gid, ["a", "b"], priority={"high": 1, "normal": 2, "low": 3}[gid])
    first = bench.fetch("v", 6)
    bench.queued("later", ["a", "b"], priority=1)
    bench.redis.hset(bench.keys.role_part("p", "meta"), "pause_until", 9_000_000_000_000)
    bench.run(transitions.release_all(bench.keys, "p", "v"))
    again = bench.fetch("w", 8)
    assert sorted(delivery.lineage for delivery in again[:6]) == sorted(delivery.entry for delivery in first)
    assert [delivery.gid for delivery in again[6:]] == ["later", "later"]


def test_what_was_given_back_is_recovered_and_reclaimed_as_all_else(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.fetch("v")
    bench.run(transitions.release_all(bench.keys, "p", "v"))
    first, second = bench.fetch("w")
    (lost,) = bench.fetch("w", 0, recover=[first.entry])
    assert lost.entry == second.entry
    bench.age(LEASE_MS + 1)
    assert {delivery.entry for delivery in bench.fetch("x")} == {first.entry, second.entry}


def test_what_could_not_start_for_want_of_room_waits_at_the_end_the_second_time(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], priority=3)
    (delivery,) = bench.fetch("v", 1)
    for worker, leaving, others_first in (("v", False, False), ("w", True, False), ("x", False, True)):
        bench.run(transitions.release(bench.keys, "p", worker, [delivery.entry], leaving=leaving))
        if others_first:
            assert [one.tid for one in bench.fetch("y", 1)] == ["b"]
        (copy,) = bench.fetch("x" if worker == "w" else "w", 1)
        assert (copy.tid, copy.lineage) == ("a", copy.lineage)
        delivery = copy
    assert delivery.entry.startswith("3:")
    bench.run(transitions.release(bench.keys, "p", "w", [delivery.entry], leaving=True))
    assert [one.entry[0] for one in bench.fetch("z", 1)] == ["4"]


def test_a_release_that_arrives_once_more_takes_nothing_from_its_sender(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("v")
    call = transitions.release(bench.keys, "p", "v", [delivery.entry])
    bench.run(call)
    (copy,) = bench.fetch("v")
    assert bench.claim("v", copy) == ["GRANTED"]
    assert bench.run(call)[0] == 0
    assert bench.renew("v", copy.entry) == ["MINE"]


def test_a_task_of_unknown_name_goes_to_a_worker_that_knows_it_at_once(bench: Bench) -> None:
    bench.queued("g", ["b", "a"], priority=3)
    bench.queued("h", ["c"], priority=1)
    bench.queued("other", ["d"])
    for delivery in bench.fetch("old"):
        assert bench.unknown("old", delivery, {"other": "namesake"}.get(delivery.gid, "name")) == "OK"
    bench.queued("backlog", ["x"], priority=1)
    assert bench.waiting_names("old") == ["name", "namesake"]
    assert [delivery.gid for delivery in bench.fetch("old", 1)] == ["backlog"]
    assert bench.fetch("old") == []

    (first,) = bench.fetch("new", 1, names=["name"])
    assert (first.gid, first.tid, first.issue, first.lineage[0]) == ("h", "c", "2", "1")
    assert bench.waiting_names("new") == ["name", "namesake"]
    rest = bench.fetch("new", 10, names=["name"])
    assert sorted(delivery.tid for delivery in rest) == ["a", "b"]
    assert bench.claim("new", *rest) == ["GRANTED", "GRANTED"]
    assert bench.waiting_names("new") == ["namesake"]
    assert bench.fetch("new", 10, names=["name"]) == []


def test_two_entries_of_one_task_that_wait_by_name_end_no_lease_of_each_other(bench: Bench) -> None:
    bench.queued("g")
    bench.unknown("old", bench.fetch("old")[0])
    doubled = transitions.Page("g", "9|p||2,a,3")
    bench.run(transitions.enqueue(bench.keys, "p", [doubled], names={("g", "a"): "name"}))
    first, second = bench.fetch("new", names=["name"])
    assert first.lineage != second.lineage
    assert bench.claim("new", first, second) == ["GRANTED", "DUPLICATE"]
    assert bench.meta("g")["crashes"] == "0"


def test_what_waits_by_name_goes_to_any_worker_after_an_hour_without_one(
    bench: Bench,
) -> None:
    names = bench.keys.role_part("p", "names")
    bench.queued("g", ["a", "b", "c"])
    for delivery in bench.fetch("old"):
        bench.unknown("old", delivery)
    since = bench.redis.hget(names, "name")
    bench.unknown("old", bench.fetch("old", 1, names=["name"])[0])
    bench.redis.hset(names, "name", 1)
    bench.fetch("new", 0, names=["name"])
    assert bench.redis.hget(names, "name") >= since
    assert bench.fetch("old") == []

    overdue = int(since) - 3_600_000
    bench.redis.hset(names, "name", overdue)
    assert [len(bench.fetch("old", 2)) for _ in range(3)] == [2, 1, 0]
    assert bench.redis.hget(names, "name") == str(overdue)  # for the worker that looks whether the hour is over
    bench.redis.hset(names, "name", overdue - 3_600_000)
    assert bench.fetch("old", 2) == []
    assert bench.redis.hget(names, "name") is None


def test_a_dead_workers_entries_are_given_back_in_its_name_and_its_consumer_goes(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    bench.started("v", "g")
    bench.fetch("v")
    assert bench.run(transitions.release_all(bench.keys, "p", "v")) == [2, "0", ["g"]]
    consumers = bench.redis.xinfo_consumers(bench.keys.role_part("p", "normal"), "workers")
    assert "v" not in [consumer["name"] for consumer in consumers]
    got = bench.fetch("w")
    assert bench.claim("w", *got) == ["GRANTED", "GRANTED"]
    assert bench.meta("g")["crashes"] == "1"


def test_more_than_one_call_gives_back_is_given_back_by_the_next(bench: Bench) -> None:
    for part in (1, 2):
        tids = [f"{part}-{n}" for n in range(300)]
        bench.submit("g", tids, part=part, last=part == 2, digest=str(part))
    bench.relay("g")
    bench.fetch("v", 600)
    assert bench.run(transitions.release_all(bench.keys, "p", "v")) == [500, "1", ["g"]]
    assert bench.run(transitions.release_all(bench.keys, "p", "v")) == [100, "0", ["g"]]
    assert len(bench.fetch("w", 1000)) == 600


def test_a_malformed_entry_is_put_aside_and_holds_nobody_up(bench: Bench) -> None:
    stream = bench.keys.role_part("p", "normal")
    bench.redis.xadd(stream, {"task": "no issue here"})
    bench.redis.xadd(stream, {"foreign": "x", "fields": "y"})
    for forged in (
        "g a 1 ",
        "g a 1  ",
        "g a 1 5",
        "g a 1 -:",
        "g a 1 - ",
        "g a 12:1-1",
        "g a 1 4:1-1",
        "g a 1 2:1-1 x",
        f"g a 1 2:{'9' * 5000}-1",
    ):
        bench.redis.xadd(stream, {"task": forged})
    bench.queued("g")
    (delivery,) = bench.fetch("w", 20)
    assert delivery.tid == "a"
    assert bench.redis.xlen(bench.keys.role_part("p", "quarantine")) == 11
    assert bench.redis.xlen(stream) == 1


def test_a_role_whose_streams_were_wiped_is_built_anew(bench: Bench) -> None:
    bench.queued("g")
    bench.redis.delete(*bench.keys.role("p"))
    assert bench.fetch("w") == []
    bench.queued("h")
    assert [delivery.gid for delivery in bench.fetch("w")] == ["h"]


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 100])
def test_of_every_eight_deliveries_one_is_low_and_one_normal(bench: Bench, slots: int) -> None:
    for gid, priority in (("low", 3), ("normal", 2), ("high", 1)):
        bench.queued(gid, [str(n) for n in range(400)], priority=priority)
        bench.relay(gid)
    rnd = random.Random(slots)
    delivered: list[str] = []
    while len(delivered) < 400:
        # As after turns in which some tasks, or all, have ended.
        some = bench.fetch("w", rnd.choice((slots, rnd.randint(1, slots))))
        bench.fetch("w", 0, acks=[delivery.entry for delivery in some])
        delivered += [delivery.gid for delivery in some]
    counts = collections.Counter(delivered)
    assert abs(counts["low"] - len(delivered) / 8) <= 1
    assert abs(counts["normal"] - len(delivered) / 8) <= 1


@pytest.mark.parametrize("alone", [1, 2, 3])
def test_one_priority_alone_gets_all_there_is_in_order(bench: Bench, alone: int) -> None:
    bench.queued("g", [str(n) for n in range(40)], priority=alone)
    assert [delivery.tid for n in (1, 3, 16, 20) for delivery in bench.fetch("w", n)] == [str(n) for n in range(40)]


def test_the_share_of_a_priority_that_has_nothing_goes_to_the_others(bench: Bench) -> None:
    bench.queued("low", [str(n) for n in range(20)], priority=3)
    bench.queued("high", [str(n) for n in range(20)], priority=1)
    assert collections.Counter(delivery.gid for delivery in bench.fetch("w", 32)) == {"high": 20, "low": 12}


def test_one_bell_token_per_entry_up_to_a_bound_and_none_when_all_is_read(bench: Bench) -> None:
    bell = bench.keys.role_part("p", "bell")
    bench.queued("g", [str(n) for n in range(100)])
    assert bench.redis.llen(bell) == 64
    bench.fetch("w", 10)
    assert bench.redis.llen(bell) == 64
    bench.fetch("w", 200)
    assert bench.redis.llen(bell) == 0


def test_the_lease_is_the_roles_while_somebody_is_there(bench: Bench) -> None:
    def lease_of(asked: int) -> int:
        call = transitions.fetch(bench.keys, "p", "w", budget=0, lease_ms=asked)
        return transitions.fetch_reply("p", bench.run(call)).lease_ms

    assert lease_of(400) == 400
    assert lease_of(900) == 400
    bench.redis.hset(bench.keys.role_part("p", "meta"), "last", 1)
    assert lease_of(900) == 900


def test_a_worker_that_gets_a_lost_entry_again_holds_it_when_the_old_handler_ends(bench: Bench) -> None:
    bench.queued("g")
    turns = turns_of(bench, ["p"], slots=1)

    def turn() -> None:
        for step in turns.plan(1):
            step.absorb(bench.run(step.call))

    turn()
    (lost,) = turns.held.values()
    bench.age(LEASE_MS + 1)
    bench.fetch("v")
    turns.forget(lost)  # the lease thread has seen it
    bench.age(LEASE_MS + 1)
    turn()
    (again,) = turns.held.values()
    turns.forget(lost)  # its handler has ended
    assert (list(turns.held.values()), again.delivery.entry) == ([again], lost.delivery.entry)


def test_a_worker_renews_in_time_for_the_shortest_lease_of_its_roles(bench: Bench) -> None:
    for role, lease_ms in (("short", 10_000), ("long", 60_000)):
        bench.run(transitions.fetch(bench.keys, role, "v", budget=0, lease_ms=lease_ms))
    turns = turns_of(bench, ["short", "long"], slots=1, lease_ms=30_000)
    for _ in range(2):
        for step in turns.plan(1):
            step.absorb(bench.run(step.call))
    assert (turns.lease_ms, turns.leases.lease_s) == (10_000, 10)
    kept = [bench.redis.hget(bench.keys.role_part(role, "meta"), "lease") for role in ("short", "long")]
    assert kept == ["10000", "60000"]


# ---- goals -----------------------------------------------------------------------------------------------------------
def test_a_goal_is_achieved_at_the_fifth_completion_and_settles_once(bench: Bench) -> None:
    bench.queued("g", [str(n) for n in range(10)], goal="completed >= 5")
    for number in range(1, 11):
        bench.commit("w", bench.started("w", "g"))
        assert ("goal:goal" in bench.meta("g")) == (number >= 5)
    status, _, seq, by, counts = bench.meta("g")["goal:goal"].split("|")
    assert (status, by, counts.split(",")[4]) == ("achieved", "commit", "5")
    events = bench.redis.lrange(bench.keys.group_part("g", "events"), 0, -1)
    assert [i for i, event in enumerate(events, 1) if "goal:achieved" in event] == [int(seq)]


def test_a_goal_fails_as_soon_as_it_can_no_longer_hold(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c"], goal="completed >= 3")
    bench.commit("w", bench.started("w", "g"), "failed")
    assert bench.meta("g")["goal:goal"].startswith("failed|")
    assert bench.meta("g")["status"] == "active"


def test_fail_when_and_policies_close_the_group(bench: Bench) -> None:
    goal = Goal("completed >= 3", fail_when="failed >= 1", on_failed="cancel")
    bench.queued("g", ["a", "b", "c", "d"], goal=goal)
    bench.commit("w", bench.started("w", "g"), "failed")
    meta = bench.meta("g")
    assert (meta["status"], meta["stop"], meta["cancelled"], meta["outcome"]) == ("finished", "1", "3", "failed")


def test_a_deadline_that_passed_is_judged_first(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], goal=Goal("completed >= 1", deadline=3600))
    delivery = bench.started("w", "g")
    meta = bench.keys.group_part("g", "meta")
    fields = bench.redis.hget(meta, "goals").split("|")
    bench.redis.hset(meta, "goals", "|".join([*fields[:3], "1", *fields[4:]]))
    bench.commit("w", delivery)
    assert bench.meta("g")["goal:goal"].split("|")[:4:3] == ["failed", "deadline"]


def test_a_goal_is_foreseen_as_the_submission_judges_it_and_nothing_is_written(bench: Bench) -> None:
    facts = transitions.GroupFacts(name="x", retention_ms=1000, goals=compile_goals(["failed < 1", "completed >= 3"]))

    assert bench.run(transitions.foresee(bench.keys, "g", facts, 3)) == ["OK"]
    assert bench.run(transitions.foresee(bench.keys, "g", facts, 2)) == ["REFUSED", "goal2"]
    assert bench.meta("g") == {}


def test_a_callable_goal_keeps_the_group_closing_until_it_is_judged_once(bench: Bench) -> None:
    bench.queued("g", goal=Goal(call="enough"))
    bench.commit("w", bench.started("w", "g"))
    assert bench.meta("g")["status"] == "closing"
    assert int(bench.meta("g")["goals"].split("|")[3]) > int(bench.meta("g")["created"])  # it waits, but not for ever
    judge = transitions.judge(bench.keys, "g", goal="goal", verdict="achieved")
    assert bench.run(judge)[:2] == ["OK", "finished"]
    before = bench.state("g")
    assert bench.run(judge)[0] == "NO"
    assert bench.run(transitions.judge(bench.keys, "g", goal="goal", verdict="failed"))[0] == "NO"
    assert bench.state("g") == before
    assert bench.meta("g")["outcome"] == "completed"


def test_a_finished_group_leaves_no_page_even_if_its_acknowledgement_was_lost(bench: Bench) -> None:
    reply = bench.submit("g")
    bench.run(transitions.enqueue(bench.keys, "p", reply.pages))
    bench.commit("w", bench.started("w", "g"))
    assert bench.meta("g")["status"] == "finished"
    assert not bench.redis.exists(bench.keys.group_part("g", "outbox"))


# ---- pause -----------------------------------------------------------------------------------------------------------
def test_a_paused_group_starts_nothing_finishes_what_runs_and_goes_on_where_it_was(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c"])
    a = bench.started("w", "g")
    assert bench.run(transitions.pause_group(bench.keys, "g")) == ["OK", "paused"]
    (b,) = bench.fetch("w", 1)
    assert bench.claim("w", b) == ["PARKED"]
    assert bench.commit("w", a) == "OK"
    bench.fetch("w", 0, acks=[a.entry, b.entry])
    bench.relay("g")
    assert bench.counters("g") == {"total": 3, "pending": 2, "completed": 1}
    assert bench.run(transitions.resume_group(bench.keys, "g")) == ["OK", "active"]
    bench.relay("g")
    for _ in range(2):
        bench.commit("w", bench.started("w", "g"))
    assert (bench.meta("g")["status"], bench.meta("g")["completed"]) == ("finished", "3")


def test_what_a_dead_worker_ran_in_a_paused_group_waits_for_it_to_go_on(bench: Bench) -> None:
    bench.queued("g")
    bench.started("v", "g")
    bench.run(transitions.pause_group(bench.keys, "g"))
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["PARKED"]
    assert (bench.counters("g"), bench.meta("g")["crashes"]) == ({"total": 1, "pending": 1}, "1")
    bench.run(transitions.resume_group(bench.keys, "g"))
    bench.relay("g")
    bench.commit("w", bench.started("w", "g"))
    assert bench.meta("g")["status"] == "finished"


def test_a_late_acknowledgement_of_what_was_parked_removes_no_other_entry(bench: Bench) -> None:
    bench.queued("g")
    (first,) = bench.fetch("sleeper")
    bench.run(transitions.pause_group(bench.keys, "g"))
    assert bench.claim("sleeper", first) == ["PARKED"]
    bench.run(transitions.resume_group(bench.keys, "g"))
    bench.age(LEASE_MS + 1)
    (reclaimed,) = bench.fetch("w")
    assert (reclaimed.entry, bench.claim("w", reclaimed)) == (first.entry, ["OUTDATED"])
    bench.fetch("sleeper", 0, acks=[first.entry])
    bench.relay("g")
    bench.commit("w", bench.started("w", "g"))
    assert bench.meta("g")["status"] == "finished"


def test_a_task_that_was_parked_and_then_cancelled_never_started(bench: Bench) -> None:
    bench.queued("g")
    (delivery,) = bench.fetch("w")
    bench.run(transitions.pause_group(bench.keys, "g"))
    assert bench.claim("w", delivery) == ["PARKED"]
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    record = bench.redis.hget(bench.keys.group_part("g", "results"), "a").split("|")
    assert record[:7] == ["cancelled", "cancelled", "p", "0", "0", "", ""]


def test_a_paused_group_whose_last_task_ends_finishes(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.run(transitions.pause_group(bench.keys, "g"))
    bench.commit("w", delivery)
    assert bench.meta("g")["status"] == "finished"


def test_a_poison_fails_and_a_suspect_waits_in_a_paused_group_too(bench: Bench) -> None:
    bench.queued("poison", crash_limit=0)
    bench.started("v", "poison")
    bench.run(transitions.pause_group(bench.keys, "poison"))
    bench.age(LEASE_MS + 1)
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery) == ["DONE"]
    assert bench.meta("poison")["status"] == "finished"
    bench.fetch("w", 0, acks=[delivery.entry])

    bench.queued("suspect")
    crashed(bench, "suspect", 2)
    bench.run(transitions.pause_group(bench.keys, "suspect"))
    (delivery,) = bench.fetch("w")
    assert bench.claim("w", delivery, suspect=False) == ["PARKED"]


def test_what_was_withheld_while_a_group_was_paused_is_any_relays_once_it_goes_on(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.run(transitions.pause_group(bench.keys, "g"))
    _, pages = bench.commit_with_pages("w", delivery, "retry")
    assert pages == []
    bench.run(transitions.resume_group(bench.keys, "g"))
    bench.relay("g")
    assert [again.issue for again in bench.fetch("w", acks=[delivery.entry])] == ["2"]


def test_a_paused_role_delivers_nothing_and_takes_acknowledgements(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    a = bench.started("w", "g")
    for call in transitions.pause_role(bench.keys, "p"):
        bench.run(call)
    bench.commit("w", a)
    assert bench.fetch("w", acks=[a.entry]) == []
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 1
    for call in transitions.resume_role(bench.keys, "p"):
        bench.run(call)
    assert [delivery.tid for delivery in bench.fetch("w")] == ["b"]


# ---- groups on groups ------------------------------------------------------------------------------------------------
def depend(bench: Bench, gid: str, *others: str) -> None:
    for other in others:
        bench.run(transitions.register(bench.keys, other, gid))


def test_a_group_and_its_deadlines_start_when_all_it_depends_on_completed(bench: Bench) -> None:
    bench.queued("first")
    bench.queued("second")
    bench.queued("g", depends_on=["first", "second"], goal=Goal("completed >= 1", deadline=60))
    depend(bench, "g", "first", "second")
    bench.relay("g")
    assert bench.meta("g")["status"] == "waiting"
    assert bench.meta("g")["goals"].split("|")[3] == "60000"
    bench.commit("w", bench.started("w", "first"))
    assert bench.meta("g")["status"] == "waiting"
    bench.commit("w", bench.started("w", "second"))
    assert bench.meta("g")["status"] == "active"
    assert int(bench.meta("g")["goals"].split("|")[3]) > 1_000_000_000_000
    bench.relay("g")
    bench.commit("w", bench.started("w", "g"))
    assert bench.meta("g")["outcome"] == "completed"
    assert not bench.redis.exists(bench.keys.group_part("first", "outbox"))


def waited(bench: Bench, ms: int, **options: Any) -> None:
    """Let a group wait so long for another, and start."""
    bench.queued("first")
    bench.queued("g", depends_on=["first"], **options)
    depend(bench, "g", "first")
    # The clock is the server's, so the submission is moved back instead, with all that was counted from it.
    meta, tasks = bench.keys.group_part("g", "meta"), bench.keys.group_part("g", "tasks")
    bench.redis.hincrby(meta, "touched", -ms)
    for tid, text in bench.redis.hgetall(tasks).items():
        role, priority, not_before, expiry, rest = text.split("|", 4)
        times = [str(int(at) - ms) if at else "" for at in (not_before, expiry)]
        bench.redis.hset(tasks, tid, "|".join([role, priority, *times, rest]))
    outbox = bench.keys.group_part("g", "outbox")
    for page, score in bench.redis.zrange(outbox, 0, -1, withscores=True):
        number, role, due, items = page.split("|")
        bench.redis.zrem(outbox, page)
        bench.redis.zadd(outbox, {f"{number}|{role}|{int(due) - ms if due else ''}|{items}": score})
    bench.commit("w", bench.started("w", "first"))
    assert bench.meta("g")["status"] == "active"
    assert ms <= int(bench.meta("g")["waited"]) < ms + 60_000
    bench.relay("g")


def due_in_ms(bench: Bench) -> int:
    ((_, at),) = bench.redis.zrange(bench.keys.role_part("p", "delayed"), 0, -1, withscores=True)
    seconds, micros = bench.redis.time()
    return int(at - seconds * 1000 - micros // 1000)


def test_what_expires_in_a_group_that_waited_does_so_counted_from_its_start(bench: Bench) -> None:
    waited(bench, 3_600_000, tasks=["a", "b"], expires_ms=60_000)
    a, b = bench.fetch("w")
    assert bench.claim("w", a) == ["GRANTED"]
    bench.redis.hincrby(bench.keys.group_part("g", "meta"), "waited", -60_001)
    assert bench.claim("w", b) == ["DONE"]
    assert bench.redis.hget(bench.keys.group_part("g", "results"), "b").startswith("cancelled|expired|")


def test_what_is_delayed_in_a_group_that_waited_is_due_counted_from_its_start(bench: Bench) -> None:
    waited(bench, 3_600_000, delay_ms=60_000)
    (early,) = bench.fetch("w")
    assert bench.claim("w", early) == ["PARKED"]
    assert bench.claim("w", early) == ["OUTDATED"]
    bench.fetch("w", 0, acks=[early.entry])
    bench.relay("g")
    assert 50_000 < due_in_ms(bench) <= 60_000
    bench.redis.delete(bench.keys.role_part("p", "delayed"))
    bench.run(transitions.scan(bench.keys, "g", "p", int(bench.meta("g")["pages"]), "0", ["CLEAR"]))
    bench.relay("g")
    assert 50_000 < due_in_ms(bench) <= 60_000
    delayed = bench.keys.role_part("p", "delayed")
    bench.redis.zadd(delayed, {bench.redis.zrange(delayed, 0, 0)[0]: 0})
    bench.redis.hincrby(bench.keys.group_part("g", "meta"), "waited", -60_001)
    assert bench.commit("w", bench.started("w", "g")) == "OK"
    assert bench.meta("g")["attempts"] == "1"


def test_a_released_dependent_of_a_group_that_waited_is_due_counted_from_its_start(bench: Bench) -> None:
    waited(bench, 3_600_000, tasks=["a", "b"], needs={"b": ["a"]}, delay_ms=60_000, on_need_failed="continue")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    (early,) = bench.fetch("w")
    assert bench.claim("w", early) == ["DONE"]
    bench.relay("g")
    assert 50_000 < due_in_ms(bench) <= 60_000


def test_what_a_group_that_waited_lost_is_due_from_its_start(bench: Bench) -> None:
    waited(bench, 3_600_000, delay_ms=60_000)
    (early,) = bench.fetch("w")
    bench.fetch("w", 0, acks=[early.entry])
    bench.run(transitions.scan(bench.keys, "g", "p", int(bench.meta("g")["pages"]), "0", ["CLEAR"]))
    bench.relay("g")
    assert 50_000 < due_in_ms(bench) <= 60_000


def test_a_group_is_cancelled_when_one_it_depends_on_did_not_complete(bench: Bench) -> None:
    bench.queued("first")
    bench.queued("g", ["a", "b"], depends_on=["first"], goal=Goal("completed >= 1", deadline=60))
    bench.queued("h", depends_on=["g"])
    depend(bench, "g", "first")
    depend(bench, "h", "g")
    bench.commit("w", bench.started("w", "first"), "failed")
    meta = bench.meta("g")
    assert (meta["status"], meta["outcome"], meta["cancelled"]) == ("finished", "cancelled", "2")
    assert meta["reason"] == "group first it depends on is failed"
    assert meta["goal:goal"].split("|")[3] == "depend"
    bench.relay("g")
    assert bench.meta("h")["outcome"] == "cancelled"


def test_a_verdict_that_ends_a_waiting_group_settles_its_other_goals(bench: Bench) -> None:
    bench.queued("first")
    enough = Goal(name="enough", call="enough", on_achieved="cancel")
    bench.queued("g", depends_on=["first"], goal=[enough, Goal("cancelled >= 1", name="none", deadline=60)])
    bench.run(transitions.judge(bench.keys, "g", goal="enough", verdict="achieved"))
    assert bench.meta("g")["goal:none"].split("|")[:4:3] == ["achieved", "judge"]


def test_a_message_that_comes_twice_or_from_another_group_changes_nothing(bench: Bench) -> None:
    bench.queued("first")
    bench.queued("g", depends_on=["first"])
    assert bench.run(transitions.met(bench.keys, "g", "stranger", "completed")) == ["NO", "waiting"]
    bench.run(transitions.met(bench.keys, "g", "first", "completed"))
    before = bench.state("g")
    assert bench.run(transitions.met(bench.keys, "g", "first", "failed")) == ["NO", "active"]
    assert bench.state("g") == before


def test_registering_twice_tells_once_and_with_a_finished_group_at_once(bench: Bench) -> None:
    bench.queued("first")
    assert bench.run(transitions.register(bench.keys, "first", "g")) == ["OK", "active", ""]
    before = bench.state("first")
    bench.run(transitions.register(bench.keys, "first", "g"))
    assert bench.state("first") == before
    bench.commit("w", bench.started("w", "first"))
    assert bench.run(transitions.register(bench.keys, "first", "h")) == ["OK", "finished", "completed"]
    assert bench.run(transitions.register(bench.keys, "nobody", "h")) == ["GONE"]


def test_a_finished_group_is_not_removed_before_those_that_depend_on_it_were_told(bench: Bench) -> None:
    bench.queued("first")
    bench.queued("g", depends_on=["first"])
    depend(bench, "g", "first")
    _, pages = bench.commit_with_pages("w", bench.started("w", "first"))
    bench.redis.hset(bench.keys.group_part("first", "meta"), "retention", 0)
    prune = transitions.prune(bench.keys, "first", staging_ms=1000)
    assert bench.run(prune)[0] == "NO"
    bench.ring(pages)
    assert bench.meta("g")["status"] == "active"
    assert bench.run(prune) == ["OK", "pruned"]


# ---- tasks whose needs were not met ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("policy", "counters"),
    [
        ("skip", {"total": 3, "failed": 1, "cancelled": 2}),
        ("fail", {"total": 3, "failed": 3}),
        ("continue", {"total": 3, "pending": 1, "waiting": 1, "failed": 1}),
    ],
)
def test_what_needs_a_task_that_did_not_complete_ends_as_the_group_wants_it(
    bench: Bench, policy: str, counters: dict[str, int]
) -> None:
    bench.queued("g", ["a", "b", "c"], needs={"b": ["a"], "c": ["b"]}, on_need_failed=policy)
    bench.commit("w", bench.started("w", "g"), "failed")
    assert bench.counters("g") == counters


# ---- suspects --------------------------------------------------------------------------------------------------------
def crashed(bench: Bench, gid: str, times: int) -> None:
    """Let the workers of all tasks of a group die so often."""
    for round_ in range(times):
        deliveries = bench.fetch(f"dead{round_}", 10)
        assert [bench.claim(f"dead{round_}", delivery) for delivery in deliveries] == [["GRANTED"]] * len(deliveries)
        bench.age(LEASE_MS + 1)


def test_suspects_start_one_at_a_time_and_what_is_put_off_is_not_written(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    crashed(bench, "g", 2)
    first, second = bench.fetch("w", 10)
    before = bench.state("g")
    assert bench.claim("w", first, suspect=False) == ["LATER"]
    assert bench.state("g") == before
    assert bench.claim("w", first, second) == ["GRANTED", "LATER"]
    before = bench.state("g")
    assert bench.claim("w", first, second) == ["GRANTED", "LATER"]  # the reply was lost
    assert bench.state("g") == before
    assert bench.commit("w", first) == "OK"
    assert bench.claim("w", second) == ["GRANTED"]


def test_a_suspect_that_was_given_back_is_put_off_too(bench: Bench) -> None:
    bench.queued("g")
    crashed(bench, "g", 2)
    delivery = bench.started("w", "g")
    bench.commit("w", delivery, "release")
    (again,) = bench.fetch("w", acks=[delivery.entry])
    assert bench.claim("w", again, suspect=False) == ["LATER"]
    assert bench.claim("w", again) == ["GRANTED"]


# ---- reissue ---------------------------------------------------------------------------------------------------------
def test_an_entry_that_supersedes_the_fence_on_record_ends_that_lease_and_no_other(bench: Bench) -> None:
    bench.queued("g")
    lost = bench.started("v", "g")
    assert bench.run(transitions.orphans(bench.keys, "g", [("a", str(lost.fence + 1))]))[2] == "0"
    assert bench.run(transitions.orphans(bench.keys, "g", [("a", str(lost.fence))]))[2] == "1"
    bench.relay("g")
    (again,) = bench.fetch("w")
    assert again.supersedes == str(lost.fence)
    assert bench.claim("w", again._replace(supersedes="1")) == ["DUPLICATE"]
    assert bench.claim("w", again) == ["GRANTED"]
    assert bench.commit("v", lost) == "STALE"
    assert bench.commit("w", again) == "OK"
    assert bench.meta("g")["crashes"] == "1"


def test_a_superseding_entry_that_is_given_back_still_supersedes(bench: Bench) -> None:
    bench.queued("g")
    lost = bench.started("v", "g")
    bench.run(transitions.orphans(bench.keys, "g", [("a", str(lost.fence))]))
    bench.relay("g")
    (unclaimed,) = bench.fetch("u")
    bench.run(transitions.release(bench.keys, "p", "u", [unclaimed.entry]))
    (copy,) = bench.fetch("w")
    assert (copy.lineage, copy.supersedes) == (unclaimed.entry, str(lost.fence))
    assert bench.claim("w", copy) == ["GRANTED"]


def test_a_scan_rings_what_the_role_does_not_show_and_lists_what_runs(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c", "d"], needs={"d": ["a"]})
    running = bench.started("w", "g")
    look = transitions.read_state_reply(bench.run(transitions.read_state(bench.keys, "g")))
    assert look is not None
    assert (look.status, look.in_outbox, look.open, list(look.horizons)) == ("active", 0, 3, ["p"])
    shown = bench.probe("g", look.horizons["p"])
    assert shown == ["CLEAR", "a", "b", "c"]
    reply = bench.run(transitions.scan(bench.keys, "g", "p", look.last_page, "0", ["CLEAR", "b"]))
    assert reply == ["OK", "active", "0", ["a", str(running.fence), "w"], "1"]
    assert bench.run(transitions.scan(bench.keys, "g", "p", look.last_page, "0", ["CLEAR", "b"]))[0] == "MOVED"


@pytest.mark.parametrize("delivered", [True, False])
def test_a_scan_is_refused_if_a_page_was_written_since_the_look(bench: Bench, delivered: bool) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    look = transitions.read_state_reply(bench.run(transitions.read_state(bench.keys, "g")))
    assert look is not None
    _, pages = bench.commit_with_pages("w", delivery, "retry")
    if delivered:
        bench.ring(pages)
    pages_then = look.last_page if delivered else look.last_page + 1
    assert bench.run(transitions.scan(bench.keys, "g", "p", pages_then, "0", ["CLEAR"]))[0] == "MOVED"


def test_a_probe_says_busy_while_more_waits_up_to_the_horizon_than_it_looks_at(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.queued("g", [str(n) for n in range(150)])
    monkeypatch.setattr(transitions, "PROBE_ENTRIES", 100)
    horizon = transitions.read_state_reply(bench.run(transitions.read_state(bench.keys, "g"))).horizons["p"]  # type: ignore[union-attr]
    assert bench.probe("g", horizon)[0] == "BUSY"
    assert bench.probe("g", "0")[0] == "CLEAR"


def test_a_probe_looks_at_all_that_is_delivered_and_all_that_waits_by_name(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tids = [str(n) for n in range(30)]
    bench.queued("g", tids)
    bench.queued("other", tids)
    bench.fetch("w", 60)
    for delivery in bench.fetch("w", 0, recover=[])[:20]:
        assert bench.unknown("w", delivery) == "OK"
    horizon = bench.meta("g")["horizon:p"]
    monkeypatch.setattr(transitions, "PROBE_ENTRIES", 7)
    assert bench.probe("g", horizon)[0] == "MORE"
    word, *shown = bench.probe("g", horizon, to_the_end=True)
    assert word == "CLEAR"
    assert sorted(shown, key=int) == tids
    bench.redis.xdel(bench.keys.role_part("p", "normal"), bench.redis.xrange(bench.keys.role_part("p", "normal"))[0][0])
    assert len(bench.probe("g", horizon, to_the_end=True)) == 30


def test_a_probe_counts_what_is_delayed_and_no_horizon_moves_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transitions, "PROBE_ENTRIES", 100)
    reply = bench.submit("g", [str(n) for n in range(150)], delay_ms=60_000)
    bench.ring(reply.pages)
    horizon = bench.meta("g")["horizon:p"]
    assert bench.probe("g", horizon)[0] == "DUE"
    delayed = bench.keys.role_part("p", "delayed")
    bench.redis.zadd(delayed, dict.fromkeys(bench.redis.zrange(delayed, 0, -1), 1))
    assert bench.probe("g", horizon)[0] == "BUSY"
    bench.run(transitions.outbox(bench.keys, "g", acks=[PageAck(reply.pages[0], "1")]))
    assert bench.meta("g")["horizon:p"] == horizon


# ---- caps and lifetimes ----------------------------------------------------------------------------------------------
def test_a_worker_with_ten_thousand_slots_claims_and_acknowledges_as_many(bench: Bench) -> None:
    for part in range(1, 21):
        tids = [f"{part}-{number}" for number in range(500)]
        bench.submit("g", tids, part=part, last=part == 20, digest=str(part))
    bench.relay("g")
    turns = turns_of(bench, ["p"], slots=10_000)
    for _ in range(2):
        for step in turns.plan(10_000 - len(turns.granted)):
            step.absorb(bench.run(step.call))
    assert bench.counters("g") == {"total": 10_000, "in_progress": 10_000}
    for granted in turns.granted:
        delivery = granted.held.delivery
        turns.finish(granted.held, Committed(delivery.tid, delivery.fence, "completed", "", 0, 0, b"null"))
    for _ in range(2):
        for step in turns.plan(0):
            step.absorb(bench.run(step.call))
    assert bench.counters("g") == {"total": 10_000, "completed": 10_000}
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 0


def test_more_dependents_than_one_call_looks_at_are_released_by_the_next(bench: Bench) -> None:
    children = [f"c{n}" for n in range(2500)]
    bench.submit("g", ["root"], part=1, last=False, digest="0")
    for part, first in enumerate(range(0, 2500, 500), 2):
        some = children[first : first + 500]
        bench.submit("g", some, needs={c: ["root"] for c in some}, part=part, last=first == 2000, digest=str(part))
    call = transitions.outbox(bench.keys, "g", wanted=50)
    bench.ring(transitions.outbox_reply("g", bench.run(call)).pages)
    root = bench.started("w", "g")
    outcome = Committed("root", root.fence, "completed", "", 0, 1, b"null")
    answer = transitions.commit_reply("g", bench.run(transitions.commit(bench.keys, "g", "w", [outcome])), 1)
    assert answer.more
    assert int(bench.meta("g")["pending"]) == 1000
    bench.ring(answer.pages)
    while (reply := transitions.outbox_reply("g", bench.run(call))).more or reply.pages:
        bench.ring(reply.pages)
    assert bench.counters("g") == {"total": 2501, "pending": 2500, "completed": 1}
    assert bench.redis.xlen(bench.keys.role_part("p", "normal")) == 2501  # the root's entry is not acknowledged yet


def test_a_group_is_removed_at_once_only_after_it_has_finished_and_told_others(bench: Bench) -> None:
    bench.queued("g")
    bench.run(transitions.register(bench.keys, "g", "other"))
    removal = transitions.prune(bench.keys, "g", staging_ms=0, at_once=True)
    assert bench.run(removal) == ["NO", "active", "0"]

    _, pages = bench.commit_with_pages("w", bench.started("w", "g"))
    assert bench.run(removal)[:2] == ["NO", "finished"]  # its message is on its way
    bench.run(transitions.outbox(bench.keys, "g", acks=[PageAck(page) for page in pages]))

    assert bench.run(removal)[0] == "OK"
    assert not bench.redis.exists(*bench.keys.group("g"))


def test_a_finished_group_has_a_ttl_on_every_key_and_is_pruned_after_its_retention(bench: Bench) -> None:
    bench.queued("g", ["a", "b"], needs={"b": ["a"]})
    for _ in range(2):
        bench.commit("w", bench.started("w", "g"))
    keys = bench.redis.keys(f"{bench.keys.prefix}{{g:*")
    assert keys
    assert all(bench.redis.ttl(key) > 0 for key in keys)
    prune = transitions.prune(bench.keys, "g", staging_ms=1000)
    assert bench.run(prune)[0] == "NO"
    bench.redis.hset(bench.keys.group_part("g", "meta"), "retention", 0)
    assert bench.run(prune) == ["OK", "pruned"]
    assert bench.run(prune) == ["GONE"]


@pytest.mark.parametrize("action", ["cancel_group", "cancel_tasks", "seal", "judge", "outbox", "pause", "resume"])
def test_control_calls_made_twice_change_nothing_the_second_time(bench: Bench, action: str) -> None:
    bench.queued("g", ["a", "b", "c"], goal="completed >= 1", rolling=False)
    bench.started("w", "g")
    keys = bench.keys
    call = {
        "cancel_group": transitions.cancel_group(keys, "g"),
        "cancel_tasks": transitions.cancel_tasks(keys, "g", ["a", "b"]),
        "seal": transitions.seal(keys, "g", untouched_ms=0),
        "judge": transitions.judge(keys, "g"),
        "outbox": transitions.outbox(keys, "g"),
        "pause": transitions.pause_group(keys, "g"),
        "resume": transitions.resume_group(keys, "g"),
    }[action]
    bench.run(call)
    before = bench.state("g")
    bench.run(call)
    assert bench.state("g") == before


def test_a_cancelled_task_that_runs_may_still_complete_but_is_not_retried(bench: Bench) -> None:
    bench.queued("g", ["a", "b"])
    first, second = bench.fetch("w", 2)
    bench.claim("w", first, second)
    assert bench.run(transitions.cancel_tasks(bench.keys, "g", ["a", "b"]))[2:] == ["stopping", "stopping"]
    assert bench.commit("w", first, "completed") == "OK"
    assert bench.commit("w", second, "retry") == "OK"
    assert bench.counters("g") == {"total": 2, "completed": 1, "cancelled": 1}


def test_a_task_of_a_group_that_is_not_complete_cannot_be_cancelled(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    assert bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"])) == ["OK", "staging", "unknown"]


def test_a_task_asked_to_stop_is_not_run_again_though_its_worker_is_stopping_too(bench: Bench) -> None:
    bench.queued("g")
    delivery = bench.started("w", "g")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["a"]))
    assert bench.commit("w", delivery, "stopping") == "OK"
    assert bench.commit("w", delivery, "release") == "OK"
    assert bench.counters("g") == {"total": 1, "cancelled": 1}


def test_a_waiting_task_that_is_cancelled_leaves_nothing_but_its_result(bench: Bench) -> None:
    bench.queued("g", ["a", "b", "c"], needs={"b": ["a"], "c": ["b"]}, on_need_failed="continue")
    bench.run(transitions.cancel_tasks(bench.keys, "g", ["b"]))
    assert bench.counters("g") == {"total": 3, "pending": 2, "cancelled": 1}
    assert not bench.redis.exists(bench.keys.group_part("g", "needs"))
    bench.relay("g")
    assert bench.commit("w", bench.started("w", "g")) == "OK"
    assert bench.counters("g") == {"total": 3, "pending": 1, "completed": 1, "cancelled": 1}


def test_a_task_that_is_released_before_its_time_waits_for_it(bench: Bench) -> None:
    bench.submit("g", ["a"], part=1, last=False, digest="1")
    bench.submit("g", ["b"], part=2, digest="2", needs={"b": ["a"]}, delay_ms=60_000, on_need_failed="continue")
    bench.relay("g")
    assert bench.commit("w", bench.started("w", "g")) == "OK"
    assert bench.fetch("w") == []
    assert bench.redis.zcard(bench.keys.role_part("p", "delayed")) == 1


def test_a_full_worker_wakes_another_for_what_is_left(bench: Bench) -> None:
    bell, delayed = bench.keys.role_part("p", "bell"), bench.keys.role_part("p", "delayed")
    bench.queued("g", ["a", "b"])
    bench.redis.delete(bell)
    assert len(bench.fetch("w", 1)) == 1
    assert bench.redis.llen(bell) == 1
    bench.redis.delete(bell)
    bench.redis.zadd(delayed, {"2 g a 1": 1, "2 g b 1": 1})
    bench.fetch("w", 0)
    assert bench.redis.llen(bell) == 2
