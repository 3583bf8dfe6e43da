"""
Submits work and follows it.

`session` is the connection that all share; `staging` turns tasks and groups into what is sent, `submission` sends
groups, `rolling` single tasks; `following` waits; `handles` are what a submission gives; `client` is the door to all.
"""

from rq_ceylon.client.client import Client
from rq_ceylon.client.handles import GroupHandle, TaskHandle, is_over, succeeded
from rq_ceylon.client.staging import check_group

__all__ = ["Client", "GroupHandle", "TaskHandle", "check_group", "is_over", "succeeded"]
