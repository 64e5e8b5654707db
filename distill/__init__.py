"""Fewer denoiser calls per clip: distillation of a trained generator into students with their own weights."""
