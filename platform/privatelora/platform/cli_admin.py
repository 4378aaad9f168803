"""`privatelora admin`: what an operator does at a shell. Thin: options become a call of `admin.Shell`.

A key that a command makes is printed once and kept nowhere.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from privatelora.platform.cli_options import DatabaseUrl, DataDir, ValkeyUrl
from privatelora.platform.console import print_csv, print_rows
from privatelora.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from privatelora.platform.admin import Shell

USAGE_DAYS = 30

admin = typer.Typer(
    help="Users, keys, quotas, sessions and jobs of a control plane, on its database: no API has to run.",
    epilog="It is that of [bold]privatelora up[/bold] on this machine, or the one that PRIVATELORA_DATABASE_URL names.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
UserName = Annotated[str, typer.Argument(metavar="USER", help="Name or id.")]
OfUser = Annotated[str | None, typer.Option("--user", metavar="USER", help="Only of this user, by name or id.")]
KeyName = Annotated[str, typer.Argument(metavar="KEY", help="Its id, or the first characters that list-keys shows.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="The newest so many.")]


@admin.callback()
def where(
    context: typer.Context, database_url: DatabaseUrl = None, valkey_url: ValkeyUrl = None, data_dir: DataDir = None
) -> None:
    context.obj = {"database_url": database_url, "valkey_url": valkey_url, "data_dir": data_dir}


@admin.command()
def upgrade(
    context: typer.Context, revision: Annotated[str, typer.Argument()] = "head", as_json: AsJson = False
) -> None:
    """Bring the database to this release's schema; makes it if it is empty."""
    with _shell(context, checked=False) as shell:
        print_rows([{"revision": shell.upgrade(revision)}], ("revision",), as_json)


@admin.command()
def downgrade(
    context: typer.Context,
    revision: Annotated[str, typer.Argument(help="An older revision, or base for no table at all.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Bring the database back to an older schema. What only the newer one holds is deleted: have a backup."""
    if not yes:
        typer.confirm(f"delete what revision {revision} does not have?", abort=True)
    with _shell(context, checked=False) as shell:
        print_rows([{"revision": shell.downgrade(revision)}], ("revision",), as_json)


@admin.command("create-user", epilog="Example:\n\n  privatelora admin create-user alice --plan research")
def create_user(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Unique.")],
    role: Annotated[str, typer.Option(help="member or operator.")] = "member",
    plan: Annotated[str, typer.Option(help="Name that quotas and schedules refer to.")] = "default",
    team: Annotated[str | None, typer.Option(help="As plan.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a user, without keys."""
    from privatelora.platform.tables import Role

    with _shell(context) as shell:
        print_rows([shell.create_user(_name(name), _one_of(Role, role, "--role"), _name(plan), team)], USERS, as_json)


@admin.command("list-users")
def list_users(
    context: typer.Context,
    plan: Annotated[str | None, typer.Option(help="Only of this plan.")] = None,
    team: Annotated[str | None, typer.Option(help="Only of this team.")] = None,
    as_json: AsJson = False,
) -> None:
    """List users."""
    with _shell(context) as shell:
        print_rows(shell.list_users(plan, team), USERS, as_json)


@admin.command("disable-user")
def disable_user(context: typer.Context, user: UserName, as_json: AsJson = False) -> None:
    """Refuse a user's keys and end the user's sessions, within a second."""
    with _shell(context) as shell:
        print_rows([shell.set_disabled(user, True)], USERS, as_json)


@admin.command("enable-user")
def enable_user(context: typer.Context, user: UserName, as_json: AsJson = False) -> None:
    """Let a disabled user's keys work again."""
    with _shell(context) as shell:
        print_rows([shell.set_disabled(user, False)], USERS, as_json)


@admin.command("create-key", epilog="Example:\n\n  privatelora admin create-key alice --scope device --days 90")
def create_key(
    context: typer.Context,
    user: UserName,
    scope: Annotated[str, typer.Option(help="device, read-only or operator.")] = "device",
    name: Annotated[str, typer.Option(help="To tell keys apart.")] = "shell",
    days: Annotated[int | None, typer.Option(min=1, help="Days until it expires; never unless set.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key and print it, once."""
    from privatelora.platform.tables import Scope

    with _shell(context) as shell:
        _show_key(shell.create_key(user, _name(name), _one_of(Scope, scope, "--scope"), days), as_json)


@admin.command("list-keys")
def list_keys(context: typer.Context, user: OfUser = None, as_json: AsJson = False) -> None:
    """List keys by their first characters."""
    with _shell(context) as shell:
        print_rows(shell.list_keys(user), KEYS, as_json)


@admin.command("rotate-key")
def rotate_key(
    context: typer.Context,
    key: KeyName,
    grace_s: Annotated[float, typer.Option(min=0, help="Seconds that the old key still works.")] = 86400.0,
    as_json: AsJson = False,
) -> None:
    """Make a key in place of another and print it, once."""
    with _shell(context) as shell:
        _show_key(shell.rotate_key(key, grace_s), as_json)


@admin.command("revoke-key")
def revoke_key(context: typer.Context, key: KeyName, as_json: AsJson = False) -> None:
    """Have a key be refused from now on and end its sessions, within a second."""
    with _shell(context) as shell:
        print_rows([shell.revoke_key(key)], KEYS, as_json)


@admin.command("set-quota", epilog="Example:\n\n  privatelora admin set-quota plan default bytes_up_per_day 1000000000")
def set_quota(
    context: typer.Context,
    level: Annotated[str, typer.Argument(help="plan, team, user or key.")],
    subject: Annotated[str, typer.Argument(help="Its name or id.")],
    resource: Annotated[str, typer.Argument(help="Such as bytes_up_per_day; see list-quotas --help.")],
    limit: Annotated[int | None, typer.Argument(min=0, help="Left out with --delete.")] = None,
    soft_limit: Annotated[int | None, typer.Option(min=0, help="Warns, by event and webhook.")] = None,
    resets_at: Annotated[str | None, typer.Option(metavar="HH:MM", help="UTC, of a daily window.")] = None,
    webhook_url: Annotated[str | None, typer.Option(help="Called when a limit is passed.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the limit.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make, change or delete a limit; it holds for running sessions within seconds."""
    from privatelora.platform.tables import Level, Resource

    if delete == (limit is not None):
        raise ConfigurationError("a quota needs either a limit or --delete")
    changes = {"soft_limit": soft_limit, "resets_at": resets_at, "webhook_url": webhook_url}
    _check_quota(resets_at, webhook_url)
    with _shell(context) as shell:
        row = shell.set_quota(
            _one_of(Level, level, "LEVEL"),
            subject,
            _one_of(Resource, resource, "RESOURCE"),
            limit,
            {name: value for name, value in changes.items() if value is not None},
        )
        print_rows([row] if row is not None else [], QUOTAS, as_json)


@admin.command("list-quotas")
def list_quotas(context: typer.Context, as_json: AsJson = False) -> None:
    """List limits, and what is used of those by day.

    Resources: bytes_up_per_day, bytes_down_per_day, bytes_per_second, tokens_per_minute, concurrent_sessions,
    kv_memory_bytes.
    """
    with _shell(context) as shell:
        print_rows(shell.list_quotas(), QUOTAS, as_json)


@admin.command()
def usage(
    context: typer.Context,
    since: Annotated[
        str | None, typer.Option(metavar="YYYY-MM-DD", help="First day, UTC; 30 days ago unless set.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="Last day, UTC; today unless set.")] = None,
    user: OfUser = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what users used, by day."""
    today = datetime.now(UTC).date()
    first, last = _day(since, "--since", today - timedelta(days=USAGE_DAYS)), _day(until, "--until", today)
    with _shell(context) as shell:
        rows = shell.usage(first, last, user)
    if as_csv:
        print_csv(rows, USAGE)
    else:
        print_rows(rows, USAGE, as_json)


@admin.command("list-backbones")
def list_backbones(context: typer.Context, as_json: AsJson = False) -> None:
    """List backbones that serve or drain."""
    with _shell(context) as shell:
        print_rows(shell.list_backbones(), BACKBONES, as_json)


@admin.command("list-sessions")
def list_sessions(
    context: typer.Context,
    user: OfUser = None,
    ended: Annotated[bool, typer.Option("--ended", help="Those that have ended, too.")] = False,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List live sessions."""
    with _shell(context) as shell:
        print_rows(shell.list_sessions(user, ended, limit), SESSIONS, as_json)


@admin.command()
def drain(
    context: typer.Context,
    sessions: Annotated[list[str] | None, typer.Argument(metavar="[SESSION]...")] = None,
    backbone: Annotated[str | None, typer.Option(help="All sessions of this backbone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have sessions finish their running passes and leave; their devices connect again by themselves."""
    from privatelora.platform.tables import Command

    _command(context, Command.DRAIN, sessions or [], backbone, as_json)


@admin.command("end-session")
def end_session(
    context: typer.Context,
    sessions: Annotated[list[str] | None, typer.Argument(metavar="[SESSION]...")] = None,
    backbone: Annotated[str | None, typer.Option(help="All sessions of this backbone.")] = None,
    as_json: AsJson = False,
) -> None:
    """Have sessions leave at once; their devices are told so and do not come back by themselves."""
    from privatelora.platform.tables import Command

    _command(context, Command.END, sessions or [], backbone, as_json)


@admin.command("queue-job", epilog="Example:\n\n  privatelora admin queue-job usage-rollup")
def queue_job(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(help="Such as usage-rollup, or finetune-round with --device.")],
    params: Annotated[str, typer.Option(metavar="JSON", help="Its parameters.")] = "{}",
    device: Annotated[str | None, typer.Option(help="Id of the device to offer it to.")] = None,
    priority: Annotated[int, typer.Option(help="The highest goes first.")] = 0,
    deadline_s: Annotated[float | None, typer.Option(min=1, help="Seconds after which it expires.")] = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job. What must run on a device is offered to it, and its owner's policy decides."""
    try:
        given = json.loads(params)
    except ValueError as error:
        raise ConfigurationError(f"--params is no JSON ({error})") from None
    if not isinstance(given, dict):
        raise ConfigurationError("--params is no JSON object")
    with _shell(context) as shell:
        print_rows([shell.queue_job(kind, given, device, priority, deadline_s)], JOBS, as_json)


@admin.command("list-jobs")
def list_jobs(
    context: typer.Context,
    state: Annotated[str | None, typer.Option(help="Only in this state, such as failed.")] = None,
    kind: Annotated[str | None, typer.Option(help="Only of this kind.")] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List jobs, the newest first."""
    with _shell(context) as shell:
        print_rows(shell.list_jobs(state, kind, limit), JOBS, as_json)


@admin.command("cancel-job")
def cancel_job(
    context: typer.Context, job: Annotated[str, typer.Argument(help="Its id.")], as_json: AsJson = False
) -> None:
    """Cancel a job that has not ended."""
    with _shell(context) as shell:
        print_rows([shell.cancel_job(job)], JOBS, as_json)


@admin.command("list-schedules")
def list_schedules(context: typer.Context, as_json: AsJson = False) -> None:
    """List what is queued by the clock."""
    with _shell(context) as shell:
        print_rows(shell.list_schedules(), SCHEDULES, as_json)


@admin.command()
def audit(
    context: typer.Context,
    action: Annotated[str | None, typer.Option(help="Only this one, such as key.revoked.")] = None,
    of: Annotated[str | None, typer.Option("--of", help="Only of the object with this id.")] = None,
    limit: Limit = 100,
    as_json: AsJson = False,
) -> None:
    """List who did what, the newest first."""
    with _shell(context) as shell:
        print_rows(shell.audit(action, of, limit), AUDIT, as_json)


USERS = ("id", "name", "role", "plan", "team", "disabled_at", "created_at")
KEYS = ("id", "prefix", "user", "name", "scope", "created_at", "expires_at", "revoked_at", "last_used_at")
QUOTAS = ("id", "level", "subject", "resource", "limit", "soft_limit", "used", "resets_at", "webhook_url")
USAGE = ("day", "user", "user_id", "bytes_up", "bytes_down", "tokens", "sessions")
BACKBONES = ("id", "url", "state", "sessions", "started_at", "heartbeat_at")
SESSIONS = (
    "id",
    "user",
    "backbone_id",
    "placement",
    "state",
    "bytes_up",
    "bytes_down",
    "tokens",
    "opened_at",
    "end_reason",
)
JOBS = ("id", "kind", "state", "device_id", "priority", "attempts", "run_at", "result", "error")
SCHEDULES = ("id", "name", "kind", "cron", "timezone", "enabled", "last_fired_at")
AUDIT = ("at", "action", "object_id", "user_id", "address", "details")


@contextmanager
def _shell(context: typer.Context, *, checked: bool = True) -> Iterator[Shell]:
    from privatelora.platform.admin import shell
    from privatelora.platform.embedded import load_settings_here

    with shell(load_settings_here(context.obj), checked=checked) as opened:
        yield opened


def _show_key(row: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(dict(row), default=str))
        return
    print(row["key"])
    print(f"{row['id']}, scope {row['scope']}: keep it now, it is not shown again", file=sys.stderr)


def _command(context: typer.Context, command: Any, sessions: list[str], backbone: str | None, as_json: bool) -> None:
    if not sessions and backbone is None:
        raise ConfigurationError("name sessions, or a --backbone; see `privatelora admin list-sessions`")
    with _shell(context) as shell:
        asked = shell.command_sessions(command, sessions, backbone)
    print_rows([{"id": one, "command": command} for one in asked], ("id", "command"), as_json)


def _name(text: str) -> str:
    from privatelora.platform.tables import NAME_CHARS

    if not text.strip() or not text.isprintable() or len(text) > NAME_CHARS:
        raise ConfigurationError(f"{text!r} is no name: 1 to {NAME_CHARS} characters that can be printed")
    return text


def _one_of(kind: Any, text: str, where: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigurationError(f"{where}={text}: use one of {', '.join(kind)}") from None


def _check_quota(resets_at: str | None, webhook_url: str | None) -> None:
    if resets_at is not None and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", resets_at):
        raise ConfigurationError(f"--resets-at={resets_at}: write a time of day in UTC as 06:30")
    if webhook_url is not None and not re.fullmatch(r"https?://[^\s/@]+(/\S*)?", webhook_url):
        raise ConfigurationError(
            f"--webhook-url={webhook_url}: write an http:// or https:// URL without user and password"
        )


def _day(text: str | None, where: str, otherwise: date) -> date:
    try:
        return otherwise if text is None else date.fromisoformat(text)
    except ValueError:
        raise ConfigurationError(f"{where}={text}: write a day as 2026-11-26") from None
