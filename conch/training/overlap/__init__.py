"""Training that overlaps with sampling and scoring (groups, their buffer, their ledger), and with the writing
of its checkpoints."""
