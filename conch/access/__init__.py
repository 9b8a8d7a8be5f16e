"""Who is let in to the servers that Conch starts: secrets and certificates, of both ends."""
