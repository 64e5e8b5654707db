"""Who may ask for what: one table for every path of our own. A path that is not in it is for signed-in browsers only."""

from __future__ import annotations

import re
from dataclasses import dataclass

RANKS = {"annotator": 0, "reviewer": 1, "admin": 2}
"""Each role may do what those below it may."""


@dataclass(frozen=True)
class Rule:
    """What a path asks of whoever comes."""

    pattern: re.Pattern[str]
    role: str = "annotator"
    scope: str | None = None
    """What an API token needs to pass; None: no token passes."""
    public: bool = False
    """Nobody is asked who they are."""


def _rule(pattern: str, role: str = "annotator", **options: object) -> Rule:
    return Rule(re.compile(pattern + r"\Z"), role, **options)  # type: ignore[arg-type]


RULES = (
    _rule(r"/(login|api/login|healthz|annotate/login\.css)", public=True),
    _rule(r"/link/[\w-]+", public=True),  # the token in it is the permission
    _rule(r"/oidc/(start|callback)", public=True),
    _rule(r"/media/task/[\w-]+/\d+", public=True),  # the signature is
    _rule(r"/webhooks/label-studio", public=True),  # the secret header is
    _rule(r"/api/(me|progress|guide)", scope="read"),
    _rule(r"/api/(claim|submit|back|skip|flag|heartbeat|draft)", scope="judge"),
    # experts and whoever is more than an annotator: annotation.flags
    _rule(r"/api/(flagged|decide)"),
    _rule(r"/media/held/\d+/\d+"),
    _rule(r"/media/[^/]+", scope="judge"),
    _rule(r"/api/counts", "reviewer", scope="read"),
    _rule(r"/api/quality", "reviewer", scope="read"),
    _rule(r"/(quality|flags)(/.*)?", "reviewer"),
    _rule(r"/api/users", "admin"),
    _rule(r"/api/(logout|tokens|tokens/\d+)"),
    _rule(r"/annotate/[^/]+"),
    _rule(r"/"),
)
ANYTHING_ELSE = Rule(re.compile(""))


def rule_for(path: str) -> Rule:
    """The rule of a path, without the site's root path."""
    return next((rule for rule in RULES if rule.pattern.match(path)), ANYTHING_ELSE)


def has_rank(role: str, needed: str) -> bool:
    """True if `role` is `needed` or above it."""
    return RANKS[role] >= RANKS[needed]
