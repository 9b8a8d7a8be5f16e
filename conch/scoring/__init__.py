"""`conch score`: rows or pairs in, scores and what they say about a reward out."""
