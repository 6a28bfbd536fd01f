"""WoVR in JAX: post-training of robot policies inside a learned video world model."""
