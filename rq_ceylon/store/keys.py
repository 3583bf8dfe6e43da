"""
The names of all keys and channels.

A group's keys are `ceylon:<namespace>:{g:<gid>}:<part>`, a role's are `ceylon:<namespace>:{r:<role>}:<part>`. The
braces put all parts of one group, or of one role, into one slot of a cluster, because a script may touch only one slot.
"""

from __future__ import annotations

import zlib

from rq_ceylon.models import check_namespace

GROUP_PARTS = ("meta", "tasks", "claims", "results", "needs", "children", "outbox", "events", "errors", "parked")
ROLE_PARTS = ("high", "normal", "low", "front", "delayed", "meta", "bell", "quarantine", "by_name", "names")
INDEX_SHARDS = 16

STREAMS = {"high": 1, "normal": 2, "low": 3, "front": 4}
"""The number of each stream: one per priority, and one for entries that go first. Names of entries begin with it, as in
`2:1764000000000-0`."""


class Keys:
    """
    The keys of one namespace.

    Raises:
        InvalidInputError: the name of the namespace is not allowed.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = check_namespace(namespace)
        self.prefix = f"ceylon:{namespace}:"
        self.roles = f"{self.prefix}{{i}}:roles"
        self.workers = f"{self.prefix}{{i}}:workers"
        self.thorough = f"{self.prefix}{{i}}:thorough"
        self.control_channel = f"{self.prefix}control"

    def group(self, gid: str) -> list[str]:
        """All parts of a group, in the order in which its scripts take them."""
        start = f"{self.prefix}{{g:{gid}}}:"
        return [start + part for part in GROUP_PARTS]

    def group_part(self, gid: str, part: str) -> str:
        return f"{self.prefix}{{g:{gid}}}:{part}"

    def role(self, role: str) -> list[str]:
        """All parts of a role, in the order in which its scripts take them."""
        start = f"{self.prefix}{{r:{role}}}:"
        return [start + part for part in ROLE_PARTS]

    def role_part(self, role: str, part: str) -> str:
        return f"{self.prefix}{{r:{role}}}:{part}"

    def index(self, shard: int) -> str:
        """The sorted set with the groups of one shard, by the time (server epoch ms) of the next look at them."""
        return f"{self.prefix}{{i:{shard}}}:groups"

    def index_of(self, gid: str) -> str:
        # Every process must find the same shard, which rules out Python's `hash`: it differs from process to process.
        return self.index(zlib.crc32(gid.encode()) % INDEX_SHARDS)

    def worker(self, name: str) -> str:
        """The heartbeat of a worker or monitor: JSON with a TTL."""
        return f"{self.prefix}{{w:{name}}}"

    def events_channel(self, gid: str) -> str:
        """
        The channel that announces new events of a group, by the number of the newest. Only a notification, never the
        record.
        """
        return f"{self.prefix}events:{gid}"
