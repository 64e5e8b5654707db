"""Somebody should look: the queue runs empty, or the answers look wrong. Sent once when it begins, to a webhook or by e-mail.

`reelhf annotate watch` looks now and then; what it told already lies in `alerts.json`, so a restart repeats nothing.
"""

from __future__ import annotations

import json
import os
import smtplib
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, PositiveInt

from reelhf.config import Config
from reelhf.errors import UserError

if TYPE_CHECKING:
    from annotation.store import Store

STATE_FILE = "alerts.json"
TIMEOUT_SECONDS = 10
NEWEST_JUDGMENTS = 5000


class AlertsConfig(Config):
    """What is worth an alert, and where it goes."""

    min_open_tasks: int = Field(default=0, ge=0)
    """The queue counts as empty with so many open tasks or fewer."""
    max_too_fast: float = Field(default=0.5, gt=0, le=1)
    """Share of an annotator's judgments given faster than the clips can be watched."""
    min_gold_accuracy: float = Field(default=0.6, ge=0, le=1)
    """Share of known tasks an annotator must get right; the upper end of the interval has to fall below it."""
    min_judgments: PositiveInt = 20
    """Fewer of an annotator raise no alarm."""
    position_bias_p: float = Field(default=0.001, gt=0, lt=1)
    """Below this, the place on the page decides what is called best."""
    every_seconds: PositiveFloat = 60.0
    """How often `watch` looks."""
    webhook_url: str | None = None
    """Is sent each alert as JSON: `{"project", "alert", "text"}`. Slack and Mattermost show `text`."""
    smtp_host: str | None = None
    """Mail server; unset, nothing is mailed."""
    smtp_port: PositiveInt = 587
    smtp_starttls: bool = True
    """Encrypt before signing in."""
    smtp_user: str | None = None
    smtp_password_variable: str = "REELHF_SMTP_PASSWORD"
    """Name of the environment variable that holds the password."""
    mail_from: str = "reelhf@localhost"
    mail_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class Watched:
    """One look."""

    raised: dict[str, str]
    """Alerts that stand now: name -> sentence."""
    new: tuple[str, ...]
    """Those told for the first time."""
    failures: tuple[str, ...]
    """Where an alert could not be sent; it is told again at the next look."""


def look(store: Store, config: AlertsConfig) -> Watched:
    """Tells what is newly wrong, and remembers it until it is over."""
    raised = standing_alerts(store, config)
    path = store.media.parent / STATE_FILE
    told = set(_read_state(path))
    new = tuple(name for name in raised if name not in told)
    failures, kept = [], [name for name in raised if name in told]
    for name in new:
        failed = _send(config, store.media.parent.name, name, raised[name])
        failures += failed
        if not failed:
            kept.append(name)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(kept))
    aside.replace(path)
    return Watched(raised, new, tuple(failures))


def standing_alerts(store: Store, config: AlertsConfig) -> dict[str, str]:
    """Everything that is wrong with a project now."""
    from annotation.export import judgment_table
    from annotation.quality.report import Judged, quality_report

    found = {}
    counts = store.counts()
    if counts["tasks"] and counts["open_tasks"] <= config.min_open_tasks:
        found["queue empty"] = (
            f"{counts['open_tasks']} of {counts['tasks']} tasks are open: make new ones, or people wait"
        )
    judgments, clips = judgment_table(store, newest=NEWEST_JUDGMENTS)
    if judgments:
        found |= quality_alarms(quality_report(Judged(judgments, clips, {})), config)
    return found


def quality_alarms(report: Mapping[str, Any], config: AlertsConfig) -> dict[str, str]:
    """What in a quality report is worth an alert."""
    found = {}
    for person in report["annotators"]:
        if person["tasks"] < config.min_judgments or person["simulated"]:
            continue
        name, fast, gold = person["annotator"], person["too_fast"], person["gold"]
        if fast and fast["share"] is not None and fast["share"] > config.max_too_fast:
            found[f"too fast: {name}"] = (
                f"{name} gave {fast['share']:.0%} of the answers faster than the clips can be watched"
            )
        if gold and gold["high"] is not None and gold["high"] < config.min_gold_accuracy:
            found[f"gold: {name}"] = (
                f"{name} gets at most {gold['high']:.0%} of the known tasks right"
            )
    for num_clips, bias in report["position_bias"].items():
        if bias["p_value"] < config.position_bias_p:
            found[f"position bias: {num_clips} clips"] = (
                f"with {num_clips} clips, the place on the page decides what is called best (p = {bias['p_value']:.1g}): {bias['best']}"
            )
    return found


def _send(config: AlertsConfig, project: str, name: str, text: str) -> list[str]:
    """Sends one alert everywhere; returns what went wrong, without any secret."""
    failures = []
    if config.webhook_url is not None:
        failures += _call(config.webhook_url, {"project": project, "alert": name, "text": text})
    if config.smtp_host is not None and config.mail_to:
        try:
            _mail(config, f"[{project}] {name}", text)
        except (OSError, smtplib.SMTPException) as error:
            failures.append(f"the mail server {config.smtp_host} failed: {type(error).__name__}")
    return failures


def _call(address: str, body: Mapping[str, str]) -> list[str]:
    import httpx

    try:
        httpx.post(address, json=dict(body), timeout=TIMEOUT_SECONDS).raise_for_status()
    except httpx.HTTPError as error:
        host = httpx.URL(address).host  # the path of such an address is a secret
        return [f"the webhook at {host} failed: {type(error).__name__}"]
    return []


def _mail(config: AlertsConfig, subject: str, text: str) -> None:
    assert config.smtp_host is not None
    message = EmailMessage()
    message["From"], message["To"] = config.mail_from, ", ".join(config.mail_to)
    message["Subject"] = subject.replace("\n", " ")
    message.set_content(text)
    with smtplib.SMTP(config.smtp_host, config.smtp_port, timeout=TIMEOUT_SECONDS) as server:
        if config.smtp_starttls:
            server.starttls()
        if config.smtp_user is not None:
            password = os.environ.get(config.smtp_password_variable)
            if password is None:
                raise UserError(
                    f"{config.smtp_password_variable} holds no password for the mail server"
                )
            server.login(config.smtp_user, password)
        server.send_message(message)


def _read_state(path: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []
