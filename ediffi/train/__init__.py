"""Training of one denoiser: data, DeepSpeed engine, EMA, checkpoints and the loop."""
