"""What a compressed model is compared with: plans, checkpoints and quantized caches."""
