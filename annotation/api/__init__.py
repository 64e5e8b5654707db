"""The HTTP side: sign-in, claim, submit, skip, media. The page and every simulated annotator use exactly these endpoints.

All answers are JSON. A request that changes something needs the session cookie and the session's CSRF token in
`X-CSRF-Token`. Clips leave only through `/media/{token}`; Gradio's own file routes are closed.

A request passes `gate`, then one of the routes in `sign_in`, `work` and `media`; `app` puts them together, `server` runs them.
"""
