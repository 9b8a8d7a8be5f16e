"""What is spoken with Triton Inference Server: contracts, config.pbtxt, channels, TLS. No torch."""
