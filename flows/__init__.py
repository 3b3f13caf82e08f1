"""Prefect flows: the order of steps, retries, progress, messages and artifacts; no computation."""
