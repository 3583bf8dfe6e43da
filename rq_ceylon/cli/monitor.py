"""
`ceylon-monitor`.
"""

from __future__ import annotations

import sys

import click

from rq_ceylon.cli.common import RedisOptions, command, load_app, logs, on_signals, run_async, where


@command("ceylon-monitor")
@click.option("--app", metavar="MODULE:APP", envvar="CEYLON_APP", help="Where callables for goals are registered.")
@click.option("--name", metavar="NAME", help="Shown in lists; a unique part is added. Default: the host.")
@where
@logs
def monitor(app: str | None, name: str | None, options: RedisOptions) -> None:
    """
    Watch all groups: say when goals settle, keep deadlines, run callable goals, record statistics.

    \b
    Examples:
      ceylon-monitor
      ceylon-monitor --app myjobs:app

    Any number of monitors may run, or none: goals over counters are judged where tasks are counted.
    """
    loaded = load_app(app) if app else None
    found = options.settings(loaded)
    if sys.platform != "win32":  # there nobody starts it for a demo
        from rq_ceylon.worker.supervisor import stop_with_supervisor

        stop_with_supervisor()

    async def watch() -> None:
        from rq_ceylon.monitor import Monitor

        registry = loaded.registry if loaded else None
        running = Monitor(found.redis_url, namespace=found.namespace, registry=registry, name=name)
        on_signals(lambda _: running.stop())
        await running.run()

    run_async(watch())
