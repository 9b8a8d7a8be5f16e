"""Programs that show what Conch does."""
