"""MLflow: the only package that imports it.

- `connection`: which tracking server or database is used.
- `runs`: trainings, searches and studies as runs with parameters, metrics and artifacts.
- `registry`: registered models, their aliases (challenger, champion) and tags.
- `search`: a search of settings as runs that can be resumed.
- `pyfunc`: the ranker as an `mlflow.pyfunc` model.
- `served_model`: the script from which MLflow builds that model.
"""
