"""The pages at the end: annotate what the loop made, and review it."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

from annotation.api.server import running_server
from annotation.store import Store
from rlhf.demo.human import own_folder
from rlhf.demo.options import DemoOptions
from rlhf.demo.printing import print_tunnel
from rlhf.human_judging import add_before_after_tasks, human_app, person
from rlhf.judging import PROJECT
from rlhf.review import create_review_app
from rlhf.rounds import RoundStages


def serve_pages(options: DemoOptions, last: RoundStages, pages: ExitStack) -> None:
    """Serve the annotation page and the review page until interrupted."""
    if options.annotator == "simulated":
        store = pages.enter_context(own_project(options.out, last))
        site = human_app(store)
        link = pages.enter_context(running_server(site, port=options.port))
        link += site.state.sign_in_link(person(store))
    else:  # it has been open since the judging began
        link = f"http://127.0.0.1:{options.port}"
    review = create_review_app(options.out.parent)
    review_url = pages.enter_context(running_server(review, port=options.port + 1))
    print(f"\nannotation: {link}\nreview:     {review_url}\n")
    print_tunnel([options.port, options.port + 1])
    print("Both pages stay open until Ctrl-C.")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("\nclosed. What you judged is kept; the next run opens the same project.")


def own_project(out: Path, last: RoundStages) -> Store:
    """The project to judge in: a copy of the one in the cache, with blind before/after tasks that nobody has judged yet."""
    key = last.judging.key + last.compare_base.key + last.compare_refiner.key
    project = own_folder(out / "project", key) / PROJECT
    if not project.exists():
        aside = project.with_name(f".{PROJECT}")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(last.judging.path / PROJECT, aside)
        with Store.open(aside) as store:
            add_before_after_tasks(store, [last.compare_base.path, last.compare_refiner.path])
        aside.rename(project)
    return Store.open(project)
