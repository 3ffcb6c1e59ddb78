"""The networks of Flux.1: transformer, text encoders, VAE, and what goes into them."""
