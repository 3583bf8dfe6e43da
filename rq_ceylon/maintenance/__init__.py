"""Maintenance: what every worker and monitor does for all groups and roles."""

from rq_ceylon.maintenance.relay import hand_over, relay
from rq_ceylon.maintenance.steps import MOVING_MS, Maintenance, ask_dependencies, judge, maintain, prune

__all__ = ["MOVING_MS", "Maintenance", "ask_dependencies", "hand_over", "judge", "maintain", "prune", "relay"]
