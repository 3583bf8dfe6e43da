"""The one evaluator, in Lua, against the brute-force oracle and, for single comparisons, equal to it."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from goal_oracle import check_exact, check_sound, comparisons, expressions, small_counters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rq_ceylon.store import scripts
from rq_ceylon.views import COUNTERS, Counters

pytestmark = pytest.mark.every_engine
CHECKED = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class LuaVerdict:
    """Runs the evaluator of the shipped scripts on counters given as arguments."""

    def __init__(self, url: str, *, closing: bool) -> None:
        client: Any = redis.Redis.from_url(url, protocol=2)
        shared = scripts.source("group_goals")
        body = """
for i, name in ipairs(NUMBERS) do group[name] = tonumber(ARGV[i + 1]) or 0 end
group.status, group.open = ARGV[#ARGV], '0'
local result = evaluate(ARGV[1])
return result == nil and 'open' or tostring(result)
"""
        self._script = client.register_script(shared + body)
        self._status = "closing" if closing else "active"

    def __call__(self, program: str, counters: Counters) -> bool | None:
        names = ("total", *COUNTERS, "attempts", "crashes")
        values = [getattr(counters, name) for name in names]
        reply = self._script(keys=["k"] * 8, args=[program, *values, 0, 0, self._status])
        verdict: bool | None = {b"1": True, b"0": False, b"open": None}[reply]
        return verdict


@CHECKED
@given(text=expressions(), data=st.data(), closing=st.booleans())
def test_a_verdict_never_contradicts_any_outcome(redis_url: str, text: str, data: st.DataObject, closing: bool) -> None:
    counters = data.draw(small_counters(closing=closing))
    check_sound(LuaVerdict(redis_url, closing=closing), text, counters, closing=closing)


@CHECKED
@given(text=comparisons(), data=st.data(), closing=st.booleans())
def test_a_single_comparison_is_judged_exactly_when_it_is_certain(
    redis_url: str, text: str, data: st.DataObject, closing: bool
) -> None:
    counters = data.draw(small_counters(closing=closing))
    check_exact(LuaVerdict(redis_url, closing=closing), text, counters, closing=closing)
