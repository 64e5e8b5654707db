"""How far a reward can be believed: accuracy, ties, calibration, agreement, robustness, and the rows it has to beat."""
