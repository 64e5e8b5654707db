"""The frame of every page that a run leaves behind: one file, nothing fetched, light or dark as the reader likes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def html_page(title: str, sections: Sequence[str], *, script: str = "") -> str:
    """A whole HTML file of sections that are HTML already; the title is plain text."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(sections)}</main>"
        f"<script>{script}</script></body></html>"
    )


STYLE = """
:root{--bg:#fcfcfa;--ink:#1c1f23;--soft:#686e76;--line:#e2e2dc;--panel:#fff;--s0:#0b6fb8;--s1:#c2570c;--s2:#1a7f4f;--s3:#8d4a9e;
--pass:#1a7f4f;--fail:#b3261e;--note:#f5f1e4;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e8e8e4;--soft:#9aa1a9;--line:#2e3237;--panel:#1b1e22;--s0:#5db4f2;--s1:#f0924d;
--s2:#5cc492;--s3:#cf93df;--pass:#5cc492;--fail:#ff8a80;--note:#26241c}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1060px;margin:0 auto;padding:36px 24px 80px}h1{font-size:30px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:0 0 6px}h3{font-size:15px;margin:22px 0 4px}section{margin-top:46px;padding-top:22px;border-top:1px solid var(--line)}
section.sub{border-top:0;margin-top:26px;padding-top:0}section.sub h2{font-size:17px}
p{max-width:76ch;margin:6px 0 12px}.muted{color:var(--soft)}small{font-size:12px}
nav{display:flex;flex-wrap:wrap;gap:6px 20px;margin:14px 0 4px;font-size:14px}a{color:var(--s0)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:18px 0}
.tiles div{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 16px}.tiles b{display:block;font-size:23px;font-weight:620}
.tiles span{color:var(--soft);font-size:13px}.note{background:var(--note);border-radius:8px;padding:9px 14px}.note.bad{border-left:4px solid var(--fail)}
table{border-collapse:collapse;width:100%;font-size:14px}table.narrow{max-width:560px}th{text-align:left;font-weight:560;color:var(--soft);font-size:12.5px}
td,th{padding:6px 10px 6px 0;border-bottom:1px solid var(--line);vertical-align:middle}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;padding-right:16px}
tfoot td{font-weight:600}.status{font-weight:620}.pass{color:var(--pass)}.fail{color:var(--fail)}
.loop{width:100%;max-width:640px;margin:14px 0 2px;display:block}.loop .box rect{fill:var(--panel);stroke:var(--line);stroke-width:1.5}
.loop text{fill:var(--ink);font-size:13px;text-anchor:middle}.loop .arrow path{fill:none;stroke:var(--soft);stroke-width:1.5;marker-end:url(#tip)}.loop marker path{fill:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(290px,1fr));gap:14px}.chart{width:100%;height:auto;background:var(--panel);border:1px solid var(--line);border-radius:8px}
.chart text{fill:var(--soft);font-size:10px}.chart .title{fill:var(--ink);font-size:12px;font-weight:600}.grid{stroke:var(--line);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}.line{fill:none;stroke-width:1.8;stroke-linejoin:round}.faint{stroke-width:1;opacity:.38}.dashed{stroke-dasharray:6 3}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.dot{stroke:none}.dot.s0{fill:var(--s0)}.dot.s1{fill:var(--s1)}.dot.s2{fill:var(--s2)}.dot.s3{fill:var(--s3)}
.legend{display:flex;flex-wrap:wrap;gap:4px 22px;font-size:13px;color:var(--soft);margin:4px 0 10px}.key{width:26px;height:8px;margin-right:7px;vertical-align:middle}
.interval{width:150px;height:18px;display:block}.bar{stroke:var(--soft);stroke-width:3;stroke-linecap:round}.bar.pass{stroke:var(--pass)}.bar.fail{stroke:var(--fail)}
.barDot{fill:var(--soft)}.barDot.pass{fill:var(--pass)}.barDot.fail{fill:var(--fail)}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:18px}.pair{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px;break-inside:avoid}
.two{display:grid;grid-template-columns:1fr 1fr;gap:8px}figure{margin:0}figcaption{font-size:12px;color:var(--soft);text-align:center}
video{width:100%;height:auto;display:block;border-radius:5px;background:#000;image-rendering:pixelated}.strip{width:100%;display:block;margin-top:4px;border-radius:3px}
.prompt{margin:8px 0 2px;font-size:14px}.pair .muted{font-size:12.5px;margin:0}
.player{display:flex;gap:12px;align-items:center;margin:10px 0 14px}.player input{flex:1;max-width:420px;accent-color:var(--s0)}
button{font:inherit;font-size:14px;padding:5px 16px;border:1px solid var(--line);border-radius:7px;background:var(--panel);color:var(--ink);cursor:pointer}
.gauge{width:38%}.gauge span{display:block;position:relative;height:9px;background:var(--line);border-radius:5px}.gauge b{position:absolute;inset:0 auto 0 0;background:var(--s0);border-radius:5px}
.gauge i{position:absolute;top:-3px;height:15px;width:2px;background:var(--ink)}
pre{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px;overflow:auto;font-size:12.5px}summary{cursor:pointer;color:var(--soft);margin:10px 0}
@media print{body{background:#fff;font-size:11px}main{max-width:none;padding:0}section{margin-top:20px;break-inside:auto}.player,video,nav{display:none}.charts{grid-template-columns:repeat(3,1fr)}
.pairs{grid-template-columns:1fr 1fr}h2{break-after:avoid}.chart,tr{break-inside:avoid}}
@media(prefers-reduced-motion:reduce){.strip{outline:0}}
"""
