"""Embeddings of any number of images, in shards that can be written by many, one after another."""
