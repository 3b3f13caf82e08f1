"""MLflow runs this file to load the model ("models from code"), so nothing is pickled."""

from mtl_ranker.tracking.pyfunc import serve

serve()
