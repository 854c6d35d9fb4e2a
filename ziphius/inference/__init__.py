"""The same model, answering: latent cache, sampler, generation."""
