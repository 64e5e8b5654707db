"""Real footage for training: which clip goes into which bucket, and what becomes of the rest."""
