"""`ceylon-monitor`."""

from __future__ import annotations

import click

from rq_ceylon.cli.common import RedisOptions, command, load_app, logs, serve, where


@command("ceylon-monitor")
@click.option("--app", metavar="MODULE:APP", envvar="CEYLON_APP", help="Application with callables for goals.")
@click.option("--name", metavar="NAME", help="Shown in lists, with a unique suffix. Default: the host.")
@where
@logs
def monitor(app: str | None, name: str | None, options: RedisOptions) -> None:
    """
    Watch all groups: report settled goals, enforce deadlines, run callable goals, record statistics.

    \b
    Examples:
      ceylon-monitor
      ceylon-monitor --app myjobs:app

    You may run any number of monitors, or none: Redis judges goals over counters in the step that counts a task.
    """
    # Before anything of the application's folder is on the path.
    from rq_ceylon.monitor import Monitor
    from rq_ceylon.process import Watch, stop_with_supervisor
    from rq_ceylon.worker import threads  # noqa: F401 - `serve` needs it

    loaded = load_app(app) if app else None
    found = options.bound(loaded)
    stop_with_supervisor()

    async def watch(beside: Watch) -> int:
        registry = loaded.registry if loaded else None
        running = Monitor(found.redis_url, namespace=found.namespace, registry=registry, name=name)
        beside.listen(lambda _: running.stop())
        await running.run()
        return 0

    serve(watch)
