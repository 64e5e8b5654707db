"""Can the judgments be trusted, and what do they say of the models? Pure functions over rows of the `judgments` table."""
