"""Models whose layers differ: experts, latent keys, state spaces; counted layer by layer."""
