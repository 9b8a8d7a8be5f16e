"""Training that overlaps with sampling and scoring: groups, the buffer between the two, their ledger."""
