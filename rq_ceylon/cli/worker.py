"""
`ceylon-worker`.
"""

from __future__ import annotations

import sys

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
    "ceylon-worker",
    context_settings={**CONTEXT, "auto_envvar_prefix": "CEYLON_WORKER"},
    epilog=EXIT_CODES,
)
@click.argument("app", metavar="[MODULE:APP]", required=False, envvar="CEYLON_APP")
@click.option("-r", "--role", "roles", multiple=True, metavar="ROLE", envvar="CEYLON_ROLE", help="Roles to serve.")
@click.option("-c", "--concurrency", type=click.IntRange(1, 10_000), help="Tasks at once; default 100, sync only 16.")
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="Worker processes.")
@click.option("-b", "--burst", is_flag=True, help="End when nothing is left to do.")
@click.option("--name", metavar="NAME", help="Shown in lists; a unique part is added. Default: the host.")
@click.option("--grace", metavar="DURATION", default="25s", show_default=True, help="For running tasks at a stop.")
@click.option(
    "--lease", metavar="DURATION", default="30s", show_default=True, help="A silent worker keeps tasks for so long."
)
@where
@logs("info")
@click.version_option(package_name="rq-ceylon")
@reported
def worker(
    app: str | None,
    roles: tuple[str, ...],
    concurrency: int | None,
    processes: int,
    burst: bool,
    name: str | None,
    grace: str,
    lease: str,
    redis_url: str | None,
    namespace: str | None,
    log_level: str,
    log_format: str,
) -> None:
    """
    Run the tasks of some roles.

    \b
    Examples:
      ceylon-worker --role processor -c 4
      ceylon-worker myjobs:app --processes 4

    Without MODULE:APP it serves two tasks: `default`, which sleeps for the task's duration, and `echo`. Roles default
    to those of the application's tasks. A first SIGTERM or Ctrl-C lets running tasks finish within --grace, a second
    one gives them back at once.
    """
    set_up_logging(log_level, log_format)
    from rq_ceylon.errors import InvalidInputError
    from rq_ceylon.handlers import Registry
    from rq_ceylon.models import seconds
    from rq_ceylon.worker.supervisor import Supervisor, stop_with_supervisor

    registry = Registry()
    if app:
        loaded = load_app(app)
        registry = loaded.registry
        place = loaded.settings if redis_url is None and namespace is None else settings(redis_url, namespace)
    else:
        place = settings(redis_url, namespace)
    served = list(roles) or registry.roles()
    if not served:
        raise InvalidInputError("no role to serve: give --role ROLE, or an application whose tasks have roles")
    grace_s, lease_s = seconds(grace, "--grace"), seconds(lease, "--lease")
    if lease_s < 0.1:
        raise InvalidInputError(f"--lease: {lease!r} is too short; give at least 100ms")
    if processes > 1:
        command = [sys.executable, "-m", "rq_ceylon.cli", "worker", *([app] if app else []), "--processes", "1"]
        for role in served:
            command += ["--role", role]
        command += ["--redis", place.redis_url, "--namespace", place.namespace, "--grace", grace, "--lease", lease]
        command += ["--log-level", log_level, "--log-format", log_format, *(["--burst"] if burst else [])]
        command += [*(["-c", str(concurrency)] if concurrency else []), *(["--name", name] if name else [])]
        supervisor = Supervisor(
            command, processes=processes, url=place.redis_url, namespace=place.namespace, burst=burst
        )
        sys.exit(run_async(_supervise(supervisor)))
    stop_with_supervisor()
    is_async = not app or any(handler.kind == "async" for handler in registry.own())
    sys.exit(
        run_async(
            _work(
                url=place.redis_url,
                namespace=place.namespace,
                registry=registry,
                roles=served,
                name=name,
                slots=concurrency or (100 if is_async else 16),
                threads=concurrency or 16,
                lease_s=lease_s,
                grace_s=grace_s,
                burst=burst,
            )
        )
    )


async def _work(**options: object) -> int:
    import asyncio
    import signal

    from rq_ceylon.worker import Worker

    running = Worker(**options)  # type: ignore[arg-type]
    code = 0
    signals = 0

    def stop(number: int) -> None:
        nonlocal code, signals
        signals += 1
        if signals == 1:
            running.stop()
        else:
            code = 128 + number
            running.kill()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    await running.run()
    return code


async def _supervise(supervisor: object) -> int:
    import asyncio
    import signal

    from rq_ceylon.worker.supervisor import Supervisor

    assert isinstance(supervisor, Supervisor)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.signal, number)
    return await supervisor.run()
