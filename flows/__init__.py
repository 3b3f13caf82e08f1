"""Prefect flows: what runs when, with retries, skips and artifacts. No arithmetic lives here."""
