"""What any worker or monitor does for all."""

from rq_ceylon.maintenance.relay import hand_over, relay
from rq_ceylon.maintenance.steps import Maintenance, judge, maintain, meet

__all__ = ["Maintenance", "hand_over", "judge", "maintain", "meet", "relay"]
