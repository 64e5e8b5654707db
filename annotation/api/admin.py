"""What reviewers and admins may see, and everyone's own API tokens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, HTTPException

from annotation.api.site import JsonBody, RowNumber, SignedIn, TheSite

router = APIRouter()


@router.get("/api/counts")
def counts(site: TheSite) -> dict[str, int]:
    return site.store.counts()


@router.get("/api/users")
def users(site: TheSite) -> dict[str, Any]:
    return {"users": [asdict(account) for account in site.store.users()]}


@router.get("/api/tokens")
def tokens(site: TheSite, account: SignedIn) -> dict[str, Any]:
    return {"tokens": [asdict(token) for token in site.tokens.of(account)]}


@router.post("/api/tokens")
def create_token(site: TheSite, account: SignedIn, raw: JsonBody) -> dict[str, Any]:
    scopes, days = raw.get("scopes"), raw.get("days")
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise HTTPException(422, "scopes is a list of texts")
    if days is not None and (isinstance(days, bool) or not isinstance(days, int | float)):
        raise HTTPException(422, "days is a number")
    label, actor = str(raw.get("label", "")), account.pseudonym
    text, token = site.tokens.create(account, label, scopes, days=days, actor=actor)
    return {"token": text, **asdict(token)}


@router.delete("/api/tokens/{token_id}")
def revoke_token(token_id: RowNumber, site: TheSite, account: SignedIn) -> dict[str, bool]:
    if not site.tokens.revoke(account, token_id, actor=account.pseudonym):
        raise HTTPException(404, "no such token")
    return {"revoked": True}
