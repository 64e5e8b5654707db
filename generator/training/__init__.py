"""Training stages of the generator: VAE, text encoder, denoiser."""
