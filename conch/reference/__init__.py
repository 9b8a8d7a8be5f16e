"""The reference on servers of its own: messages, server, and what a trainer asks them with."""
