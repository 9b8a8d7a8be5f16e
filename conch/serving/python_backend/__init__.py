"""What runs inside the server: `model.py`, copied into version folders, imports nothing of this package."""
