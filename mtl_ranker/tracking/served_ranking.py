"""MLflow runs this file to load a model that ranks with a snapshot; nothing is pickled."""

from mlflow.models import set_model

from mtl_ranker.tracking.served import ServedRanking

set_model(ServedRanking())
