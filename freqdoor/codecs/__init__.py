"""Codecs: any network of CompressAI's protocol behind one adapter, the bundled one, files in and out."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of PyTorch at what CompressAI does while it is imported
    import compressai.models  # noqa: F401
