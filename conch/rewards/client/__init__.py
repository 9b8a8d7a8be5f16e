"""One asyncio client of one model on several servers: queue, retries, replicas, transports. No torch."""
