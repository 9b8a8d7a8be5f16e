"""Training that overlaps with sampling and scoring: asynchronous GRPO."""
