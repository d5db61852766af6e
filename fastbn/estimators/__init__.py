"""scikit-learn estimators: networks with batch normalization, and a scaler for streams."""

try:
    from .predictors import BatchNormClassifier, BatchNormRegressor
    from .transformer import BatchNormTransformer
except ImportError as error:
    raise ImportError('estimators need scikit-learn 1.6 or newer: pip install "fastbn[train]"') from error

__all__ = ["BatchNormClassifier", "BatchNormRegressor", "BatchNormTransformer"]
