"""A client of the training service in a container of its own."""
