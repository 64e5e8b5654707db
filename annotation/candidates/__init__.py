"""Candidate clips: made by configured generators, and mixed into tasks by configured shares."""
