"""The same tasks on a Label Studio server: `push` sends them, `pull` brings back what was said, a webhook says when to pull.

Label Studio shows and collects; what counts is decided here. It accepts a clip that is both best and worst, or one that does not
exist, and imports the same task twice: so every annotation is checked again by our rules, and every task carries our own uid.
"""
