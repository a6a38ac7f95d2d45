"""The store: shards of bitstreams, manifest, completion records and rejects on any fsspec URI."""
