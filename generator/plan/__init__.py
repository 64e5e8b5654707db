"""Before anything is launched: parameters, FLOPs, memory and time of a denoiser's training, and whether it fits."""
