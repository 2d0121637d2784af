"""Codecs: any network of CompressAI's protocol behind one adapter, the bundled one, files in and out."""
