"""The parts of `rewards.train`: settings, loss, augmentation, the Trainer, calibration."""
