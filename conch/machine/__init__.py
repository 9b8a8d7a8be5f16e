"""What the machine gives a process: processors, threads that wait, memory."""
