"""Scores for files: many at once from the command line, one at a time over HTTP, none twice."""
