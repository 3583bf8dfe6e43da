"""Maintenance: what every worker and monitor does for all groups and roles."""

from rq_ceylon.maintenance.relay import hand_over, relay
from rq_ceylon.maintenance.steps import Maintenance, judge, maintain, meet

__all__ = ["Maintenance", "hand_over", "judge", "maintain", "meet", "relay"]
