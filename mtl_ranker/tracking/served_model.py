"""MLflow runs this file to load the model ("models from code"), so nothing is pickled."""

from mlflow.models import set_model

from mtl_ranker.tracking.served import ServedRanker

set_model(ServedRanker())
