"""The dashboard page at `/quality`: native Gradio plots and tables that the browser fills from `/api/quality`.

No event reaches Python and nothing is kept in the page, as on the annotation page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from annotation import pages
from annotation.quality.report import GROUPS

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from annotation.config import AnnotateConfig
    from annotation.store import Store

FILL = """async (project, by) => {
  const asked = new URLSearchParams({project: project === "%(all)s" ? "" : project || "", by: by || "model"});
  const answer = await fetch("%(root)s/api/quality?" + asked, {credentials: "same-origin"});
  const names = %(names)s;
  if (!answer.ok) {
    const problem = answer.status === 401 ? "Your session has ended: sign in again." : (await answer.json()).detail;
    return names.map((name) => (name === "summary" ? "**" + problem + "**" : null));
  }
  const values = await answer.json();
  return names.map((name) => values[name]);
}"""
ALL_PROJECTS = "all projects"


def build(
    projects: list[str], *, title: str = "ReelHF annotation", root_path: str = ""
) -> gr.Blocks:
    """The page, without data.

    Args:
        projects: names to choose from; with only one, no choice is shown.
        root_path: where a reverse proxy shows the site.
    """
    import gradio as gr

    def bars(x: str, y: str, title: str, **options: object) -> gr.BarPlot:
        options.setdefault("y_lim", [0, None])  # a bar that starts above zero exaggerates
        return gr.BarPlot(x=x, y=y, title=title, height=260, sort=None, **options)

    def table(label: str) -> gr.Dataframe:
        return gr.Dataframe(label=label, interactive=False, wrap=True, max_height=320)

    shown: dict[str, gr.components.Component] = {}
    with pages.blocks(f"{title}: quality") as page:
        with gr.Row(elem_id="topbar"):
            shown["summary"] = gr.Markdown("Loading …", elem_id="summary")
            with gr.Column(scale=0, min_width=180, visible=len(projects) > 1):
                choices = [ALL_PROJECTS, *projects]
                project = gr.Dropdown(choices, value=ALL_PROJECTS, label="Project")
            with gr.Column(scale=0, min_width=160):
                by = gr.Dropdown(list(GROUPS), value="model", label="Rank by")
            refresh = gr.Button("Refresh", elem_id="refresh", size="sm", scale=0, min_width=100)
        with gr.Tab("Progress"), gr.Row():
            shown["progress"] = bars("state", "tasks", "Tasks by state")
            shown["throughput"] = gr.LinePlot(
                x="hour", y="judgments", title="Judgments per hour", height=260
            )
        with gr.Tab("Agreement"), gr.Row():
            shown["agreement"] = bars(
                "dimension", "alpha", "Krippendorff's alpha", y_lim=[-0.2, 1.0]
            )
            shown["agreement_table"] = table("95 % intervals over prompts")
        with gr.Tab("Annotators"):
            shown["annotators"] = table("By ability, least first; 1 is usual, 0 guesses")
        with gr.Tab("The page"):
            with gr.Row():
                shown["position"] = bars("place", "times best", "Best clip by place")
                shown["vetoes"] = bars(
                    "pair of dimensions",
                    "clash %",
                    "Free picks that clash, % of answers",
                    x_label_angle=-30,
                )
            shown["position_table"] = table("Equal chances for every place: chi-square")
        with gr.Tab("Leaderboard"), gr.Row():
            shown["board"] = bars(
                "name", "rating", "Bradley-Terry rating (1000 is the mean)", y_lim=[600, None]
            )
            shown["board_table"] = table("95 % intervals over prompts")
        with gr.Tab("Disk"):
            shown["disk"] = bars("what", "MB", "On disk, MB")
            shown["clips"] = table("Largest clips")
        call = FILL % {"names": list(shown), "root": root_path, "all": ALL_PROJECTS}
        for trigger in (page.load, refresh.click, project.change, by.change):
            pages.in_browser(trigger, call, [project, by], list(shown.values()))
    return page


def mount(app: FastAPI, store: Store, config: AnnotateConfig) -> None:
    """Mounts the page; `api.policy` says who may see it."""
    from annotation.projects import list_projects

    names = [project.name for project in list_projects(store) if project.tasks]
    page = build(names, title=config.title, root_path=config.root_path)
    pages.mount(app, page, "/quality", config)
