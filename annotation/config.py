"""What a project can be told: how clips are shown, how many judgments are wanted, how the page is served."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from annotation.alerts import AlertsConfig
from annotation.presentation import PresentationConfig
from annotation.records import MAX_CLIPS, MIN_CLIPS
from annotation.routing import RoutingConfig
from reelhf.config import Config


class OidcConfig(Config):
    """An OpenID Connect provider, such as Keycloak, Entra ID or Google. Needs `pip install 'reelhf[oidc]'`."""

    issuer: str = Field(pattern=r"^https?://")
    """Its address; `<issuer>/.well-known/openid-configuration` is asked for the rest."""
    client_id: str
    """What the provider calls this site."""
    client_secret_variable: str = "REELHF_OIDC_SECRET"
    """Name of the environment variable that holds the client's secret."""
    public_url: str = Field(pattern=r"^https?://[^/]+$")
    """How browsers reach this site, without a path; `<public_url><root_path>/oidc/callback` is what to register."""
    create_accounts: bool = False
    """Make an annotator's account for whoever the provider vouches for; otherwise an admin links them first."""
    label: str = Field(default="Sign in with your organisation", max_length=80)
    """What the link on the sign-in page says."""


class AnnotateConfig(Config):
    """How a project is served."""

    lease_seconds: PositiveFloat = 1800.0
    """A claimed task goes back to the queue after this long without a sign of life."""
    session_hours: PositiveFloat = 12.0
    """A sign-in lasts this long."""
    must_watch: float = Field(default=0.9, ge=0, le=1)
    """Fraction of each clip's length that must have played before a person can submit, on the page or through the API; 0 lets them."""
    confirm_pairs: bool = True
    """Ask "is your best not worse than your worst in any other dimension?" where the other answers leave it open."""
    routing: RoutingConfig = RoutingConfig()
    """Who gets which task."""
    wanted_tasks: PositiveInt | None = None
    """Tasks asked of each annotator; progress counts towards it. Unset, it is all that are open to them."""
    login_failures: PositiveInt = 5
    """Wrong passwords for one name before sign-in for that name pauses."""
    login_pause_seconds: PositiveFloat = 60.0
    """How long it pauses."""
    secure_cookie: bool = False
    """Send the session cookie over HTTPS only. Set it whenever the server is not on loopback."""
    media_hours: PositiveFloat = 4.0
    """A link to a clip works this long; loading the page again makes new ones."""
    root_path: str = Field(default="", pattern=r"^(/[\w.-]+)*$")
    """Where a reverse proxy shows the site, such as `/labels`; empty for a host name of its own."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses whose X-Forwarded-For and -Proto headers are believed; nobody's by default."""
    oidc: OidcConfig | None = None
    """Sign-in through an identity provider, beside passwords."""
    title: str = Field(default="ReelHF annotation", max_length=80)
    """Name shown in the browser tab."""


class AnnotationConfig(Config):
    """One annotation project: `reelhf annotate quickstart` and `serve` take it as `--config`."""

    clips_per_task: int = Field(default=4, ge=MIN_CLIPS, le=MAX_CLIPS)
    """K: prompts with more clips become several tasks."""
    judgments_per_task: PositiveInt = 1
    """Different people asked per task. Two or more are needed to measure agreement."""
    presentation: PresentationConfig = PresentationConfig()
    """How clips are made alike before anyone sees them."""
    serve: AnnotateConfig = AnnotateConfig()
    """The page and its HTTP API."""
    alerts: AlertsConfig = AlertsConfig()
    """When `reelhf annotate watch` tells somebody."""
