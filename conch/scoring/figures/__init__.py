"""What scores amount to: of samples, of pairs, and of two rewards."""
