"""What runs inside the server: each file is copied into version folders as `model.py`; none imports Conch."""
