"""The prompt pool: where prompts come from, which are kept and why, how they are balanced."""
