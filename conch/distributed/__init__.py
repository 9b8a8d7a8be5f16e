"""The processes of one run: accelerate, ZeRO-3, launchers."""
