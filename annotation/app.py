from __future__ import annotations


def mount(app, store, config):
    pass
