"""
The worker: `loop` is the role itself, `turn` decides what each round trip says, `lanes` sends it, `executor` runs
handlers, `leases` keeps what is held, `lookout` is what goes on beside, `supervisor` runs several workers as processes.
"""

from rq_ceylon.worker.loop import Worker

__all__ = ["Worker"]
