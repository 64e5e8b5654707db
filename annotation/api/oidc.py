"""Sign-in through an OpenID Connect provider: authorization code with PKCE, the identity token checked against the provider's keys.

What is remembered between leaving and coming back lies in a signed cookie of ten minutes; nothing of the provider's reaches the page.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from itsdangerous import BadData, URLSafeTimedSerializer
from sqlalchemy import insert, select

from annotation import schema as t
from annotation.accounts import Account
from annotation.api.sign_in import start_session
from annotation.api.signing import site_key
from annotation.api.site import Site, TheSite
from annotation.config import OidcConfig
from annotation.store import Store
from reelhf.errors import UserError

COOKIE = "reelhf_oidc"
SECONDS_TO_SIGN_IN = 600
SCOPES = "openid profile"
ALGORITHMS = ["RS256", "RS384", "RS512", "ES256", "ES384", "PS256", "EdDSA"]
"""Only those with a public key: one signed with our own secret, or not at all, proves nothing."""

router = APIRouter()


@router.get("/oidc/start")
async def start(site: TheSite) -> Response:
    config = _config(site)
    provider = await _metadata(config)
    state, nonce, verifier = (secrets.token_urlsafe(24) for _ in range(3))
    async with _client(site, config) as client:
        address, _ = client.create_authorization_url(
            provider["authorization_endpoint"], state=state, nonce=nonce, code_verifier=verifier
        )
    response = RedirectResponse(address, status_code=303)
    serializer = await run_in_threadpool(_serializer, site.store)
    response.set_cookie(
        COOKIE,
        serializer.dumps([state, nonce, verifier]),
        max_age=SECONDS_TO_SIGN_IN,
        httponly=True,
        samesite="lax",  # the provider's redirect must bring it back
        secure=site.config.secure_cookie,
        path=site.url("/oidc"),
    )
    return response


@router.get("/oidc/callback")
async def callback(request: Request, site: TheSite) -> Response:
    config = _config(site)
    serializer = await run_in_threadpool(_serializer, site.store)
    try:
        state, nonce, verifier = serializer.loads(
            request.cookies.get(COOKIE, ""), max_age=SECONDS_TO_SIGN_IN
        )
    except BadData as error:
        raise HTTPException(400, "this sign-in took too long or began elsewhere") from error
    if not secrets.compare_digest(request.query_params.get("state", "").encode(), state.encode()):
        raise HTTPException(400, "this sign-in began elsewhere")
    code = request.query_params.get("code")
    if not code:
        raise HTTPException(403, "the identity provider did not sign you in")
    claims = await _exchange(site, config, code, verifier, nonce)
    account = await run_in_threadpool(account_of, site.store, config, claims)
    response = RedirectResponse(site.url("/"), status_code=303)
    await run_in_threadpool(start_session, site, response, account)
    response.delete_cookie(COOKIE, path=site.url("/oidc"))
    return response


def account_of(store: Store, config: OidcConfig, claims: dict[str, Any]) -> Account:
    """The account that belongs to an identity. Raises HTTPException 403 if there is none and none may be made."""
    issuer, subject = str(claims["iss"]), str(claims["sub"])
    query = (
        select(t.account.c.name)
        .join(t.identity, t.identity.c.account_id == t.account.c.id)
        .where(t.identity.c.issuer == issuer, t.identity.c.subject == subject)
    )
    with store.read() as connection:
        name = connection.execute(query).scalar()
    if name is not None:
        found = store.find_user(name)
        assert found is not None
        return found
    if not config.create_accounts:
        raise HTTPException(
            403, "nobody here is linked to this identity: ask an admin for `annotate user link`"
        )
    wanted = str(claims.get("preferred_username") or claims.get("name") or "annotator").strip()
    # The name alone proves nothing: an account that has it already stays its owner's.
    taken = store.find_user(wanted) is not None
    name = f"{wanted[:60]} {secrets.token_hex(4)}" if taken or not wanted else wanted[:80]
    account = store.add_user(name, secrets.token_urlsafe(32))
    link_identity(store, account, issuer, subject)
    return account


def link_identity(store: Store, account: Account, issuer: str, subject: str) -> None:
    """Lets an identity sign in as an account. Raises UserError if it already is someone's."""
    from sqlalchemy.exc import IntegrityError

    try:
        with store.write() as connection:
            connection.execute(
                insert(t.identity).values(
                    issuer=issuer,
                    subject=subject,
                    account_id=account.id,
                    created_ms=store.now_ms(),
                )
            )
    except IntegrityError as error:
        raise UserError(f"{subject!r} of {issuer} is already linked to an account") from error


def _config(site: Site) -> OidcConfig:
    if site.config.oidc is None:
        raise HTTPException(404, "this site has no identity provider")
    return site.config.oidc


def _serializer(store: Store) -> URLSafeTimedSerializer:
    return URLSafeTimedSerializer(site_key(store, "oidc").hex(), salt="oidc")


def _client(site: Site, config: OidcConfig) -> Any:
    try:
        from authlib.integrations.httpx_client import AsyncOAuth2Client
    except ImportError as error:
        raise HTTPException(501, "sign-in by provider needs: pip install 'reelhf[oidc]'") from error
    return AsyncOAuth2Client(
        config.client_id,
        os.environ.get(config.client_secret_variable),
        scope=SCOPES,
        redirect_uri=config.public_url + site.url("/oidc/callback"),
        code_challenge_method="S256",
        timeout=10,
        trust_env=False,
    )


async def _metadata(config: OidcConfig) -> dict[str, Any]:
    found = await _get(f"{config.issuer.rstrip('/')}/.well-known/openid-configuration")
    if found.get("issuer") != config.issuer:
        raise HTTPException(502, "the identity provider names another issuer than the configured")
    return found


async def _get(address: str) -> dict[str, Any]:
    import httpx

    try:
        async with httpx.AsyncClient(timeout=10, trust_env=False) as http:
            answer = await http.get(address)
            answer.raise_for_status()
            return dict(answer.json())
    except (httpx.HTTPError, ValueError) as error:
        raise HTTPException(502, "the identity provider does not answer") from error


async def _exchange(
    site: Site, config: OidcConfig, code: str, verifier: str, nonce: str
) -> dict[str, Any]:
    """The claims of the identity token that the code buys. Raises HTTPException 403 if it proves nothing."""
    import httpx
    from authlib.integrations.base_client import OAuthError
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import KeySet

    provider = await _metadata(config)
    try:
        async with _client(site, config) as client:
            tokens = await client.fetch_token(
                provider["token_endpoint"], code=code, code_verifier=verifier
            )
        keys = KeySet.import_key_set(await _get(provider["jwks_uri"]))
        token = jwt.decode(tokens["id_token"], keys, algorithms=ALGORITHMS)
        registry = jwt.JWTClaimsRegistry(
            leeway=60,
            iss={"essential": True, "value": config.issuer},
            aud={"essential": True, "value": config.client_id},
            exp={"essential": True},
            sub={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        registry.validate(token.claims)
    except (httpx.HTTPError, OAuthError, JoseError, KeyError, ValueError) as error:
        raise HTTPException(403, "the identity provider did not vouch for you") from error
    return dict(token.claims)
