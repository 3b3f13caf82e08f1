"""MLflow: the only package that imports it.

- `connection`: which tracking server or database is used.
- `server`: whether that server answers.
- `runs`: trainings, searches and studies as runs with parameters, metrics and artifacts.
- `registry`: registered models, their aliases (challenger, champion) and tags.
- `search`: a search of settings as runs that can be resumed.
- `pyfunc`: how a ranker is stored as an `mlflow.pyfunc` model.
- `served`: how that model predicts; `served_model` is the script from which MLflow builds it.
- `carried_code`: the modules and requirements that it carries.
"""
