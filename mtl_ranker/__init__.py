"""mtl_ranker: nightly multi-task ranking from Parquet logs to a registered champion.

The library works without Prefect; `flows/` says what runs when.
"""

__version__ = "0.1.0"
