"""The whole site of one project, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from fastapi.routing import APIRoute

from annotation.api import admin, flags, media, oidc, quality, sign_in, work
from annotation.api.errors import ERROR_ANSWERS
from annotation.api.gate import Gate
from annotation.api.site import Site
from annotation.config import AnnotateConfig
from annotation.label_studio import webhook
from annotation.store import Store

ROUTERS = (  # what is asked most comes first: a request is held against them in this order
    work.router,
    media.router,
    sign_in.router,
    oidc.router,
    flags.router,
    admin.router,
    quality.router,
    webhook.router,
)
POSTGRES_THREADS = 12
"""Requests of one process that are worked on at a time: of claims and submissions more would only wait for one of its eight connections, and for the
interpreter. Not where clips may first have to come from object storage, which holds a thread for long."""
OWN_PATHS = frozenset(
    route.path_regex for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)
)


def create_app(store: Store, config: AnnotateConfig | None = None, *, page: bool = True) -> FastAPI:
    """The whole site of one project.

    Args:
        page: mount the Gradio pages at `/`, `/flags` and `/quality`; False serves the HTTP API alone (it starts faster).
    Returns: an app whose `state.sign_in_link(account)` makes a one-time path that signs in.
    """
    site = Site.of(store, config or AnnotateConfig())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if not store.database.is_sqlite and store.files.remote is None:
            current_default_thread_limiter().total_tokens = POSTGRES_THREADS
        yield

    app = FastAPI(
        lifespan=lifespan,
        title=site.config.title,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers=ERROR_ANSWERS,
    )
    app.state.site = site
    app.state.sign_in_link = site.sign_in_link
    for router in ROUTERS:
        app.include_router(router)
    if page:
        from annotation import app as annotation_page
        from annotation import flag_page
        from annotation.quality import page as quality_page

        quality_page.mount(app, store, site.config)
        flag_page.mount(app, site.config)
        annotation_page.mount(app, site.config)  # last: it takes every path that is left
    else:
        app.add_api_route("/", no_page)
    app.add_middleware(
        Gate,
        sessions=site.sessions,
        tokens=site.tokens,
        own_paths=OWN_PATHS,
        root_path=site.config.root_path,
        https=site.config.secure_cookie,
    )
    return app


def no_page() -> dict[str, str]:
    return {"detail": "this server has no page, only the HTTP API"}
