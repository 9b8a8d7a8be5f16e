"""What the HTTP servers of Conch share: their port and its guard, restarts, their clients."""
