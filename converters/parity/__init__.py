"""The proof that a served model scores like its checkpoint."""
