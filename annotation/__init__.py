"""People's verdicts on clips: tasks, judgments, admissibility, and the preference data they become."""
