"""
Submits tasks and groups, and follows them.

`session` holds the connection that all parts share. `staging` turns tasks and groups into the form in which they are
sent; `submission` sends groups, `rolling` single tasks. `following` waits for tasks and groups, `waits` explains why
tasks wait. A submission returns one of the `handles`. `client` is the entry to all of this, and `sync` the same without
await.
"""

from rq_ceylon.client.client import Client
from rq_ceylon.client.handles import GroupHandle, TaskHandle, is_over, not_over, succeeded
from rq_ceylon.client.submission import check_groups
from rq_ceylon.client.sync import SyncClient, SyncGroupHandle, SyncTaskHandle
from rq_ceylon.client.waits import why_waiting
from rq_ceylon.staging import check_group, keyed_id, new_id

__all__ = [
    "Client",
    "GroupHandle",
    "SyncClient",
    "SyncGroupHandle",
    "SyncTaskHandle",
    "TaskHandle",
    "check_group",
    "check_groups",
    "is_over",
    "keyed_id",
    "new_id",
    "not_over",
    "succeeded",
    "why_waiting",
]
