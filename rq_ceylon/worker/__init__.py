"""
The worker. `loop` drives it, `turn` plans each pipeline, `lanes` sends it, `executor` runs handlers, `leases` renews
the leases of held deliveries, `background` runs the background tasks, `supervisor` runs several workers as processes.
"""

from rq_ceylon.worker.loop import Worker

__all__ = ["Worker"]
