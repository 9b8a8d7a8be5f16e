"""Training while completions are sampled: what overlaps, how old samples are, and what makes up for it."""
