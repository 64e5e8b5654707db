"""Label Studio's call that something changed. Only a hint: it is noted in milliseconds, and the next pull looks for itself.

Label Studio waits one second, does not try again and signs nothing; so a secret header is compared in constant time, an event that
came before changes nothing, and whatever never arrives is found by the next pull all the same.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError

from annotation import schema as t
from annotation.api.signing import site_key
from annotation.api.site import TheSite, read_body
from annotation.store import Store

SECRET_HEADER = "X-ReelHF-Secret"
MAX_EVENT_BYTES = 1024 * 1024
ACTIONS = ["ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED"]

router = APIRouter()


@router.post("/webhooks/label-studio")
async def label_studio(request: Request, site: TheSite) -> dict[str, bool]:
    secret = await run_in_threadpool(webhook_secret, site.store)
    sent = request.headers.get(SECRET_HEADER, "")
    if not hmac.compare_digest(sent.encode(), secret.encode()):
        raise HTTPException(403, "the secret header is missing or wrong")
    try:
        event = json.loads(await read_body(request, MAX_EVENT_BYTES))
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the event is not JSON") from error
    if not isinstance(event, dict) or event.get("action") not in ACTIONS:
        return {"noted": False}
    return {"noted": await run_in_threadpool(note_event, site.store, event)}


def note_event(store: Store, event: dict[str, Any]) -> bool:
    """Keeps an event for the next pull. False if the same one came before."""
    annotation = event.get("annotation")
    about = annotation if isinstance(annotation, dict) else {}
    identity = [event["action"], about.get("id"), about.get("updated_at"), event.get("annotations")]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    try:
        with store.write() as connection:
            connection.execute(
                insert(t.webhook_event).values(digest=digest, received_ms=store.now_ms())
            )
    except IntegrityError:
        return False
    return True


def webhook_secret(store: Store) -> str:
    """What Label Studio must show; made on first use, kept in the project's database."""
    return site_key(store, "webhook").hex()


def register(client: Any, store: Store, project: int, url: str) -> None:
    """Asks Label Studio to call `url` when an annotation of the project changes; once per project and address."""
    known = client.webhooks.list(project=str(project))
    if any(hook.url == url for hook in known):
        return
    client.webhooks.create(
        url=url,
        project=project,
        actions=ACTIONS,
        headers={SECRET_HEADER: webhook_secret(store)},
        send_payload=True,
        send_for_all_actions=False,
        is_active=True,
    )
