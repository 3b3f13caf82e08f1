"""MLflow runs this file to rebuild the model ("models from code"): nothing is pickled."""

from mtl_ranker.tracking.pyfunc import serve

serve()
