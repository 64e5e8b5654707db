"""`reelhf demo`: the whole loop on one bare machine, then the pages.

`commands` is light at import; everything heavy starts in `run`, after the `checks` that can fail cheaply (folder, port, disk,
captions). Then `human` or simulated annotators judge, `record` keeps what the loop left, `pages` shows it.
"""
