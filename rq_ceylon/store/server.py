"""The embedded server is in `rq_ceylon.dev.server`. Programs written before it moved import it from here."""

from rq_ceylon.dev.server import EmbeddedServer

__all__ = ["EmbeddedServer"]
