"""Reward models over HTTP, in the forms that other trainers' clients send. Imports no torch."""
