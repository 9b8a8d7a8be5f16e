"""Talking to Triton Inference Server: contracts, config.pbtxt, channels, TLS. No torch."""
