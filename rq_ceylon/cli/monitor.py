"""
`ceylon-monitor`.
"""

from __future__ import annotations

import click

from rq_ceylon.cli.common import (
    CONTEXT,
    EXIT_CODES,
    load_app,
    logs,
    reported,
    run_async,
    set_up_logging,
    settings,
    where,
)


@click.command(
    "ceylon-monitor", context_settings={**CONTEXT, "auto_envvar_prefix": "CEYLON_MONITOR"}, epilog=EXIT_CODES
)
@click.option("--app", metavar="MODULE:APP", envvar="CEYLON_APP", help="Where callables for goals are registered.")
@click.option("--name", metavar="NAME", help="Shown in lists; a unique part is added. Default: the host.")
@where
@logs("info")
@click.version_option(package_name="rq-ceylon")
@reported
def monitor(
    app: str | None, name: str | None, redis_url: str | None, namespace: str | None, log_level: str, log_format: str
) -> None:
    """
    Watch all groups: say when goals settle, keep deadlines, run callable goals, record statistics.

    \b
    Examples:
      ceylon-monitor
      ceylon-monitor --app myjobs:app

    Any number of monitors may run, or none: goals over counters are judged where tasks are counted.
    """
    set_up_logging(log_level, log_format)
    registry = None
    if app:
        loaded = load_app(app)
        registry = loaded.registry
        place = loaded.settings if redis_url is None and namespace is None else settings(redis_url, namespace)
    else:
        place = settings(redis_url, namespace)
    run_async(_watch(place.redis_url, place.namespace, registry, name))


async def _watch(url: str, namespace: str, registry: object, name: str | None) -> None:
    import asyncio
    import signal

    from rq_ceylon.monitor import Monitor

    running = Monitor(url, namespace=namespace, registry=registry, name=name)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.stop)
    await running.run()
